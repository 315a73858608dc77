"""The style file: one small .safetensors with what training changed in a student for a style, to be laid on that student.

LoRA (arXiv 2106.09685) under the names that a student file has for it; the metadata are ModelSpec keys and the project's own,
`avdm2.*`, among them `avdm2.style_version`, which no student file has.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .recognise import FileFormatError, write_tensors
from .student import Hash, Positive, Student, lora_shapes, meta_unet, tensors_hash

STYLE_VERSION = 1

_OURS, _MODELSPEC = "avdm2.", "modelspec."
_IN_MODELSPEC = ("title", "date", "license")  # fields that ModelSpec has a key for


class StyleFileError(ValueError):
    """A style file that cannot be read, written or used; the message is one sentence that names it."""


@validated_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class StyleInfo:
    """What a style file says of its style. pydantic's ValidationError, a ValueError, for values that cannot be."""

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

    def to_metadata(self) -> dict[str, str]:
        """The metadata of a .safetensors."""
        texts = {key: str(value) for key, value in asdict(self).items()}
        spec = {key: texts.pop(key) for key in _IN_MODELSPEC} | {
            "sai_model_spec": "1.0.0",
            "architecture": "animatediff/lora",
            "implementation": "diffusers",
            "usage_hint": f"For the student {self.student_name} alone, in AVDM2 Style Transfer.",
        }
        return {_MODELSPEC + key: text for key, text in spec.items()} | {_OURS + key: text for key, text in texts.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], name: str | Path) -> "StyleInfo":
        """The inverse of `to_metadata`, for the file `name`. StyleFileError for anything that is not a style's."""
        version = metadata.get(_OURS + "style_version")
        if version is None:
            raise StyleFileError(f"Expected a style file at {name}, found tensors of another kind; choose a style.")
        if version.isdecimal() and int(version) > STYLE_VERSION:
            raise StyleFileError(
                f"Expected a style file of version {STYLE_VERSION} or older in {name}, found {version}; update this project."
            )
        keys = {_MODELSPEC + key if key in _IN_MODELSPEC else _OURS + key: key for key in cls.__dataclass_fields__}
        try:
            return cls(**{key: metadata[text] for text, key in keys.items() if text in metadata})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise StyleFileError(
                f"Expected a whole style file at {name}, found its {key} wrong ({first['msg']}); train or copy it again."
            ) from error


@dataclass(frozen=True)
class StyleFile:
    """A style as `read_style` found it: its tensors by name, and the file's name for messages."""

    info: StyleInfo
    tensors: dict[str, Tensor] = field(repr=False)
    name: str = "the style"


def is_style(path: Path) -> bool:
    """True for a readable .safetensors that says it is a style file."""
    try:
        with safe_open(path, framework="pt") as file:
            return _OURS + "style_version" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def student_hash(student: Student) -> str:
    """`tensors_hash` of what a student file holds, its position encodings left out: what ties a style to its student."""
    return tensors_hash({name: tensor for name, tensor in student.tensors.items() if not name.endswith(".pe")})


def write_style(path: Path, tensors: Mapping[str, Tensor], info: StyleInfo) -> None:
    """Writes a style file, whole or not at all.

    `tensors` are `<module>.lora_A.weight` (rank, in, ...) and `<module>.lora_B.weight` (out, rank, ...) of layers of the student's
    video UNet. StyleFileError for tensors that are no such pairs, no such folder, no right to write or no room.
    """
    _check_pairs(tensors, info, path)
    try:
        write_tensors(path, tensors, info.to_metadata())
    except FileFormatError as error:
        raise StyleFileError(str(error)) from error


def read_style(path: Path) -> StyleFile:
    """Reads a style file, tensors in their own dtypes on the CPU.

    StyleFileError for a file that is missing, truncated, no style's, of a newer version or whose tensors are no LoRA.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise StyleFileError(f"Expected a style file at {path}, found {found}; check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            info = StyleInfo.from_metadata(file.metadata() or {}, path)
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise StyleFileError(
            f"Expected a readable style file at {path}, found it truncated, damaged or of another kind ({error}); "
            "copy or train it again."
        ) from error
    _check_pairs(tensors, info, path)
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


def lora_products(tensors: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """scale B A of each pair `<module>.lora_A.weight`, `<module>.lora_B.weight`, float32, under `<module>.weight`."""
    change = {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            up = tensors[f"{module}.lora_B.weight"].float()  # of a convolution 1 x 1, so its product is a matrix's
            product = up.flatten(1) @ down.float().flatten(1)
            change[f"{module}.weight"] = scale * product.reshape(len(up), *down.shape[1:])
    return change


def _check_pairs(tensors: Mapping[str, Tensor], info: StyleInfo, name: str | Path) -> None:
    """StyleFileError unless the tensors are LoRA of the rank that `info` says, two for each layer."""
    modules = {key.rpartition(".lora_")[0] for key in tensors}
    keys = {f"{module}.lora_{half}.weight": axis for module in modules for half, axis in (("A", 0), ("B", 1))}
    wrong = list(keys.keys() ^ tensors.keys())
    wrong += [key for key, t in tensors.items() if key in keys and not _is_lora(t, keys[key], info.lora_rank)]
    if wrong or not tensors:
        found = f"{len(wrong)} tensors missing or of another kind (such as {min(wrong)})" if wrong else "none"
        raise StyleFileError(f"Expected LoRA of rank {info.lora_rank} in {name}, found {found}; copy or train it again.")


def _is_lora(tensor: Tensor, axis: int, rank: int) -> bool:
    return tensor.is_floating_point() and tensor.ndim >= 2 and tensor.shape[axis] == rank and bool(torch.isfinite(tensor).all())
