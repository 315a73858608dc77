"""A style, learnt for a student."""

from pathlib import Path
from typing import Any

from comfy.model_patcher import ModelPatcher

from . import folders
from .facts import Facts, student_facts
from .progress import say
from .styles import with_style_file
from .training import Base, Trained, Training, TrainingError, base_of, changed_weights, places, sections, train

INPUTS = {
    "style": ("model.score_unet", "style.images"),
    "prompts": ("data.prompts",),
    "student": ("model.student",),
    "model": ("model.teacher",),
    "motion_module": ("model.motion",),
}
LORA_NOTE = (
    "The style is learnt on the checkpoint as its file holds it, without the LoRAs or merges in this model; they stay in the model that "
    "comes out."
)


def train_style(
    model: ModelPatcher, style: str, name: str, updates: int, prompts: str = "", motion_module: str = folders.AS_WIRED
) -> Trained:
    """Learns a style for this student, shows what it does, and hands on the student with it at strength 1.

    `style` is one of `folders.style_sources()`; `updates` 0 and no prompts (one a line) take what the settings say. Errors as `train`.
    """
    facts = student_facts(model)
    file, folder = places(name)
    training = style_training(facts, base_of(model, motion_module), style, file, folder, updates, prompts)
    note = LORA_NOTE if changed_weights(model) else ""
    say(note)
    samples = train(training)
    return Trained(with_style_file(model, file, 1.0), file, samples, note)


def style_training(facts: Facts, base: Base, style: str, file: Path, folder: Path, updates: int, prompts: str) -> Training:
    """What is to be trained; TrainingError for a student that has styles already, and for one without prompts of its own."""
    info = facts.student.info
    if facts.guides or facts.changes:
        raise TrainingError(
            "Expected a student without styles to train one for, found some on it; wire the student from AVDM2 Student Loader."
        )
    if info.chain != "renoise":
        raise TrainingError(
            f"Expected a student of AVDM2's own kind to learn a style for, found {Path(facts.student.name).name}, which another method "
            "made; choose one of models/avdm2, or make one with AVDM2 Distillation."
        )
    if not base.bundled and not prompts.strip():
        raise TrainingError(
            "Expected prompts to learn the style on, found none; write some as you would for clips, one a line: 50 or more."
        )
    made: dict[str, dict[str, Any]] = sections(base, folder, prompts)
    if images := folders.image_folders().get(style):
        made["style"] = {"images": str(images)}
    else:
        unet = folders.style_folders().get(style) or folders.model_file(folders.CHECKPOINTS, style)
        made["style"], made["model"] = {}, made["model"] | {"score_unet": str(unet)}
    made["style"]["name"] = folder.name
    made["model"]["student"] = facts.student.name
    made["student"] = {"steps": list(info.timesteps)}
    made["data"] |= {"frames": info.frames, "height": info.height, "width": info.width}
    if updates:  # all by what guides the student, as the settings have it; none of them trains a critic
        made["warmup"] = {"updates": updates, "critics_from": updates}
    config = folders.CONFIGS / ("style.yaml" if base.bundled else "style_sd15.yaml")
    return Training("style.safetensors", file, folder, config, made, INPUTS, prompts)
