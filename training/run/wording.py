"""What is wrong with settings, in sentences: pydantic's findings, the nearest valid name, a value as a reader writes it."""

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

# pydantic's words, in the form of the house.
_WORDING = {
    "Value error, ": "",
    "Input should be": "expected",
    "expected greater": "expected a value greater",
    "expected less": "expected a value less",
    "Tuple should have": "expected",
    " after validation": "",
    "String should match pattern": "expected text of the pattern",
    "Input is not a valid path for <class 'pathlib.Path'>": "expected a path",
    "Field required": "expected one more value",
}


def sentences(error: ValidationError, name: str, on_command_line: Iterable[str], valid_keys: list[str]) -> str:
    """One a line; each problem stands in the file `name`, or `on_command_line` if it names the key or a section of it."""
    on_command_line, lines = list(on_command_line), []
    for problem in error.errors():
        if not problem["loc"]:
            lines += str(problem["ctx"]["error"]).splitlines()  # of the settings' own validator, sentences already
        else:
            lines.append(_sentence(problem, name, on_command_line, valid_keys))
    return "\n".join(lines)


def _sentence(problem: dict, name: str, on_command_line: list[str], valid_keys: list[str]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    place = "command line" if any(key == given or key.startswith(f"{given}.") for given in on_command_line) else name
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown setting {key}; the nearest is {nearest(key, valid_keys)}."
    if problem["type"].startswith("model_"):
        return f"{place}: {key}: expected a section with keys, found {said(problem['input'])}; see --help."
    expected = problem["msg"]
    for theirs, ours in _WORDING.items():
        expected = expected.replace(theirs, ours)
    return f"{place}: {key}: {expected}, found {said(problem['input'])}; change it."


def nearest(key: str, valid_keys: list[str]) -> str:
    """The valid key whose whole or last part is most like that of `key`."""

    def likeness(valid: str) -> float:
        parts = difflib.SequenceMatcher(None, key.rpartition(".")[2], valid.rpartition(".")[2]).ratio()
        return parts + difflib.SequenceMatcher(None, key, valid).ratio()

    return max(valid_keys, key=likeness)


def said(value: Any) -> str:
    """A value as YAML writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
