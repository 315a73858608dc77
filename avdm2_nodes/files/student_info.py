"""What a student file says of its student, in its metadata."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass as validated_dataclass

from ..diffusion.samplers import Chain
from ..diffusion.schedules import TRAIN_TIMESTEPS
from .described import STRICT, Description, Hash, Positive
from .sentences import FileError

FORMAT_VERSION = 1
MOST_FRAMES, LONGEST_SIDE = 1024, 8192  # of a clip; what no one can sample, no student was trained at
_POSITIONS = 32  # diffusers' own number
ANY_BASE = "any"  # in place of a hash: the student runs on each base of its architecture

_SAMPLERS = {"renoise": "lcm", "euler": "euler", "lcm": "lcm"}  # ComfyUI's names


class StudentFileError(FileError):
    """A student file that cannot be read, written or used; the message is one sentence that names it."""


@validated_dataclass(frozen=True, kw_only=True, config=STRICT)
class StyleUse:
    """A style in a student's weights: another image model's, put in place of the base's or learnt, and how much of it."""

    name: str
    hash: Hash  # `weights_hash` of its image UNet
    mode: Literal["transplant", "fine-tuned"]
    strength: Annotated[float, Field(allow_inf_nan=False)]


@validated_dataclass(frozen=True, kw_only=True, config=STRICT)
class StudentInfo(Description):
    """What a student file says of its student. pydantic's ValidationError, a ValueError, for values that cannot be."""

    KIND = "student"
    ERROR = StudentFileError
    REMEDY = "copy or export it again"
    ARCHITECTURE = "animatediff"
    VERSION_FIELD, VERSION = "format_version", FORMAT_VERSION
    IN_JSON = ("timesteps", "unet_config", "styles")

    holds: Literal["all", "motion", "motion+lora"]
    timesteps: tuple[Annotated[int, Field(ge=0, lt=TRAIN_TIMESTEPS)], ...]  # those it was trained at, descending
    frames: Annotated[int, Field(ge=1, le=MOST_FRAMES)]  # of the clips it was trained on
    height: Annotated[int, Field(ge=1, le=LONGEST_SIDE)]  # likewise, in pixels
    width: Annotated[int, Field(ge=1, le=LONGEST_SIDE)]
    unet_config: dict  # as `architecture.unet_config` gives it
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
        positions = self.unet_config.get("motion_max_seq_length", _POSITIONS)
        if type(positions) is int and self.frames > positions:
            raise ValueError(f"expected frames up to its motion modules' {positions} position encodings, found {self.frames}")
        if any((value is not None) != (self.holds == "motion+lora") for value in (self.lora_rank, self.lora_alpha)):
            raise ValueError(
                f"expected a LoRA rank and alpha with motion+lora and not else, "
                f"found rank {self.lora_rank} and alpha {self.lora_alpha} with {self.holds}"
            )
        return self

    def usage_hint(self) -> str:
        return (
            f"Timesteps {', '.join(map(str, self.timesteps))} without guidance (cfg 1), {self.frames} frames of "
            f"{self.width}x{self.height}. In ComfyUI with AnimateDiff-Evolved: beta schedule sqrt_linear (AnimateDiff), "
            f"sampler {_SAMPLERS[self.chain]}."
        )
