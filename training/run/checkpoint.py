"""Checkpoints: one safetensors file a checkpoint, written whole or not at all, the newest few kept.

A state is a nested structure of dicts and lists whose leaves are tensors or plain JSON values, as `state_dict()` of modules and
optimisers gives it. Tensors become tensors of the file; the structure itself is JSON in its metadata, beside
a hash of both: a flipped bit, or a hole that a power cut left, is found when it is read.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from training.run.reading import UnreadableError, parsed

logger = logging.getLogger(__name__)


class CheckpointError(OSError):
    """A checkpoint that cannot be written, or a place that cannot hold any; the message is one sentence."""


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


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a text in UTF-8, whole or not at all. OSError where there is no room or no right."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


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


def _hash(skeleton: str, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of a state: its skeleton, and of each tensor the name, dtype, shape and bytes."""

    def piece(name: str) -> bytes:
        tensor = tensors[name]
        values = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return hashlib.sha256(
            f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode() + hashlib.sha256(values).digest()
        ).digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets go of the interpreter
        pieces = pool.map(piece, sorted(tensors))
        return hashlib.sha256(b"".join([hashlib.sha256(skeleton.encode()).digest(), *pieces])).hexdigest()


def save_state(path: Path, state: dict) -> None:
    """Writes a nested state atomically. CheckpointError when there is no space or no right to write; `path` is then untouched."""
    tensors: dict[str, torch.Tensor] = {}
    skeleton = json.dumps(_split(state, tensors, "state"))
    # safetensors refuses tensors that share memory (tied weights): each gets its own copy.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    about = {"state": skeleton, "sha256": _hash(skeleton, tensors)}
    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary, about))
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        cause = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"Expected room and the right to write {path}, found: {cause}; make room and start again: the run goes on."
        ) from error


def load_state(path: Path, keys: Collection[str] = ()) -> dict:
    """Reads what `save_state` wrote. ValueError for a truncated, damaged or foreign file, and for a state without one of `keys`.

    A checkpoint of before there were hashes is taken as it is.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UnreadableError("a folder" if path.is_dir() else "nothing" if not path.exists() else "no file")
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if "sha256" in about and about["sha256"] != _hash(about["state"], tensors):
            raise UnreadableError("other values than were written")
        state = _join(parsed(about["state"]), tensors)
        if not isinstance(state, dict) or (missing := [key for key in keys if key not in state]):
            raise UnreadableError(f"no {missing[0]!r} in it" if isinstance(state, dict) else "another structure")
        return state
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"Expected a checkpoint of this project, found {path.name} unreadable as one ({type(error).__name__}: {error})."
            if not isinstance(error, UnreadableError)
            else f"Expected a checkpoint of this project, found {path.name} unreadable as one ({error})."
        ) from error


class Checkpoints:
    """The checkpoints of one run, `step-00000100.safetensors`, in `folder`; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = Path(folder), keep

    def paths(self) -> list[Path]:
        """From the oldest on. CheckpointError where something else than a folder stands in their place."""
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"Expected a folder for checkpoints at {self.folder}, found a file; take it away.")
        return sorted(path for path in self.folder.glob("step-*.safetensors") if re.fullmatch(r"step-\d{8,}", path.stem))

    def save(self, step: int, state: dict) -> None:
        """Writes one and removes what is too old. CheckpointError as `save_state`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for unfinished in self.folder.glob(".step-*.tmp"):  # of a process that was killed while it wrote
                unfinished.unlink()
            save_state(self.folder / f"step-{step:08d}.safetensors", state)
            for old in self.paths()[: -self.keep]:
                if not old.is_dir():
                    old.unlink()
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"Expected to write checkpoints into {self.folder}, found: {error.strerror}; clear the way and start again: "
                "the run goes on."
            ) from error

    def latest(self, keys: Collection[str] = ()) -> tuple[int, dict] | None:
        """(step, state) of the newest readable checkpoint whose state has `keys`; others are named and passed over. None without any."""
        for path in reversed(self.paths()):
            try:
                return int(path.stem.removeprefix("step-")), load_state(path, keys)
            except ValueError as error:
                logger.warning("%s It is passed over for the one before it.", error)
        return None
