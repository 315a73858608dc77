"""Styles on a student: an image model that guides its sampling, or one in its weights, as patches on a clone of its patcher."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from comfy.model_patcher import ModelPatcher
from diffusers import UNet2DConditionModel

from ..diffusion.style import require_same_family, style_change
from ..files.hashes import weights_hash
from ..files.stack import load_image_unet
from ..files.student_info import StyleUse
from ..files.style import lora_change, read_style, require_student
from . import folders, memory, native
from .models import Change, Guide, Student, Teacher, checkpoint_unet, weight_patches
from .text import text_of

GUIDANCE, TRANSPLANT = "guidance", "transplant"


def with_style(
    student: Student,
    style: str,
    strength: float,
    model: ModelPatcher | None = None,
    mode: str = GUIDANCE,
    prompt: list | None = None,
    pulls: int = 1,
) -> Student:
    """The student with one more style; at strength 0 the student itself, once the style is known to fit.

    A style file is put into its weights; an image model, by name or as a MODEL, guides its sampling or is transplanted. Errors of the
    rooms below, sentences all.
    """
    if model is None and (path := folders.style_files().get(style)):
        return with_style_file(student, path, strength)
    name, load = ("the MODEL", partial(native.image_unet_of, model)) if model is not None else (style, _loader(style))
    unet = load()
    require_same_family(unet, student.teacher.architecture)
    if strength == 0:
        return student
    if mode == TRANSPLANT:
        change = style_change(student.teacher.image_unet(), unet)
        use = StyleUse(name=name, hash=weights_hash(unet), mode="transplant", strength=strength)
        half = {key: t.half() for key, t in change.items() if t.any()}  # as student files have theirs, and half the memory
        return _changed(student, Change(use, lambda: half), {key: ("diff", (t,)) for key, t in half.items()})
    text = None if prompt is None else text_of(prompt, student.teacher.text_width, "prompt")
    source = student.guides[0].source if student.guides else _image_patcher(student.teacher.image_unet(), student.teacher)
    guide = Guide(name, _image_patcher(unet, student.teacher), source, strength, pulls, text)
    return replace(student, guides=(*student.guides, guide))


def with_style_file(student: Student, path: Path, strength: float) -> Student:
    """The student with a style that was learnt for it. Errors as `read_style` and `require_student`."""
    style = read_style(path)
    require_student(style, student.file)
    if strength == 0:
        return student
    use = StyleUse(name=style.info.name, hash=style.info.hash, mode="fine-tuned", strength=strength)
    return _changed(student, Change(use, partial(lora_change, style)), weight_patches(style.tensors, style.info.lora_alpha))


def _changed(student: Student, change: Change, patches: dict) -> Student:
    patcher = student.patcher.clone()
    patcher.add_patches({f"diffusion_model.{key}": patch for key, patch in patches.items()}, change.use.strength)
    return replace(student, patcher=patcher, changes=(*student.changes, change))


def _loader(style: str) -> Callable[[], UNet2DConditionModel]:
    """Loads the image model that a person picked by name."""
    folder = folders.style_folders().get(style)
    return (
        partial(load_image_unet, folder) if folder else partial(checkpoint_unet, folders.model_file(folders.CHECKPOINTS, style))
    )


def _image_patcher(unet: UNet2DConditionModel, teacher: Teacher) -> ModelPatcher:
    return memory.unet_patcher(unet, teacher.latent_format)
