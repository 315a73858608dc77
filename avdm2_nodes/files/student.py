"""The student file: one .safetensors with a student's tensors and, in its metadata, all that is needed to run it.

Tensors have the names of diffusers' UNetMotionModel; the metadata are ModelSpec keys (Stability-AI/ModelSpec, version 1.0.0)
and the project's own, `avdm2.*`. A student holds every weight of its UNet ("all"), the motion modules ("motion"), or these and
LoRA (arXiv 2106.09685) on the spatial layers ("motion+lora"); the latter two need the base whose hash they name, or any of its
architecture where they were made for any.
"""

import contextlib
import hashlib
import inspect
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path, PureWindowsPath
from typing import Annotated, Literal

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass as validated_dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..diffusion.samplers import Chain
from ..diffusion.schedules import TRAIN_TIMESTEPS, lcm_timesteps, trailing_timesteps
from ..diffusion.unets import without_waste
from .recognise import read_layout, recognise

FORMAT_VERSION = 1
SUFFIX = ".safetensors"

_OURS, _MODELSPEC = "avdm2.", "modelspec."
_IN_MODELSPEC = ("title", "date", "license")  # fields that ModelSpec has a key for
_IN_JSON = ("timesteps", "unet_config", "styles")  # fields whose text is JSON
_CONFIG_KEYS = frozenset(inspect.signature(UNetMotionModel.__init__).parameters) - {"self"}
_MOTION = "motion_modules"
ANY_BASE = "any"  # in place of a hash: the student runs on each base of its architecture
_SAMPLERS = {"renoise": "lcm", "euler": "euler", "lcm": "lcm"}  # ComfyUI's names

Positive = Annotated[int, Field(ge=1)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class StudentFileError(ValueError):
    """A student file that cannot be read, written or used; the message is one sentence that names it."""


@validated_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class StyleUse:
    """A style in a student's weights: another image model's, put in place of the base's or learnt, and how much of it."""

    name: str
    hash: Hash  # `weights_hash` of its image UNet
    mode: Literal["transplant", "fine-tuned"]
    strength: Annotated[float, Field(allow_inf_nan=False)]


@validated_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class StudentInfo:
    """What a student file says of its student. pydantic's ValidationError, a ValueError, for values that cannot be."""

    holds: Literal["all", "motion", "motion+lora"]
    timesteps: tuple[Annotated[int, Field(ge=0, lt=TRAIN_TIMESTEPS)], ...]  # those it was trained at, descending
    frames: Positive  # of the clips it was trained on
    height: Positive  # likewise, in pixels
    width: Positive
    unet_config: dict  # as `unet_config` gives it
    base_name: str
    base_hash: Hash | Literal["any"]  # `weights_hash` of the base's image UNet, or ANY_BASE
    score_name: str | None = None  # the 2D backbone of score distribution matching (the style), if there was one
    score_hash: Hash | None = None
    styles: tuple[StyleUse, ...] = ()  # in its weights, in the order in which they were added
    lora_rank: Positive | None = None
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    updates: Annotated[int, Field(ge=0)]  # of the student, until this file
    training_config: str  # YAML
    title: str
    date: str  # ISO 8601
    license: str
    chain: Chain = "renoise"  # of `sample_student`
    beta_schedule: Literal["linear"] = "linear"  # diffusers' name
    prediction_type: Literal["epsilon"] = "epsilon"
    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)] = FORMAT_VERSION

    @model_validator(mode="after")
    def _agree(self):
        if not self.timesteps or any(a <= b for a, b in pairwise(self.timesteps)):
            raise ValueError(f"expected timesteps in descending order, found {list(self.timesteps)}")
        if any((value is not None) != (self.holds == "motion+lora") for value in (self.lora_rank, self.lora_alpha)):
            raise ValueError(
                f"expected a LoRA rank and alpha with motion+lora and not else, "
                f"found rank {self.lora_rank} and alpha {self.lora_alpha} with {self.holds}"
            )
        return self

    def to_metadata(self) -> dict[str, str]:
        """The metadata of a .safetensors; what is None or nothing is left out."""
        said = {key: value for key, value in asdict(self).items() if value not in (None, ())}
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in said.items()}
        spec = {key: texts.pop(key) for key in _IN_MODELSPEC} | {
            "sai_model_spec": "1.0.0",
            "architecture": "animatediff",
            "implementation": "diffusers",
            "usage_hint": (
                f"Timesteps {', '.join(map(str, self.timesteps))} without guidance (cfg 1), {self.frames} frames of "
                f"{self.width}x{self.height}. In ComfyUI with AnimateDiff-Evolved: beta schedule sqrt_linear (AnimateDiff), "
                f"sampler {_SAMPLERS[self.chain]}."
            ),
        }
        return {_MODELSPEC + key: text for key, text in spec.items()} | {_OURS + key: text for key, text in texts.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], name: str | Path) -> "StudentInfo":
        """The inverse of `to_metadata`, for the file `name`. StudentFileError for anything that is not a student's."""
        version = metadata.get(_OURS + "format_version")
        if version is None:
            raise StudentFileError(f"Expected a student file at {name}, found tensors of another kind; choose a student.")
        if version.isdecimal() and int(version) > FORMAT_VERSION:
            raise StudentFileError(
                f"Expected a student file of format {FORMAT_VERSION} or older in {name}, found {version}; update this project."
            )
        keys = {_MODELSPEC + key: key for key in _IN_MODELSPEC}
        keys |= {_OURS + key: key for key in cls.__dataclass_fields__ if key not in _IN_MODELSPEC}
        said = {key: metadata[text] for text, key in keys.items() if text in metadata}
        try:
            return cls(**said | {key: json.loads(said[key]) for key in _IN_JSON if key in said})
        except ValidationError as error:
            raise StudentFileError(
                f"Expected a whole student file at {name}, found {_problem(error)}; export the student again."
            ) from error
        except (ValueError, RecursionError) as error:  # of JSON
            raise StudentFileError(
                f"Expected JSON in {' and '.join(_IN_JSON)} of {name}, found: {error}; export the student again."
            ) from error


@dataclass(frozen=True)
class Student:
    """A student as `read_student` found it: its tensors by name, and the file's name for messages."""

    info: StudentInfo
    tensors: dict[str, Tensor] = field(repr=False)
    name: str = "the student"


def student_path(folder: Path, name: str) -> Path:
    """`name` (which may have subfolders) in `folder`, with the suffix. StudentFileError for a name that leaves the folder.

    Read as Windows does, whose separators and drives are a superset: a name is refused on every system or on none.
    """
    parts = PureWindowsPath(name)
    if parts.anchor or ".." in parts.parts or not parts.name or any(c in '<>:"|?*' or ord(c) < 32 for c in name):
        raise StudentFileError(
            f"Expected the name of a student below its folder, found {name!r}; leave out .., drives, roots and signs."
        )
    path = Path(folder).joinpath(*parts.parts)
    return path if path.name.endswith(SUFFIX) else path.with_name(path.name + SUFFIX)


def student_timesteps(own: Sequence[int], steps: int, chain: Chain = "renoise") -> list[int]:
    """The timesteps of a student in `steps` evaluations: its own where it has as many, else evenly spaced at the trailing ends.

    ValueError for a number outside 1..1000, of a latent consistency model 1..100.
    """
    if steps == len(own):
        return list(own)
    return lcm_timesteps(steps) if chain == "lcm" else trailing_timesteps(steps)


def unet_config(unet: UNetMotionModel) -> dict:
    """What builds the UNet again, `UNetMotionModel(**config)`, as plain JSON values."""
    return json.loads(json.dumps({key: value for key, value in unet.config.items() if key in _CONFIG_KEYS}))


def weights_hash(module: nn.Module) -> str:
    """`tensors_hash` of a module's parameters; position encodings and other buffers are derived and do not count."""
    return tensors_hash(dict(module.named_parameters()))


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: names, shapes and values rounded to float16, in the order of the names.

    The same for every container and for float32 and float16 saves of the same weights.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0]):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        for chunk in tensor.detach().reshape(-1).split(2**22):
            digest.update(chunk.to(torch.float16).cpu().numpy().astype("<f2", copy=False))
    return digest.hexdigest()


def write_student(path: Path, tensors: Mapping[str, Tensor], info: StudentInfo) -> None:
    """Writes a student file, whole or not at all.

    `tensors` have the names of UNetMotionModel's parameters (all, or those in motion modules) and, with motion+lora,
    `<module>.lora_A.weight` (rank, in, ...) and `<module>.lora_B.weight` (out, rank, ...) of spatial layers. The motion
    modules' `pos_embed.pe` may be among them; without them a reader takes diffusers' own. StudentFileError for tensors that
    do not fit `info`, no such folder, no right to write or no room.
    """
    path = Path(path)
    _check_tensors(info, tensors, path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, temporary, info.to_metadata())
        temporary.chmod(mode)  # safetensors leaves a file that only its owner can read
        with temporary.open("rb+") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or error
        raise StudentFileError(
            f"Expected room and the right to write {path}, found: {cause}; name another place or make room."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_student(path: Path) -> Student:
    """Reads a student file, tensors in their own dtypes on the CPU.

    StudentFileError for a file that is missing, truncated, no student's, of a newer format, or whose tensors are not those of
    the UNet that it describes.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise StudentFileError(f"Expected a student file at {path}, found {found}; check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _OURS + "format_version" not in metadata:
                found = recognise(read_layout(path)).phrase
                raise StudentFileError(f"Expected a student file at {path}, found {found}; choose a student.")
            info = StudentInfo.from_metadata(metadata, path)
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise StudentFileError(
            f"Expected a readable student file at {path}, found it truncated, damaged or of another kind ({error}); "
            "copy or export it again."
        ) from error
    _check_tensors(info, tensors, path)
    return Student(info, tensors, str(path))


def require_base(student: Student, image_unet: UNet2DConditionModel, base_hash: str | None = None) -> None:
    """StudentFileError unless the student runs on this base.

    One that holds all its weights needs the architecture only (which may lie on the meta device), any other the very weights;
    `base_hash` is their `weights_hash`, computed where it is not given.
    """
    _check_architecture(student, image_unet)
    info = student.info
    if info.holds == "all" or info.base_hash == ANY_BASE:
        return
    found = base_hash or weights_hash(image_unet)
    if found != info.base_hash:
        raise StudentFileError(
            f"Expected the base {info.base_name} (hash {info.base_hash[:12]}) beside {student.name}, which holds "
            f"{info.holds} only, found one of hash {found[:12]}; load the base that it was made for."
        )


def student_unet(student: Student, image_unet: UNet2DConditionModel | None = None) -> UNetMotionModel:
    """The student's video UNet: float32, on the CPU, frozen, in evaluation mode, LoRA layers merged into the weights.

    `image_unet` is the base, of any floating dtype; a student that holds all its weights does without, and is only checked
    to be of the base's architecture. StudentFileError for a base of another architecture or, where the student is
    made of its weights, of another hash, or none.
    """
    info = student.info
    if image_unet is not None:
        require_base(student, image_unet)
    elif info.holds != "all":
        raise StudentFileError(
            f"Expected the base {info.base_name} beside {student.name}, which holds {info.holds} only, found none; load it."
        )
    weights = student.tensors
    if info.holds != "all":
        weights = _merged(dict(image_unet.named_parameters()), weights, info)
    unet = meta_unet(info, student.name)  # no weight is drawn at random first, nor held twice
    weights = {name: w.detach().to("cpu", torch.float32, copy=True) for name, w in {**weights, **positions(student)}.items()}
    unet.load_state_dict(weights, assign=True)
    return without_waste(unet).eval().requires_grad_(False)


def positions(student: Student) -> dict[str, Tensor]:
    """The position encodings of the student's motion modules, by name: the file's, or diffusers' own where it has none."""
    found = {}
    for name, module in meta_unet(student.info, student.name).named_modules():
        if isinstance(module, SinusoidalPositionalEmbedding):
            _, length, width = module.pe.shape
            key = f"{name}.pe"
            found[key] = student.tensors[key] if key in student.tensors else SinusoidalPositionalEmbedding(width, length).pe
    return found


# ---- the checks ----


def _problem(error: ValidationError) -> str:
    """The first problem of several, in words."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"no {key} in its metadata"
    words = first["msg"].removeprefix("Value error, ")
    return f"{key} {str(first['input'])[:80]!r} in its metadata ({words})" if key else words


def meta_unet(info: StudentInfo, name: str | Path) -> UNetMotionModel:
    """The student's UNet without memory, for its names and shapes."""
    try:
        with torch.device("meta"):
            return UNetMotionModel(**info.unet_config)
    except Exception as error:  # diffusers raises a dozen kinds for one cause
        raise StudentFileError(
            f"Expected the settings of a UNetMotionModel in {name}, found some that build none ({str(error).strip()[:200]}); "
            "it is of another architecture."
        ) from error


def lora_shapes(weights: Mapping[str, torch.Size], keys, rank: int) -> dict[str, tuple]:
    """Name and shape of both LoRA tensors of each layer with a weight matrix that a key speaks of."""
    shapes = {}
    for module in {key.rpartition(".lora_")[0] for key in keys}:
        weight = weights.get(f"{module}.weight", ())
        if len(weight) >= 2:
            shapes[f"{module}.lora_A.weight"] = (rank, *weight[1:])
            shapes[f"{module}.lora_B.weight"] = (weight[0], rank, *(1 for _ in weight[2:]))
    return shapes


def _check_tensors(info: StudentInfo, tensors: Mapping[str, Tensor], name: str | Path) -> None:
    """StudentFileError unless the tensors are those that `info` announces, in names and shapes."""
    unet = meta_unet(info, name)
    parameters = {key: p.shape for key, p in unet.named_parameters()}
    buffers = {key: b.shape for key, b in unet.named_buffers()}
    expected = {key: shape for key, shape in parameters.items() if info.holds == "all" or _MOTION in key}
    if info.holds == "motion+lora":
        spatial = {key: shape for key, shape in parameters.items() if _MOTION not in key}
        lora = lora_shapes(spatial, tensors, info.lora_rank)
        if not lora:
            raise StudentFileError(f"Expected LoRA tensors of spatial layers in {name}, found none; it holds motion alone.")
        expected |= lora
    shapes = expected | buffers
    problems = {
        "missing": [key for key in expected if key not in tensors],
        "unexpected": [key for key in tensors if key not in shapes],
        "of another shape or kind": [
            key for key, t in tensors.items() if key in shapes and (t.shape != shapes[key] or not t.is_floating_point())
        ],
    }
    found = [f"{len(keys)} {kind} (such as {min(keys)})" for kind, keys in problems.items() if keys]
    if found:
        widths = info.unet_config.get("block_out_channels")
        raise StudentFileError(
            f"Expected in {name} the tensors ({info.holds}) of a video UNet of widths {widths}, found {', '.join(found)}; "
            "it is damaged or of another architecture."
        )


def _plain(value):
    """A setting that every block shares may be written once or once a block."""
    value = json.loads(json.dumps(value))
    return value[0] if isinstance(value, list) and value and all(v == value[0] for v in value) else value


def _check_architecture(student: Student, image_unet: UNet2DConditionModel) -> None:
    """StudentFileError unless the student's spatial layers are built as the base's."""
    with torch.device("meta"):
        base = unet_config(UNetMotionModel.from_unet2d(image_unet, load_weights=False))
    config = student.info.unet_config
    for key, mine in config.items():
        # sample_size is a hint for pipelines; the motion modules are the student's own.
        of_the_base = key in base and key != "sample_size" and "motion" not in key and "temporal" not in key
        if of_the_base and _plain(mine) != _plain(base[key]):
            raise StudentFileError(
                f"Expected for {student.name} a base with {key} {mine}, found {base[key]}; "
                f"it is of another architecture, load the base {student.info.base_name}."
            )
    parameters = meta_unet(student.info, student.name).named_parameters()
    mine = {key: p.shape for key, p in parameters if _MOTION not in key}
    theirs = {key: p.shape for key, p in image_unet.named_parameters()}
    different = [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]
    if different:
        raise StudentFileError(
            f"Expected for {student.name} a base of its architecture, found {len(different)} layers unlike its own (such as "
            f"{min(different)}); load the base {student.info.base_name}."
        )


def _merged(base: Mapping[str, Tensor], tensors: Mapping[str, Tensor], info: StudentInfo) -> dict[str, Tensor]:
    """The base's weights with the student's, LoRA layers merged: W + alpha / rank * B A, in float32."""
    weights = dict(base)
    for key, tensor in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            weight = weights[f"{module}.weight"].detach().float().cpu()
            up = tensors[f"{module}.lora_B.weight"].float().flatten(1)  # of a convolution 1 x 1, so its product is a matrix's
            delta = (up @ tensor.float().flatten(1)).reshape(weight.shape)
            weights[f"{module}.weight"] = weight + info.lora_alpha / info.lora_rank * delta
        elif not key.endswith(".lora_B.weight"):
            weights[key] = tensor
    return weights
