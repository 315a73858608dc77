"""Tensors by name in one file: .safetensors and the pickles of PyTorch, read safely and written whole or not at all.

torch is imported only for a pickle's or a file's tensors, so that a node may read the layout of every file of a list. Pickles are
never read in a way that runs their code.
"""

import contextlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SentenceError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
SAFETENSORS = (SUFFIX, ".sft")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")

_HEADER_LIMIT = 100_000_000  # bytes of a .safetensors' header; the library's own limit


class FileFormatError(SentenceError, ValueError):
    """A model file that cannot be read, written or used; the message is one sentence that names it."""


@dataclass(frozen=True)
class Layout:
    """Name and shape of each tensor in a file, and the file's metadata (a pickle has none)."""

    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    metadata: dict[str, str] = field(default_factory=dict)


def read_layout(path: Path) -> Layout:
    """Names, shapes and metadata of a file without its weights; names as `read_tensors` gives them.

    FileFormatError for a file that is missing, empty, truncated, of another suffix or of other contents than its suffix says (a
    page saved in its stead, a Git LFS pointer), or a pickle that needs code to run.
    """
    path = Path(path)
    _require_container(path)
    if path.suffix.lower() in SAFETENSORS:
        shapes, metadata = _safetensors_header(path)
        return Layout(_without_wrapper(shapes), metadata)
    tensors = _without_wrapper(_unpickled(path, "meta"))
    return Layout({name: tuple(tensor.shape) for name, tensor in tensors.items()})


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """Every tensor of a file by name, in its own dtype, on the CPU. FileFormatError as `read_layout`.

    The tensors may lie in the file itself, mapped into memory: copy what is to outlive it. The wrappers that training code puts
    around the names, `state_dict` and a common `module.`, are taken off.
    """
    path = Path(path)
    _require_container(path)
    if path.suffix.lower() not in SAFETENSORS:
        return _without_wrapper(_unpickled(path, "cpu"))
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _safetensors_header(path)  # its sentences are better
    try:
        return _without_wrapper(load_file(path))
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors, whole or not at all. FileFormatError for another suffix, no such folder, no right or no room."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    if not path.name.endswith(SUFFIX):
        raise FileFormatError(f"Expected a name that ends in {SUFFIX}, found {path}; name the file so.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        save_file(_apart(tensors), temporary, dict(metadata))
        temporary.chmod(mode)  # safetensors leaves a file that only its owner can read
        with temporary.open("rb+") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or error
        raise FileFormatError(
            f"Expected room and the right to write {path}, found: {cause}; name another place or make room."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _apart(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Contiguous tensors on the CPU, copied where one shares memory with another: the format has no such tensors."""
    apart, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return apart


def _require_container(path: Path) -> None:
    """FileFormatError unless there is a file whose first bytes are of what its suffix says."""
    suffixes = ", ".join((*SAFETENSORS, *PICKLES))
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise FileFormatError(f"Expected a model file at {path}, found {found}; check the path.")
    if path.suffix.lower() not in (*SAFETENSORS, *PICKLES):
        raise FileFormatError(f"Expected a model file ({suffixes}), found {path}; choose a file of these kinds.")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise FileFormatError(f"Expected a model file at {path}, found: {error.strerror}; check its rights.") from error
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    found = None
    if not head:
        found = "an empty file; download it again"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        found = "a web page; download the file itself, not the page about it"
    elif text.startswith(b"version https://git-lfs"):
        found = "a Git LFS pointer, which only names the file; run git lfs pull, or download the file itself"
    elif path.suffix.lower() in SAFETENSORS and head.startswith((b"PK\x03\x04", b"\x80")) and head[8:9] != b"{":
        found = "a PyTorch pickle; rename it to .ckpt"
    elif path.suffix.lower() in PICKLES and head[8:9] == b"{":
        found = "a safetensors file; rename it to .safetensors"
    if found is not None:
        raise FileFormatError(f"Expected a model file at {path}, found {found}.")


def _damaged(path: Path, cause: object) -> FileFormatError:
    first_line = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200].rstrip(".")
    return FileFormatError(
        f"Expected a whole model file at {path}, found it truncated or damaged ({first_line}); download or copy it again."
    )


def _safetensors_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and metadata from the header: 8 bytes of length, JSON, then the tensors one after another."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size < 8:
            raise _damaged(path, f"{size} bytes")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _HEADER_LIMIT):
            raise _damaged(path, f"it announces a header of {length} bytes and has {size} in all")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        entries = {name: _shape_and_end(entry) for name, entry in header.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that are no texts")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header: {error}") from error
    announced = 8 + length + max((end for _, end in entries.values()), default=0)
    if announced != size:
        raise _damaged(path, f"{size} bytes in place of {announced}")
    return {name: shape for name, (shape, _) in entries.items()}, metadata


_BITS = re.compile(r"\d+")  # of F32, BF16, I64, F8_E4M3: a number's bits, the first digits in its name


def _shape_and_end(entry: dict) -> tuple[tuple[int, ...], int]:
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"sizes {shape}, {start}, {end}")
    bits = _BITS.search(entry["dtype"])
    if bits and int(bits[0]) >= 8 and math.prod(shape) * int(bits[0]) != 8 * (end - start):
        raise ValueError(f"a tensor of shape {shape} in {end - start} bytes")
    return tuple(shape), end


def _unpickled(path: Path, device: str) -> "dict[str, Tensor]":
    """The tensors in a pickled dict and in the dicts right below it (names joined by a dot), on "cpu" or "meta"."""
    import pickle

    import torch

    with path.open("rb") as file:
        head = file.read(4)
    others = (
        torch.serialization.get_safe_globals()
    )  # ComfyUI's among them, whose names for the same things are functions that run
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(_shells()):
            saved = torch.load(path, map_location=device, weights_only=True, mmap=head == b"PK\x03\x04")
    except pickle.UnpicklingError as error:
        if not head.startswith((b"PK\x03\x04", b"\x80")):
            raise _damaged(path, "no pickle") from error
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        named = f" ({wanted[1]})" if wanted else ""
        raise FileFormatError(
            f"Expected a file of weights alone at {path}, found a pickle that needs code to run{named}; "
            "choose its .safetensors version."
        ) from error
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise _damaged(path, error) from error
    finally:
        torch.serialization.add_safe_globals(others)
    if not isinstance(saved, Mapping):
        raise FileFormatError(f"Expected tensors by name at {path}, found a {type(saved).__name__}; choose another file.")
    if isinstance(saved.get("state_dict"), Mapping):
        saved = saved["state_dict"]
    flat = {str(key): value for key, value in saved.items()}
    for key, value in saved.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": tensor for inner, tensor in value.items()}
    return {key: value for key, value in flat.items() if isinstance(value, torch.Tensor)}


def _shells() -> list[type]:
    """Empty classes for what the first Stable Diffusion checkpoints hold beside their weights (a Lightning callback's score)."""

    class Shell:
        def __init__(self, *_):
            pass

        def __setstate__(self, _):
            pass

    names = (
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy", "dtype"),
    )
    return [type(name, (Shell,), {"__module__": module}) for module, name in names]


def _without_wrapper(named: dict) -> dict:
    """The names without `module.`, which distributed training puts before each."""
    wrapped = named and all(name.startswith("module.") for name in named)
    return {name.removeprefix("module."): value for name, value in named.items()} if wrapped else named
