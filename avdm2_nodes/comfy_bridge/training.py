"""Training a style from within ComfyUI: `training/distill.py` as a process of its own, followed by what it leaves in its folder."""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management as management
import comfy.sd1_clip
import comfy.utils
import yaml
from comfy.model_patcher import ModelPatcher
from PIL import Image

from ..errors import SentenceError
from ..files.student import student_path
from . import folders
from .facts import Facts, student_facts
from .process import Process
from .progress import show_text
from .styles import with_style_file

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, CONFIGS, REQUIREMENTS = ROOT / "training/distill.py", ROOT / "training/configs", ROOT / "requirements-training.txt"
TOKENIZER = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer"
MADE, LOG = "style.safetensors", "training.log"  # in the run's folder
LOSSES = ("guidance", "sdm", "adm", "fake", "critic")  # of `stats.jsonl`
LOOK = 0.5  # seconds between two looks at what the process has done
SHOWN = 768  # pixels of a sample sheet's longer side, at most, while it is only shown


class TrainingError(SentenceError, RuntimeError):
    """Training that cannot begin; the message is one sentence."""


@dataclass(frozen=True)
class Trained:
    """A student with the style that was learnt for it, the style's file, and the sheets of clips that were made on the way."""

    student: ModelPatcher
    file: Path
    samples: list[Path]


def train_style(model: ModelPatcher, style: str, name: str, updates: int, prompts: str = "") -> Trained:
    """Learns a style for this student in a process of its own and waits for it, showing what it does.

    `style` is one of `folders.style_sources()`; `updates` 0 and no prompts (one a line) take what the settings say. Goes on where an
    earlier run of this name was stopped. TrainingError before anything starts, else ProcessError in the process's words; an interrupt
    stops the process first, which leaves a checkpoint.
    """
    file = student_path(folders.saving_folder(folders.STUDENTS), name)
    folder = folders.run_folder(file.relative_to(folders.saving_folder(folders.STUDENTS)).with_suffix("").as_posix())
    command = style_command(student_facts(model), style, folder, updates, prompts)
    require_training()
    require_own(file, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if prompts.strip():
        prompts_file(folder, prompts).write_text(prompts, encoding="utf-8")
    management.unload_all_models()
    management.soft_empty_cache()
    with Process([SCRIPT, *command], folder / LOG) as job:
        follow(job, folder)
    install(folder / MADE, file)
    return Trained(with_style_file(model, file, 1.0), file, sample_sheets(folder))


def style_command(facts: Facts, style: str, folder: Path, updates: int, prompts: str) -> list[str]:
    """The arguments of `training/distill.py` for a style; TrainingError for what has no files to start from."""
    info = facts.student.info
    bundled = facts.base == folders.BUNDLED  # whose settings have prompts
    if facts.guides or facts.changes:
        raise TrainingError(
            "Expected a student without styles to train one for, found some on it; wire the student from AVDM2 Student Loader."
        )
    if facts.base is None:
        raise TrainingError(
            "Expected a student whose checkpoint is known, found one on a MODEL that does not say its file, which training, a process of "
            "its own, has to read; load the base by AVDM2 Teacher Loader."
        )
    if facts.motion is None:
        raise TrainingError(
            "Expected the teacher's motion module, which the style is learnt with, found none; put AVDM2 Teacher Loader or "
            "AVDM2 Motion Module before AVDM2 Student Loader."
        )
    if not bundled and not prompts.strip():
        raise TrainingError(
            "Expected prompts to learn the style on, found none; write some as you would for clips, one a line: 50 or more."
        )
    if images := folders.image_folders().get(style):
        source = {"style.images": images}
    else:
        source = {"model.score_unet": folders.style_folders().get(style) or folders.model_file(folders.CHECKPOINTS, style)}
    device = management.get_torch_device()
    settings = source | {
        "config": CONFIGS / ("style.yaml" if bundled else "style_sd15.yaml"),
        "run.folder": folder,
        "run.attached": "true",
        "run.device": str(device) if device.type in ("cpu", "cuda") else "auto",
        "model.teacher": facts.base,
        "model.motion": facts.motion,
        "model.student": facts.student.name,
        "student.steps": ",".join(map(str, info.timesteps)),
        "data.frames": info.frames,
        "data.height": info.height,
        "data.width": info.width,
        "style.name": folder.name,
        "evaluation.world": "null",  # the node hands on the student, it does not measure it
    }
    if facts.base.is_file():
        settings["model.tokenizer"] = TOKENIZER
    if prompts.strip():
        settings["data.prompts"] = prompts_file(folder, prompts)
    if updates:  # all by what guides the student, as the settings have it; none of them trains a critic
        settings |= {"warmup.updates": updates, "warmup.critics_from": updates}
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def prompts_file(folder: Path, prompts: str) -> Path:
    """Where the prompts of a run are written, under a name that other prompts do not have: they make another run."""
    return folder / f"prompts-{hashlib.sha256(prompts.encode()).hexdigest()[:12]}.txt"


def require_training() -> None:
    """TrainingError where this system or Python lacks what training needs, with the command that mends it."""
    if os.name == "nt":
        raise TrainingError("Expected Linux or macOS for training, found Windows; train in WSL and load the style file here.")
    names = re.findall(r"^\w[\w.-]*", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)
    missing = [name for name in names if not _installed(name)]
    if missing:
        raise TrainingError(
            f"Expected the packages for training in ComfyUI's Python, found no {', '.join(missing)}; "
            f'run "{sys.executable}" -m pip install -r "{REQUIREMENTS}" and restart ComfyUI.'
        )


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def require_own(file: Path, folder: Path) -> None:
    """TrainingError where a file of the style's name is there that this run did not make."""
    made = folder / MADE
    if file.exists() and not (made.exists() and made.read_bytes() == file.read_bytes()):
        raise TrainingError(f"Expected a new name for the style, found {file.name} there already; choose another name.")


def install(made: Path, file: Path) -> None:
    """Puts the style's file where the nodes look for it, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(made, temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def follow(job: Process, folder: Path) -> None:
    """Waits for the job, showing its progress, its losses and the clips that it makes; an interrupt is raised as such."""
    look, bar, said = Look(folder), None, ""
    before, shown = look.lines, look.sheet
    while not job.wait(LOOK):
        management.throw_exception_if_processing_interrupted()
        look = Look(folder)
        text = job.last_words()
        if look.total and look.lines != before:
            bar = bar or comfy.utils.ProgressBar(look.total)
            fresh = look.sheet is not None and look.sheet != shown
            bar.update_absolute(look.lines[-1]["update"], look.total, picture(look.sheet) if fresh else None)
            shown, text = look.sheet, in_words(look.lines, look.total)
        if text != said:
            show_text(text)
            said = text


class Look:
    """What a run's folder says at this moment."""

    def __init__(self, folder: Path):
        stats, settings = folder / "stats.jsonl", folder / "config.yaml"
        lines = stats.read_text(encoding="utf-8").splitlines(keepends=True) if stats.exists() else []
        self.lines = [json.loads(line) for line in lines if line.endswith("\n")]  # the figures of each update
        said = yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.exists() else None
        self.total = said["run"]["updates"] + said["warmup"]["updates"] if said else None  # updates
        self.sheet = next(reversed(sample_sheets(folder)), None)  # the newest clips


def in_words(lines: list[dict], total: int) -> str:
    """How far a run is, what is left of it and its losses, of the last update."""
    *_, last = lines
    done, recent = last["update"], lines[-20:]
    text = f"update {done} of {total}"
    if len(recent) > 1 and done < total:
        pace = (last["seconds"] - recent[0]["seconds"]) / (done - recent[0]["update"])
        text += f", about {max(1, round(pace * (total - done) / 60))} min to go"
    losses = [f"{name} {last[name]:.3f}" for name in LOSSES if last.get(name) is not None]
    return "\n".join([text, *losses])


def sample_sheets(folder: Path) -> list[Path]:
    """The sheets of clips that a run made on its way, in their order."""
    return sorted((folder / "samples").glob("*.png"))


def picture(sheet: Path) -> tuple | None:
    """A sheet as ComfyUI's preview; None for one that is still being written."""
    try:
        with Image.open(sheet) as image:
            return "PNG", image.convert("RGB"), SHOWN
    except OSError:
        return None
