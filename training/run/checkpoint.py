"""Checkpoints: one safetensors file a checkpoint, written whole or not at all, the newest few kept.

A state is a nested structure of dicts and lists whose leaves are tensors or plain JSON values, as `state_dict()` of modules and
optimisers gives it. Tensors become tensors of the file; the structure itself is JSON in its metadata.
"""

import contextlib
import json
import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

logger = logging.getLogger(__name__)


class CheckpointError(OSError):
    """A checkpoint that cannot be written; the message is one sentence."""


def write_atomically(path: Path, write) -> None:
    """Calls `write(temporary path)` and moves the result to `path`; on any error the temporary file is removed and `path` untouched."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        write(temporary)
        temporary.chmod(mode)  # safetensors leaves a file that only its owner can read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _split(node, tensors: dict, name: str):
    """The JSON skeleton of `node`; its tensors go to `tensors` under their dotted place."""
    if isinstance(node, torch.Tensor):
        if name in tensors:  # keys with dots in them can meet
            name = f"{name} {len(tensors)}"
        tensors[name] = node.detach().contiguous()
        return {"__tensor__": name}
    if isinstance(node, dict):
        # Optimisers key their state by integers, which JSON would turn into strings.
        return {"__dict__": [[key, _split(value, tensors, f"{name}.{key}")] for key, value in node.items()]}
    if isinstance(node, (list, tuple)):
        return [_split(value, tensors, f"{name}.{i}") for i, value in enumerate(node)]
    return node


def _join(node, tensors: dict):
    if isinstance(node, dict):
        if "__tensor__" in node:
            return tensors[node["__tensor__"]]
        return {key: _join(value, tensors) for key, value in node["__dict__"]}
    if isinstance(node, list):
        return [_join(value, tensors) for value in node]
    return node


def save_state(path: Path, state: dict) -> None:
    """Writes a nested state atomically. CheckpointError when there is no space or no right to write; `path` is then untouched."""
    tensors: dict[str, torch.Tensor] = {}
    skeleton = _split(state, tensors, "state")
    # safetensors refuses tensors that share memory (tied weights): each gets its own copy.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary, {"state": json.dumps(skeleton)}))
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        cause = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"Expected room and the right to write {path}, found: {cause}; make room and start again: the run goes on."
        ) from error


def load_state(path: Path) -> dict:
    """Reads what `save_state` wrote. Raises ValueError for a truncated or foreign file."""
    try:
        with safe_open(path, framework="pt") as file:
            skeleton = json.loads((file.metadata() or {})["state"])
            return _join(skeleton, {name: file.get_tensor(name) for name in file.keys()})
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"Expected a checkpoint of this project, found {Path(path).name} unreadable as one ({error})."
        ) from error


class Checkpoints:
    """The checkpoints of one run, `step-00000100.safetensors`, in `folder`; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = Path(folder), keep

    def paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))

    def save(self, step: int, state: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self.folder.glob(".step-*.tmp"):  # of a process that was killed while it wrote
            unfinished.unlink()
        save_state(self.folder / f"step-{step:08d}.safetensors", state)
        for old in self.paths()[: -self.keep]:
            old.unlink()

    def latest(self) -> tuple[int, dict] | None:
        """(step, state) of the newest readable checkpoint; an unreadable one is named and passed over. None without any."""
        for path in reversed(self.paths()):
            try:
                return int(path.stem.removeprefix("step-")), load_state(path)
            except ValueError as error:
                logger.warning("%s It is passed over for the one before it.", error)
        return None
