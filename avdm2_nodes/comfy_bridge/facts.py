"""What our nodes have put into a MODEL, as they tell each other; it travels with the MODEL and its clones."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..errors import SentenceError
from ..files.student import Student
from ..files.student_info import StyleUse
from .motion import KEY


class ModelError(SentenceError, ValueError):
    """A MODEL that a node cannot use; the message is one sentence."""


def require_finite(**numbers: float) -> None:
    """ModelError for NaN or an infinite number, which a page never sends and which ComfyUI lets through: the clip would be NaN."""
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ModelError(f"Expected a finite number for {name}, found {number}; set it anew.")


@dataclass(frozen=True)
class Change:
    """A style that is in a student's weights."""

    use: StyleUse
    tensors: Callable[[], dict[str, Tensor]] = field(repr=False)  # what is added to its weights at strength 1, by their names


@dataclass(frozen=True)
class Facts:
    """Of a teacher, or of a student where there is one."""

    image_model: ModelPatcher = field(repr=False)  # the MODEL as it was wired to us, without motion
    base: Path | None  # the checkpoint or the stack that it was loaded from, where that is known
    motion: Path | None  # the teacher's motion modules
    frames: int  # of a clip that the motion modules know
    student: Student | None = field(default=None, repr=False)
    changes: tuple[Change, ...] = ()  # styles in the student's weights
    guides: tuple[str, ...] = ()  # names of the styles that guide its sampling
    empty_text: Tensor | None = field(
        default=None, repr=False
    )  # (1, L, D) the empty prompt's embedding, where a CLIP came along


def facts_of(model: ModelPatcher) -> Facts | None:
    return model.get_attachment(KEY)


def student_facts(model: ModelPatcher) -> Facts:
    """The facts of a student. ModelError for any other MODEL."""
    facts = facts_of(model)
    if facts is None or facts.student is None:
        raise ModelError("Expected a student, found a MODEL without one; put AVDM2 Student Loader before this node.")
    return facts
