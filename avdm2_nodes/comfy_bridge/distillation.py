"""A student, distilled from a teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from comfy.model_patcher import ModelPatcher

from . import folders, native
from .facts import facts_of
from .models import with_student
from .motion import KEY
from .training import Base, Trained, Training, TrainingError, base_of, changed_weights, places, sections, train

INPUTS = {
    "videos": ("data.folder",),
    "prompts": ("data.prompts",),
    "settings": ("model.train",),
    "teacher": ("model.teacher",),
    "motion_module": ("model.motion",),
}


def distil_student(
    model: ModelPatcher,
    videos: str,
    name: str,
    updates: int,
    settings: str,
    prompts: str = "",
    motion_module: str = folders.AS_WIRED,
) -> Trained:
    """Distils a teacher into a student, shows what it does, and hands the student on, on the teacher's own base.

    `videos` is one of `folders.video_sources()`, `settings` one of `folders.SETTINGS`, which the miniature does not need; `updates` 0
    takes as many as these say. Errors as `train`, and TrainingError for a MODEL that is no teacher as its file holds it.
    """
    native.require_sd15(model)
    facts = facts_of(model)
    if facts is not None and facts.student is not None:
        raise TrainingError(
            "Expected a teacher, found a student; wire the model from AVDM2 Teacher Loader, AVDM2 Motion Module or Load Checkpoint."
        )
    if changed_weights(model):
        raise TrainingError(
            "Expected a teacher as its file holds it, which is what training reads, found one with LoRAs or merges in it; save it with "
            "Save Checkpoint and load that file."
        )
    file, folder = places(name)
    base = base_of(model, motion_module)
    samples = train(distillation(base, videos, file, folder, updates, settings, prompts))
    student = with_student(file, model)
    student.set_attachments(KEY, replace(facts_of(student), base=base.path, motion=base.motion))
    return Trained(student, file, samples)


def distillation(base: Base, videos: str, file: Path, folder: Path, updates: int, settings: str, prompts: str) -> Training:
    """What is to be trained; TrainingError for videos and prompts that do not go together."""
    config = folders.CONFIGS / "miniature.yaml" if base.bundled else folders.SETTINGS[settings]
    made: dict[str, dict[str, Any]] = sections(base, folder, prompts)
    made["data"] |= {"frames": base.frames} | _clips(base, videos, folder, prompts)
    if updates:
        warmup = min(updates, yaml.safe_load(config.read_text(encoding="utf-8"))["warmup"]["updates"])
        made["warmup"], made["run"] = {"updates": warmup}, made["run"] | {"updates": updates - warmup}
    return Training("student.safetensors", file, folder, config, made, INPUTS, prompts)


def _clips(base: Base, videos: str, folder: Path, prompts: str) -> dict[str, Any]:
    """The settings of the clips that it learns from."""
    if videos == folders.TEACHER_CLIPS:
        if not prompts.strip() and not base.bundled:
            raise TrainingError(
                "Expected prompts for the teacher to make clips of, found none; write some as you would for clips, one a line, or choose "
                "videos."
            )
        own = {} if prompts.strip() else {"prompts": str(folders.BUNDLED / "prompts.txt")}
        return {"folder": str(folder / "clips"), "render": None} | own
    if prompts.strip():
        raise TrainingError(
            f"Expected no prompts beside videos, which have captions of their own, found some; take them out, or choose "
            f"{folders.TEACHER_CLIPS!r} as videos."
        )
    if videos == folders.RENDERED:
        if not base.bundled:
            raise TrainingError(
                "Expected videos for this teacher, found the clips of the miniature's world; choose a folder of videos."
            )
        return {"folder": str(folder / "videos")}
    return {"folder": str(folders.video_folder(videos)), "render": None}
