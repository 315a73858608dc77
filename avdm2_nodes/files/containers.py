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

from .paths import require_file
from .pickles import LONGEST_NAME, MOST_TENSORS, damaged, unpickled
from .sentences import FileFormatError, is_text, one_line, reason, told

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
SAFETENSORS = (SUFFIX, ".sft")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")

_HEADER_LIMIT = 16 * 2**20  # bytes of a .safetensors' header; the largest models' with all their notes have two million


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
    with told(path, "a model file"):
        _require_container(path)
        if path.suffix.lower() in SAFETENSORS:
            shapes, metadata = _safetensors_header(path)
            return Layout(_bare(shapes, metadata, path), metadata)
        return Layout({name: tuple(tensor.shape) for name, tensor in _bare(unpickled(path, "meta"), {}, path).items()})


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """Every tensor of a file by name, in its own dtype, on the CPU. FileFormatError as `read_layout`.

    The tensors may lie in the file itself, mapped into memory: copy what is to outlive it. The wrappers that training code puts
    around the names are taken off, and a tensor that was left out because another is the same one is put back.
    """
    path = Path(path)
    with told(path, "a model file"):
        _require_container(path)
        if path.suffix.lower() not in SAFETENSORS:
            return _bare(unpickled(path, "cpu"), {}, path)
        _, metadata = _safetensors_header(path)  # its sentences are better than the library's
        from safetensors import SafetensorError
        from safetensors.torch import load, load_file

        try:
            # The library opens no file whose name is not UTF-8, which other systems write.
            tensors = load_file(path) if is_text(str(path)) else load(path.read_bytes())
            return _bare(tensors, metadata, path)
        except SafetensorError as error:
            raise damaged(path, error) from error


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
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: of a name that no file can have
        raise FileFormatError(
            f"Expected room and the right to write {path}, found: {reason(error)}; name another place or make room."
        ) from error
    finally:
        with contextlib.suppress(OSError, ValueError):
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
    require_file(path)
    if path.suffix.lower() not in (*SAFETENSORS, *PICKLES):
        raise FileFormatError(f"Expected a model file ({suffixes}), found {path}; choose a file of these kinds.")
    with path.open("rb") as file:
        head = file.read(512)
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


def _safetensors_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and metadata from the header: 8 bytes of length, JSON, then the tensors one after another."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size < 8:
            raise damaged(path, f"{size} bytes")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _HEADER_LIMIT):
            raise damaged(path, f"it announces a header of {length} bytes and has {size} in all")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        entries = {name: _shape_and_end(entry) for name, entry in header.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that are no texts")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(path, f"its header: {reason(error)}") from error
    announced = 8 + length + max((end for _, end in entries.values()), default=0)
    if announced < size:
        raise FileFormatError(
            f"Expected a model file at {path}, found {size - announced} bytes behind the last of its tensors, which other programs "
            "refuse too; copy it again, or cut them off."
        )
    if announced > size:
        raise damaged(path, f"{size} bytes in place of {announced}")
    return {name: shape for name, (shape, _) in entries.items()}, metadata


_BITS = re.compile(r"\d+")  # of F32, BF16, I64, F8_E4M3: a number's bits, the first digits in its name
_MOST_AXES = 8


def _shape_and_end(entry: dict) -> tuple[tuple[int, ...], int]:
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)) or len(shape) > _MOST_AXES:
        raise ValueError(f"sizes {one_line(shape)}, {start}, {end}")
    bits = _BITS.search(entry["dtype"])
    if bits and int(bits[0][:4]) >= 8 and math.prod(shape) * int(bits[0][:4]) != 8 * (end - start):
        raise ValueError(f"a tensor of shape {shape} in {end - start} bytes")
    return tuple(shape), end


def _bare(named: dict, metadata: Mapping[str, str], path: Path) -> dict:
    """Tensors or shapes by the names that the network gave them; FileFormatError for more or longer names than a model has."""
    longest = max(named, key=len, default="")
    if len(named) > MOST_TENSORS or len(longest) > LONGEST_NAME:
        found = f"{len(named)} tensors" if len(named) > MOST_TENSORS else f"a tensor with a name of {len(longest)} letters"
        raise FileFormatError(f"Expected a model file at {path}, found {found}, more than any has; choose another file.")
    # safetensors' save_model writes tensors that are one and the same once, and notes the others' names in the metadata.
    named = named | {name: named[kept] for name, kept in metadata.items() if kept in named and name not in named}
    while prefix := next((p for p in _PREFIXES if named and all(name.startswith(p) for name in named)), None):
        if prefix in _OF_MOTION and not any(".motion_modules." in name for name in named):
            break
        named = {name.removeprefix(prefix): value for name, value in named.items()}
    return named


_OF_MOTION = (
    "unet.",
    "model.",
    "motion_module.",
    "state_dict.",
)  # wrappers around motion modules; of other models a part's name
_PREFIXES = (
    "module.",
    "_orig_mod.",
    *_OF_MOTION,
)  # which distributed training, compiling and training code put before each name
