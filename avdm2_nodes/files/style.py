"""The style file: one small .safetensors with what training changed in a student for a style, to be laid on that student.

LoRA (arXiv 2106.09685) under the names that a student file has for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass as validated_dataclass
from torch import Tensor

from .architecture import meta_unet
from .described import STRICT, Description, Hash, Positive, is_described, read_described, write_described
from .hashes import tensors_hash
from .lora import lora_products, lora_shapes
from .sentences import FileError
from .student import Student
from .weights import is_finite

STYLE_VERSION = 1


class StyleFileError(FileError):
    """A style file that cannot be read, written or used; the message is one sentence that names it."""


@validated_dataclass(frozen=True, kw_only=True, config=STRICT)
class StyleInfo(Description):
    """What a style file says of its style. pydantic's ValidationError, a ValueError, for values that cannot be."""

    KIND = "style"
    ERROR = StyleFileError
    REMEDY = "copy or train it again"
    ARCHITECTURE = "animatediff/lora"
    VERSION_FIELD, VERSION = "style_version", STYLE_VERSION

    name: str  # of the style, for people
    hash: Hash  # `weights_hash` of the image UNet whose style it is
    student_name: str  # of the student that it was trained on
    student_hash: Hash  # its `student_hash`
    lora_rank: Positive
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    updates: Annotated[int, Field(ge=0)]  # of the student, for this style
    training_config: str  # YAML
    title: str
    date: str  # ISO 8601
    license: str
    style_version: Annotated[int, Field(ge=1, le=STYLE_VERSION)] = STYLE_VERSION

    def usage_hint(self) -> str:
        return f"For the student {self.student_name} alone, in AVDM2 Style Transfer."


@dataclass(frozen=True)
class StyleFile:
    """A style as `read_style` found it: its tensors by name, and the file's name for messages."""

    info: StyleInfo
    tensors: dict[str, Tensor] = field(repr=False)
    name: str = "the style"


def is_style(path: Path) -> bool:
    """True for a readable .safetensors that says it is a style file."""
    return is_described(path, StyleInfo)


def student_hash(student: Student) -> str:
    """`tensors_hash` of what a student file holds, its position encodings left out: what ties a style to its student."""
    return tensors_hash({name: tensor for name, tensor in student.tensors.items() if not name.endswith(".pe")})


def write_style(path: Path, tensors: Mapping[str, Tensor], info: StyleInfo) -> None:
    """Writes a style file, whole or not at all.

    `tensors` are `lora_pairs` of layers of the student's video UNet. StyleFileError for others, another suffix, no such folder, no
    right to write or no room.
    """
    _require_pairs(tensors, info, path)
    write_described(path, tensors, info)


def read_style(path: Path) -> StyleFile:
    """The style in a file, tensors as there, on the CPU.

    StyleFileError for a file that is missing, truncated, no style's, of a newer version or whose tensors are no LoRA.
    """
    info, tensors = read_described(path, StyleInfo)
    _require_pairs(tensors, info, path)
    return StyleFile(info, tensors, str(path))


def require_student(style: StyleFile, student: Student) -> None:
    """StyleFileError unless the style was trained on this student."""
    found = student_hash(student)
    if found != style.info.student_hash:
        raise StyleFileError(
            f"Expected the student {style.info.student_name} (hash {style.info.student_hash[:12]}) for the style {style.name}, found "
            f"{student.name} (hash {found[:12]}); load the student that it was trained on, or train the style for this one."
        )
    weights = {key: p.shape for key, p in meta_unet(student.info, student.name).named_parameters()}
    fitting = lora_shapes(weights, style.tensors, style.info.lora_rank)
    wrong = [key for key, tensor in style.tensors.items() if tensor.shape != fitting.get(key)]
    if wrong:
        raise StyleFileError(
            f"Expected LoRA of the student's layers in {style.name}, found {len(wrong)} tensors of others (such as {min(wrong)}); "
            "copy or train it again."
        )


def lora_change(style: StyleFile) -> dict[str, Tensor]:
    """What the style adds to the student's weights at strength 1, by their names: alpha / rank B A, float32."""
    return lora_products(style.tensors, style.info.lora_alpha / style.info.lora_rank)


def _require_pairs(tensors: Mapping[str, Tensor], info: StyleInfo, name: str | Path) -> None:
    """StyleFileError unless the tensors are LoRA of the rank that `info` says, two for each layer."""
    modules = {key.rpartition(".lora_")[0] for key in tensors}
    keys = {f"{module}.lora_{half}.weight": axis for module in modules for half, axis in (("A", 0), ("B", 1))}
    wrong = list(keys.keys() ^ tensors.keys())
    wrong += [key for key, t in tensors.items() if key in keys and not _is_lora(t, keys[key], info.lora_rank)]
    if wrong or not tensors:
        found = f"{len(wrong)} tensors missing or of another kind (such as {min(wrong)})" if wrong else "none"
        raise StyleFileError(f"Expected LoRA of rank {info.lora_rank} in {name}, found {found}; copy or train it again.")


def _is_lora(tensor: Tensor, axis: int, rank: int) -> bool:
    return tensor.is_floating_point() and tensor.ndim >= 2 and tensor.shape[axis] == rank and is_finite(tensor)
