"""What a training's process says when it fails, in the words of the node that started it."""

import re
from collections.abc import Mapping
from pathlib import Path

_PHRASES = (  # of a command line, and of a node
    (r"name another(?:(?: folder| disk)? with --run\.folder| folder(?=[.,;]))", "choose another name"),
    (r"start anew in another folder", "start anew under another name"),
    (r"(?:give )?(?:the same|the|that) command(?: again: it)? goes on", "the same inputs go on"),
    (r"start again: the run goes on", "run the same inputs again: they go on"),
    (r"--?(?:run|warmup)\.updates|\b(?:run|warmup)\.updates\b", "updates"),
)
_TRACEBACK = re.compile(r"^(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt)(?::|$)")  # the last line of one


def in_node_words(words: str, log: Path, inputs: Mapping[str, tuple[str, ...]]) -> str:
    """One sentence; `inputs` are the names of the node's inputs, by the settings that they become."""
    if _TRACEBACK.match(words):
        return _of_traceback(words, log)
    for theirs, ours in _PHRASES:
        words = re.sub(theirs, ours, words)
    for name, keys in inputs.items():
        for key in keys:
            words = re.sub(rf"(?:--)?\b{re.escape(key)}\b", name, words)
    return words


def _of_traceback(line: str, log: Path) -> str:
    if "out of memory" in line.lower() or "can't allocate memory" in line.lower() or line.startswith("MemoryError"):
        return (
            f"Expected enough memory for this training, found: {line}; close what else uses it or take the settings that need less, and "
            "the same inputs go on."
        )
    if "No space left on device" in line or "Disk quota exceeded" in line:
        return f"Expected room for the training in {log.parent}, found its disk full; make room, and the same inputs go on."
    return f"Expected the training to end well, found {line}; more is in {log}."
