"""The tensors in a pickle of PyTorch, read in a way that runs none of its code; torch is imported when one is read."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .sentences import FileFormatError, one_line, reason

if TYPE_CHECKING:
    from torch import Tensor

MOST_TENSORS = 50_000  # in a file; the largest models have some thousand
LONGEST_NAME = 256  # characters of a tensor's name; real ones have some hundred

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_MOST_PICKLED = 10_000  # tensors in a pickle, which takes 0.2 ms for each every time that it is read
_PROGRAM_LIMIT = 16 * 2**20  # bytes of the pickle itself, beside its tensors; a checkpoint of SD1.5 has half a million
# torch lets them run, no file of weights has them, and they take as much memory as a number in the file says.
_ROOM_FROM_A_NUMBER = re.compile(rb"c(?:__builtin__|builtins)\n(bytearray)\n|ctorch(?:\.\w+)*\n(\w+Tensor)\n")
_WRAPPERS = ("state_dict", "motion_module", "model", "module")  # what training code puts the weights under


def damaged(path: Path, cause: object) -> FileFormatError:
    """The error for a file that is not whole; `cause` in a few words or as it was raised."""
    words = reason(cause) if isinstance(cause, BaseException) else one_line(cause).rstrip(".")
    return FileFormatError(
        f"Expected a whole model file at {path}, found it truncated or damaged ({words}); download or copy it again."
    )


def needs_code(path: Path, what: str) -> FileFormatError:
    """The error for a pickle that would run code."""
    return FileFormatError(
        f"Expected a file of weights alone at {path}, found a pickle that needs code to run{what}; choose its .safetensors version."
    )


def unpickled(path: Path, device: str) -> "dict[str, Tensor]":
    """The tensors in a pickled dict and in the dicts right below it (names joined by a dot), on "cpu" or "meta".

    Of a dict that holds the weights under a wrapper's name, as training code writes it, those weights alone. FileFormatError for
    anything else, for code to be run, and for a file that asks for more memory than it has bytes.
    """
    import pickle

    import torch

    with path.open("rb") as file:
        head = file.read(4)
    if not head.startswith((_ZIP, _PICKLE)):
        raise damaged(path, "no pickle")
    _require_modest_program(path, zipped=head.startswith(_ZIP))
    others = (
        torch.serialization.get_safe_globals()
    )  # ComfyUI's among them, whose names for the same things are functions that run
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(_shells()):
            saved = torch.load(path, map_location=device, weights_only=True, mmap=head == _ZIP)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        raise needs_code(path, f" ({wanted[1]})" if wanted else "") from error
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise damaged(path, error) from error
    finally:
        torch.serialization.add_safe_globals(others)
    tensors = _named(saved, path)
    for name, tensor in tensors.items():
        _require_own_bytes(name, tensor, path, device)
    return tensors


def _require_modest_program(path: Path, zipped: bool) -> None:
    """FileFormatError for a pickle that makes more of itself than its bytes: a compressed one, or one that asks for bare memory."""
    size = path.stat().st_size
    if zipped:
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
                programs = [entry for entry in entries if entry.filename.endswith(".pkl")]
                announced = sum(entry.file_size for entry in entries)
                largest = max((entry.file_size for entry in programs), default=0)
                if announced > size or largest > _PROGRAM_LIMIT:
                    raise FileFormatError(
                        f"Expected a file of weights at {path}, found a compressed one that unpacks to {announced} bytes, {largest} of "
                        "them no weights; choose its .safetensors version."
                    )
                texts = [archive.read(entry) for entry in programs]
        except FileFormatError:
            raise
        except Exception as error:  # a damaged zip raises whatever its bytes lead to
            raise damaged(path, error) from error
    else:
        with path.open("rb") as file:
            texts = [file.read(_PROGRAM_LIMIT)]
    for text in texts:
        # Each tensor fetches its numbers by the operation Q; names have hardly any such letter.
        if (count := text.count(b"Q")) > _MOST_PICKLED:
            raise FileFormatError(
                f"Expected a model file at {path}, found a pickle of some {count} tensors, more than any has; choose another file."
            )
        if found := _ROOM_FROM_A_NUMBER.search(text):
            raise needs_code(path, f" ({(found[1] or found[2]).decode()})")


def _named(saved: object, path: Path) -> "dict[str, Tensor]":
    import torch

    if not isinstance(saved, Mapping):
        raise FileFormatError(f"Expected tensors by name at {path}, found a {type(saved).__name__}; choose another file.")
    for _ in _WRAPPERS:
        inner = next((saved[key] for key in _WRAPPERS if isinstance(saved.get(key), Mapping)), None)
        if inner is None:
            break
        saved = inner
    within = [(key, inner) for key, inner in saved.items() if isinstance(key, str) and isinstance(inner, Mapping)]
    count = len(saved) + sum(len(inner) for _, inner in within)
    if count > MOST_TENSORS:
        raise FileFormatError(
            f"Expected a model file at {path}, found {count} entries, more than any has; choose another file."
        )
    flat = {key: value for key, value in saved.items() if isinstance(key, str)}
    for key, inner in within:
        flat |= {f"{key}.{name}": tensor for name, tensor in inner.items() if isinstance(name, str)}
    return {key: value for key, value in flat.items() if isinstance(value, torch.Tensor)}


def _require_own_bytes(name: str, tensor: "Tensor", path: Path, device: str) -> None:
    """FileFormatError unless it is a plain tensor on the device that was asked for, with a number in the file for each of its own."""
    import torch

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_nested and tensor.layout == torch.strided
    if not plain or tensor.is_quantized or tensor.device.type != device:
        raise FileFormatError(
            f"Expected plain tensors at {path}, found another kind of tensor under {one_line(name)}; choose its .safetensors version."
        )
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > held or held > path.stat().st_size:
        raise damaged(path, f"a tensor of shape {tuple(tensor.shape)} that has not as many bytes")


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
