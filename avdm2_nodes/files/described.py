"""What our two formats, a student's and a style's, have in common: a .safetensors whose metadata say all about its tensors.

The metadata are ModelSpec keys (Stability-AI/ModelSpec, version 1.0.0) and the project's own, `avdm2.*`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, ClassVar, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from torch import Tensor

from .containers import SAFETENSORS, read_layout, read_tensors, write_tensors
from .paths import require_file
from .sentences import FileError, reason, whole_number

OURS, MODELSPEC = "avdm2.", "modelspec."
STRICT = ConfigDict(extra="forbid")  # of the pydantic dataclasses

Positive = Annotated[int, Field(ge=1)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

_IN_MODELSPEC = ("title", "date", "license")  # fields that ModelSpec has a key for

Info = TypeVar("Info", bound="Description")


class Description:
    """What is common to the pydantic dataclasses that metadata are made of; they have fields title, date and license."""

    KIND: ClassVar[str]  # in sentences: "student"
    ERROR: ClassVar[type[FileError]]  # raised for files of this kind
    REMEDY: ClassVar[str]  # for a damaged one: "copy or export it again"
    ARCHITECTURE: ClassVar[str]  # ModelSpec's
    VERSION_FIELD: ClassVar[str]  # whose key in the metadata no other file has
    VERSION: ClassVar[int]  # the newest that is known
    IN_JSON: ClassVar[tuple[str, ...]] = ()  # fields whose text is JSON; numbers need none to be read

    def usage_hint(self) -> str:
        """How the file is used, for people."""
        raise NotImplementedError

    def to_metadata(self) -> dict[str, str]:
        """The metadata of a .safetensors; what is None or nothing is left out."""
        said = {key: value for key, value in asdict(self).items() if value not in (None, ())}
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in said.items()}
        spec = {key: texts.pop(key) for key in _IN_MODELSPEC} | {
            "sai_model_spec": "1.0.0",
            "architecture": self.ARCHITECTURE,
            "implementation": "diffusers",
            "usage_hint": self.usage_hint(),
        }
        return {MODELSPEC + key: text for key, text in spec.items()} | {OURS + key: text for key, text in texts.items()}

    @classmethod
    def from_metadata(
        cls: type[Info], metadata: Mapping[str, str], name: str | Path, found: str = "tensors of another kind"
    ) -> Info:
        """The inverse of `to_metadata`, for the file `name`; its ERROR, which says `found`, for a file of another kind."""
        version = metadata.get(OURS + cls.VERSION_FIELD)
        if version is None:
            raise cls.ERROR(f"Expected a {cls.KIND} file at {name}, found {found}; choose a {cls.KIND}.")
        if version.isdecimal() and (whole_number(version) or cls.VERSION + 1) > cls.VERSION:
            raise cls.ERROR(
                f"Expected a {cls.KIND} file of version {cls.VERSION} or older in {name}, found {version}; update this project."
            )
        keys = {(MODELSPEC if f.name in _IN_MODELSPEC else OURS) + f.name: f.name for f in fields(cls)}
        said = {key: metadata[text] for text, key in keys.items() if text in metadata}
        try:
            return cls(**said | {key: json.loads(said[key]) for key in cls.IN_JSON if key in said})
        except ValidationError as error:
            raise cls.ERROR(f"Expected a whole {cls.KIND} file at {name}, found {_problem(error)}; {cls.REMEDY}.") from error
        except (ValueError, RecursionError) as error:  # of JSON
            raise cls.ERROR(
                f"Expected JSON in {' and '.join(cls.IN_JSON)} of {name}, found: {reason(error)}; {cls.REMEDY}."
            ) from error


def _problem(error: ValidationError) -> str:
    """The first problem of several, in words."""
    first = error.errors()[0]
    key, words = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if not key:
        return words
    problem = f"no {key}" if first["type"] == "missing" else f"{key} {str(first['input'])[:80]!r}: {words}"
    return f"its {key} wrong ({problem})"


def write_described(path: Path, tensors: Mapping[str, Tensor], info: Description) -> None:
    """Writes a file, whole or not at all. The ERROR of `info` for another suffix, no such folder, no right to write or no room."""
    try:
        write_tensors(path, tensors, info.to_metadata())
    except FileError as error:
        raise info.ERROR(str(error)) from error


def read_described(
    path: Path, kind: type[Info], found: Callable[[Path], str] = lambda _: "tensors of another kind"
) -> tuple[Info, dict[str, Tensor]]:
    """A file's description and its tensors, in their own dtypes on the CPU.

    The ERROR of `kind` for a file that is missing, truncated, of a newer version or of another kind, which `found` names.
    """
    path = Path(path)
    try:
        require_file(path, f"a {kind.KIND} file")
        layout = read_layout(path)
        other = "" if OURS + kind.VERSION_FIELD in layout.metadata else found(path)
        info = kind.from_metadata(layout.metadata, path, other)
        return info, read_tensors(path)
    except kind.ERROR:
        raise
    except FileError as error:
        raise kind.ERROR(str(error)) from error


def is_described(path: Path, kind: type[Description]) -> bool:
    """True for a readable .safetensors that says it is of this kind; never fails."""
    path = Path(path)
    try:
        return path.suffix.lower() in SAFETENSORS and OURS + kind.VERSION_FIELD in read_layout(path).metadata
    except FileError:
        return False
