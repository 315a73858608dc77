"""Training from within ComfyUI: `training/distill.py` as a process of its own, refused beforehand where it could not go well."""

import contextlib
import filecmp
import hashlib
import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.sd1_clip
import yaml
from comfy.model_patcher import ModelPatcher

from ..diffusion.windows import ANIMATEDIFF_FRAMES
from ..errors import SentenceError
from ..files.sentences import is_text
from ..files.stack import stack_frames
from ..files.student import student_path
from . import folders
from .facts import facts_of
from .models import checkpoint_of, weight_patches
from .process import Process, ProcessError
from .training_look import follow, sample_sheets
from .training_words import in_node_words

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, REQUIREMENTS = ROOT / "training/distill.py", ROOT / "requirements-training.txt"
TOKENIZER = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer"
SETTINGS, LOG = "settings.yaml", "training.log"  # in the run's folder


class TrainingError(SentenceError, RuntimeError):
    """Training that cannot begin, or that ended early; the message is one sentence in the words of the node."""


@dataclass(frozen=True)
class Trained:
    """A student after a training, the file that it is in, the sheets of clips made on the way, and what to know of it."""

    student: ModelPatcher = field(repr=False)
    file: Path
    samples: list[Path]
    note: str = ""


@dataclass(frozen=True)
class Base:
    """What a training starts from, as files."""

    path: Path  # a checkpoint, or a stack's folder
    motion: Path
    frames: int  # of a clip that the motion modules know

    @property
    def bundled(self) -> bool:
        return self.path == folders.BUNDLED


@dataclass(frozen=True)
class Training:
    """One training as a node asks for it: what it reads, where its files go, and how the node calls what it was given."""

    made: str  # the file that it leaves in its folder
    file: Path  # and where that goes in the end
    folder: Path
    config: Path  # settings, of training/configs
    settings: Mapping[str, Mapping[str, Any]] = field(repr=False)  # and those that the node puts in their place, by section
    inputs: Mapping[str, tuple[str, ...]] = field(repr=False)  # the node's inputs, by the settings that they become
    prompts: str = ""  # one a line


def train(training: Training) -> list[Path]:
    """Runs a training to its end, shows how far it is, and puts what it made where the nodes look for it; its sheets of clips.

    Goes on where an earlier run of this name was stopped. TrainingError, before anything is written where it can be told so early; an
    interrupt stops the process first, which leaves a checkpoint.
    """
    require_training()
    require_own(training)
    require_same_inputs(training)
    with _told(f"Expected a folder that can be made and written at {training.folder}", "make room, or choose another name"):
        training.folder.mkdir(parents=True, exist_ok=True)
        if training.prompts.strip():
            write_whole(prompts_file(training.folder, training.prompts), training.prompts)
        write_whole(training.folder / SETTINGS, yaml.safe_dump(settings_of(training), allow_unicode=True, sort_keys=False))
    management.unload_all_models()
    management.soft_empty_cache()
    try:
        with Process([SCRIPT, "--config", training.folder / SETTINGS], training.folder / LOG) as job:
            follow(job, training.folder)
    except ProcessError as error:
        raise TrainingError(in_node_words(str(error), training.folder / LOG, training.inputs)) from error
    install(training)
    return sample_sheets(training.folder)


# ---- what it starts from ----


def places(name: str) -> tuple[Path, Path]:
    """(the file in models/avdm2, the folder in output/AVDM2) of a training of this name.

    StudentFileError for a name that leaves them, TrainingError for one that no file can have.
    """
    root = folders.saving_folder(folders.STUDENTS)
    with _told("Expected a name that a file can have", "choose another name"):
        name.encode()
        file = student_path(root, name)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(_unfinished(file))  # whose name is the longest
    above = next(folder for folder in file.parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        found = "no right to write there" if above.is_dir() else "a file in its place"
        raise TrainingError(f"Expected a folder at {above} for {file.name}, found {found}; choose another name.")
    return file, folders.run_folder(file.relative_to(root).with_suffix("").as_posix())


def base_of(model: ModelPatcher, motion_module: str) -> Base:
    """The files of a teacher, or of a student's; a motion module that a person picked takes the place of the MODEL's own.

    TrainingError where they are not known: training, a process of its own, reads files.
    """
    facts = facts_of(model)
    path = facts.base if facts and facts.base else checkpoint_of(facts.image_model if facts else model)
    if path is None:
        raise TrainingError(
            "Expected a model whose checkpoint is known, for training reads its file, found one that does not say it; "
            "wire it from Load Checkpoint, AVDM2 Load Miniature or AVDM2 Teacher Loader."
        )
    frames = stack_frames(path) if path.is_dir() else ANIMATEDIFF_FRAMES
    if motion_module != folders.AS_WIRED:
        return Base(path, folders.module_file(motion_module), facts.frames if facts else frames)
    own = path / "motion_adapter"
    motion = facts.motion if facts and facts.motion else own if own.is_dir() else None
    if motion is None:
        raise TrainingError(
            "Expected the teacher's motion module, which training needs, found a model without one; choose it as motion_module, or put "
            "AVDM2 Motion Module before this node."
        )
    return Base(path, motion, facts.frames if facts else frames)


def changed_weights(model: ModelPatcher) -> bool:
    """Whether a MODEL has weights that neither its file nor its student's holds: LoRAs, merges, before our nodes or after them."""
    facts = facts_of(model)
    student = facts.student if facts else None
    own = weight_patches(student.tensors, student.info.lora_alpha) if student else {}
    return sum(map(len, model.patches.values())) > len([key for key in own if "motion_modules" not in key])


def sections(base: Base, folder: Path, prompts: str) -> dict[str, dict[str, Any]]:
    """The settings that every training from a node has."""
    device = management.get_torch_device()
    made = {
        "run": {
            "folder": str(folder),
            "attached": True,
            "device": str(device) if device.type in ("cpu", "cuda") else "auto",
        },
        "model": {"teacher": str(base.path), "motion": str(base.motion)},
        "data": {},
        "evaluation": {"world": None, "report": False},  # the node hands on the student, it does not measure it
    }
    if base.path.is_file():
        made["model"]["tokenizer"] = str(TOKENIZER)
    if prompts.strip():
        made["data"]["prompts"] = str(prompts_file(folder, prompts))
    return made


def settings_of(training: Training) -> dict[str, dict[str, Any]]:
    """All that a training's process is told: its settings with the node's over them, by section."""
    below = yaml.safe_load(training.config.read_text(encoding="utf-8"))
    return {key: below.get(key, {}) | dict(training.settings.get(key, {})) for key in {**below, **training.settings}}


def prompts_file(folder: Path, prompts: str) -> Path:
    """Where the prompts of a run are written, under a name that other prompts do not have: they make another run."""
    if not is_text(prompts):
        raise TrainingError("Expected prompts of whole characters, found half of one (a lone surrogate); take it out.")
    return folder / f"prompts-{hashlib.sha256(prompts.encode()).hexdigest()[:12]}.txt"


# ---- refused beforehand ----


def require_training() -> None:
    """TrainingError where this system or Python lacks what training needs, with the command that mends it."""
    if os.name == "nt":
        raise TrainingError("Expected Linux or macOS for training, found Windows; train in WSL and load the file here.")
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


def require_own(training: Training) -> None:
    """TrainingError where a file of this name is there that this run did not make."""
    made, file = training.folder / training.made, training.file
    with _told(f"Expected a file that can be read at {file}", "choose another name"):
        if file.exists() and not (made.is_file() and filecmp.cmp(made, file, shallow=False)):
            raise TrainingError(f"Expected a new name, found {file.name} there already; choose another name.")


def require_same_inputs(training: Training) -> None:
    """TrainingError where an earlier training of this name has begun with other inputs; nothing is said where none has."""
    steps = [
        int(path.stem[5:]) for path in (training.folder / "checkpoints").glob("step-*.safetensors") if path.stem[5:].isdecimal()
    ]
    if not steps:
        return
    path = training.folder / "config.yaml"
    try:
        earlier = _flat(yaml.safe_load(path.read_text(encoding="utf-8")))
        had = [int(earlier[key]) for key in _UPDATES]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise TrainingError(
            f"Expected in {path} the settings of the training that began under this name, found them spoilt; choose another name, or "
            f"delete {training.folder}."
        ) from error
    now = {key: earlier[key] for key in _UPDATES} | _flat(settings_of(training))
    if (earlier.get("model.train") == "style") != (now.get("model.train") == "style"):
        was = "style" if earlier.get("model.train") == "style" else "student"
        raise TrainingError(f"Expected a new name, found one under which a {was} was trained; choose another name.")
    changes = [
        f"other {name}" if name in ("prompts", "settings") else f"{name} {_said(now, keys)}, was {_said(earlier, keys)}"
        for name, keys in training.inputs.items()
        if [_comparable(key, now.get(key)) for key in keys] != [_comparable(key, earlier.get(key)) for key in keys]
    ]
    want = [int(now[key]) for key in _UPDATES]
    if want[0] != had[0]:
        changes.append(f"updates {sum(want)}, was {sum(had)}")
    elif sum(want) < max(steps):
        raise TrainingError(
            f"Expected updates of at least {max(steps)}, which this training has done already, found {sum(want)}; raise updates, or "
            "choose another name."
        )
    if changes:
        raise TrainingError(
            f"Expected the inputs that the training of this name began with, found {'; '.join(changes)}; set that back to go on with "
            "it, or choose another name."
        )


_UPDATES = ("warmup.updates", "run.updates")
_PATHS = ("data.folder", "data.prompts", "model.teacher", "model.motion", "model.student", "model.score_unet", "style.images")


def _flat(said: dict[str, dict]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in said.items() for key, value in values.items()}


def _comparable(key: str, value: Any) -> Any:
    return os.path.normpath(ROOT / str(value)) if key in _PATHS and value else value


def _said(settings: dict[str, Any], keys: tuple[str, ...]) -> str:
    """How a person knows what is set there: by its file's name."""
    value = next((settings[key] for key in keys if settings.get(key) is not None), "nothing")
    return Path(str(value)).name if any(key in _PATHS for key in keys) else str(value)


# ---- what it leaves ----


def install(training: Training) -> None:
    """Puts the file that a training made where the nodes look for it, whole or not at all."""
    file = training.file
    with _told(f"Expected room and the right to write {file}", "make room and run the same inputs again: the training is kept"):
        file.parent.mkdir(parents=True, exist_ok=True)
        _written_whole(file, lambda temporary: shutil.copyfile(training.folder / training.made, temporary))


def write_whole(file: Path, text: str) -> None:
    """Writes a text, whole or not at all. OSError where there is no room or no right."""
    _written_whole(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _written_whole(file: Path, write: Callable[[Path], Any]) -> None:
    temporary = _unfinished(file)
    try:
        write(temporary)
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _unfinished(file: Path) -> Path:
    return file.with_name(f".{file.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def _told(expected: str, mend: str):
    """Tells an OSError of the block as a TrainingError."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        found = "signs that are no text" if isinstance(error, UnicodeError) else error.strerror or error
        raise TrainingError(f"{expected}, found: {found}; {mend}.") from error
