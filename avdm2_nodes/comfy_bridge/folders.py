"""Model files as ComfyUI finds them, and the stack that comes with the pack."""

import os
import re
import stat
from functools import lru_cache
from pathlib import Path

import folder_paths

from ..errors import SentenceError

BUNDLED = Path(__file__).resolve().parents[2] / "miniature"
BUNDLED_NAME = "miniature (bundled)"
OWN_MOTION = "the checkpoint's own"
STUDENTS, MOTION, LORAS, CHECKPOINTS, STACKS = "avdm2", "animatediff_models", "loras", "checkpoints", "diffusers"
AS_WIRED = "the model's own"
IMAGES, VIDEOS = "images in input/", "videos in input/"  # and the folder's name
RENDERED = "rendered clips (for the miniature)"
TEACHER_CLIPS = "none: the teacher makes clips of the prompts"
CONFIGS = Path(__file__).resolve().parents[2] / "training" / "configs"
SETTINGS = {"fits 24 GB": CONFIGS / "sd15_24gb.yaml", "all weights (80 GB)": CONFIGS / "sd15.yaml"}  # of a distillation
_STYLE_KEY = b'"avdm2.style_version"'  # in the metadata of a style file and of no other
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".tar")  # as training reads them: videos, shards of them
_PEER = re.compile(r"lightning|lcm|\d[-_ ]?step", re.IGNORECASE)  # in the name of a few-step motion module that others made


class ModelFileError(SentenceError, ValueError):
    """A model file that is not there or not of the kind that is wanted; the message is one sentence."""


def register_folders() -> None:
    """Adds our kinds of model to ComfyUI's folders; what `extra_model_paths.yaml` says of them stays."""
    for kind in (STUDENTS, MOTION):
        folder_paths.add_model_folder_path(kind, str(Path(folder_paths.models_dir) / kind))
        paths, extensions = folder_paths.folder_names_and_paths[kind]
        folder_paths.folder_names_and_paths[kind] = (paths, set(extensions) | folder_paths.supported_pt_extensions)


def saving_folder(kind: str) -> Path:
    """Where files of a kind are saved: the first of the folders that they are looked for in, those inside other packs left out."""
    packs = folder_paths.get_folder_paths("custom_nodes")
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(kind)]
    return next(folder for folder in folders if not any(folder.is_relative_to(pack) for pack in packs))


def stack_folders() -> dict[str, Path]:
    """Whole stacks in diffusers' layout, by the name that a person picks."""
    found = {BUNDLED_NAME: BUNDLED} if (BUNDLED / "unet").is_dir() else {}
    for root in folder_paths.get_folder_paths(STACKS):
        for unet in sorted(Path(root).glob("*/unet/config.json")):
            found.setdefault(unet.parents[1].name, unet.parents[1])
    return found


def stack_folder(name: str) -> Path:
    """The stack that a person picked. ModelFileError where it is gone."""
    found = stack_folders().get(name)
    if found is None:
        raise ModelFileError(
            f"Expected a stack {name}, found none; put it into models/diffusers, or refresh and choose another."
        )
    return found


def style_folders() -> dict[str, Path]:
    """Image UNets of other styles that lie in the stacks, by the name that a person picks."""
    found = {}
    for name, stack in stack_folders().items():
        for config in sorted(stack.glob("styles/*/config.json")):
            found[f"{config.parent.name} of {name}"] = config.parent
    return found


def style_files() -> dict[str, Path]:
    """Style files, which hold what training changed for a style, by the name that a person picks."""
    found = {}
    for name, stack in stack_folders().items():
        for file in sorted(stack.glob("styles/*.safetensors")):
            found[f"{file.stem} of {name}, fine-tuned"] = file
    for name in folder_paths.get_filename_list(STUDENTS):
        path = folder_paths.get_full_path(STUDENTS, name)  # None for a link to nothing
        if path is not None and is_style_file(Path(path)):
            found[name] = Path(path)
    return found


def is_style_file(path: Path) -> bool:
    """True for a style file, by its metadata; False for all that cannot be read."""
    try:
        facts = path.stat()
        # A pipe would wait for ever.
        return stat.S_ISREG(facts.st_mode) and _says_style(str(path), facts.st_mtime_ns, facts.st_size)
    except OSError:
        return False


@lru_cache(maxsize=4096)
def _says_style(path: str, changed: int, size: int) -> bool:
    """Whether the header of a .safetensors, its length first, says so; read once for each state of the file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 0 < length < size and _STYLE_KEY in file.read(min(length, 2**24))


def image_folders() -> dict[str, Path]:
    """Folders of pictures right below ComfyUI's input folder, by the name that a person picks."""
    return {f"{IMAGES}{folder.name}": folder for folder in _input_folders() if _holds(folder, _PICTURES)}


def video_folders() -> dict[str, Path]:
    """Folders of videos or of shards there, and what `prepare.py` made of such, likewise."""
    return {f"{VIDEOS}{folder.name}": folder for folder in _input_folders() if _holds(folder, (*_VIDEOS, "cache.json"))}


def video_folder(name: str) -> Path:
    """The folder of videos that a person picked. ModelFileError where it is gone."""
    found = video_folders().get(name)
    if found is None:
        raise ModelFileError(
            f"Expected a folder {name}, found none with videos in it; put them there, or refresh and choose another."
        )
    return found


def _input_folders() -> list[Path]:
    root = Path(folder_paths.get_input_directory())
    return sorted(Path(entry.path) for entry in os.scandir(root) if entry.is_dir()) if root.is_dir() else []


def _holds(folder: Path, endings: tuple[str, ...]) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.lower().endswith(endings) for entry in entries)
    except OSError:
        return False


def run_folder(name: str) -> Path:
    """Where the training of this name keeps what it makes: below ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory()) / "AVDM2" / name


def checkpoint_choices() -> list[str]:
    return [*stack_folders(), *folder_paths.get_filename_list(CHECKPOINTS)]


def motion_choices() -> list[str]:
    return [OWN_MOTION, *folder_paths.get_filename_list(MOTION)]


def module_choices() -> list[str]:
    """Motion modules: those of the folder, and the miniature's."""
    bundled = [BUNDLED_NAME] if (BUNDLED / "motion_adapter").is_dir() else []
    return [*folder_paths.get_filename_list(MOTION), *bundled]


def module_file(name: str) -> Path:
    """Where the motion modules lie that a person picked. ModelFileError where they are gone."""
    return BUNDLED / "motion_adapter" if name == BUNDLED_NAME else model_file(MOTION, name)


def training_modules() -> list[str]:
    """What a node that trains offers for the teacher's motion module: the wired one's first."""
    return [AS_WIRED, *module_choices()]


def video_sources() -> list[str]:
    """What a student can be distilled on: clips of the miniature's world, folders of videos, or the teacher's own clips."""
    bundled = [RENDERED] if (BUNDLED / "unet").is_dir() else []
    return [*bundled, *video_folders(), TEACHER_CLIPS]


def style_choices() -> list[str]:
    """What can be a style: image models, and style files."""
    return list(dict.fromkeys([*style_folders(), *style_files(), *folder_paths.get_filename_list(CHECKPOINTS)]))


def style_sources() -> list[str]:
    """What a style can be learnt from: image models, and folders of pictures."""
    return [*style_folders(), *image_folders(), *folder_paths.get_filename_list(CHECKPOINTS)]


def student_choices() -> list[str]:
    bundled = [BUNDLED_NAME] if (BUNDLED / "student.safetensors").is_file() else []
    peers = [name for name in folder_paths.get_filename_list(MOTION) if _PEER.search(Path(name).name)]
    styles = style_files()
    students = [name for name in folder_paths.get_filename_list(STUDENTS) if name not in styles]
    return list(dict.fromkeys([*bundled, *students, *peers]))


def student_file(name: str) -> Path:
    """The file of a student that a person picked, a student's or a motion module's. ModelFileError where it is gone."""
    if name == BUNDLED_NAME:
        return BUNDLED / "student.safetensors"
    if _PEER.search(Path(name).name) and folder_paths.get_full_path(STUDENTS, name) is None:
        return model_file(MOTION, name)
    return model_file(STUDENTS, name)


def lora_file(beside: Path) -> Path | None:
    """The file of this path's name, there or in the folders of LoRAs; None where there is none."""
    found = folder_paths.get_full_path(LORAS, beside.name)
    return beside if beside.is_file() else Path(found) if found else None


def model_file(kind: str, name: str) -> Path:
    """The file of `name` in the folders of a kind. ModelFileError where it is gone; a name never leaves its folders."""
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths(kind))
        raise ModelFileError(f"Expected {name} in {folders}, found no such file; put it there, or refresh and choose another.")
    return Path(path)
