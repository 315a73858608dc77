"""Few-step motion modules that others made, as students: AnimateDiff-Lightning (arXiv 2403.12706) and AnimateLCM (arXiv 2402.00769).

Both run on any SD1.5 base, without guidance. Lightning takes Euler steps at trailing timesteps, as many as its file was made for, which
its name alone says. AnimateLCM is a module and a LoRA, and goes on with fresh noise as a latent consistency model does.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from torch import Tensor
from torch.nn.functional import pad

from ..diffusion.schedules import TRAIN_TIMESTEPS, lcm_timesteps, trailing_timesteps
from ..diffusion.unets import require_matching_motion
from ..diffusion.windows import ANIMATEDIFF_FRAMES
from .architecture import unet_config
from .containers import read_layout
from .lora import Layer, load_lora_file
from .motion import load_motion_file
from .paths import is_file
from .recognise import recognise, require
from .sentences import FileFormatError, one_line, told
from .student import Student
from .student_info import ANY_BASE, StudentInfo

_LIGHTNING, _ANIMATELCM = "motion-v2", "motion-animatelcm"
_STEPS_IN_NAME = re.compile(r"(\d+)[-_ ]?steps?(?![a-z])", re.IGNORECASE)
_ANIMATELCM_STEPS = 4
_SIDE = 512  # pixels of the clips that both were trained on


def is_peer(path: Path) -> bool:
    """True for a file of motion modules, which is no student file but may be a peer's; never fails."""
    try:
        return recognise(read_layout(path)).id.startswith("motion-")
    except FileFormatError:
        return False


def lora_beside(path: Path) -> Path:
    """Where AnimateLCM's LoRA is looked for: beside its module, under its name with `_lora`, as both are published."""
    return path.with_name(f"{path.stem}_lora.safetensors")


def load_peer(path: Path, image_unet: UNet2DConditionModel, lora: Path | None = None) -> Student:
    """A Lightning or AnimateLCM module as a student for any base of `image_unet`'s architecture, which may lie on the meta device.

    `lora` is AnimateLCM's, else `lora_beside`. FileFormatError for any other file, a v2 module whose name tells no number of steps (it
    may be a teacher's), AnimateLCM without its LoRA or with one of other layers, and a base of other widths.
    """
    path = Path(path)
    kind = require(path, (_LIGHTNING, _ANIMATELCM), "a student file, or a module of AnimateDiff-Lightning or AnimateLCM,")
    steps = _steps_in_name(path) if kind.id == _LIGHTNING else _ANIMATELCM_STEPS
    motion = load_motion_file(path, norm_groups=image_unet.config.norm_num_groups)
    try:
        require_matching_motion(image_unet, motion)
    except ValueError as error:  # a sentence already
        raise FileFormatError(str(error)) from error
    positions = motion.config.motion_max_seq_length
    if positions < ANIMATEDIFF_FRAMES:
        raise FileFormatError(
            f"Expected motion modules for clips of {ANIMATEDIFF_FRAMES} frames in {path}, found {positions} position encodings; "
            "choose another file."
        )
    tensors, rank = dict(motion.state_dict()), None
    if kind.id == _ANIMATELCM:
        lora = lora or lora_beside(path)
        if not is_file(lora):
            raise FileFormatError(
                f"Expected AnimateLCM's LoRA, without which {path.name} is half a student, found no {lora}; put it there."
            )
        layers = load_lora_file(lora, {name: p.shape for name, p in image_unet.named_parameters()})
        rank = max(len(down) for down, _, _ in layers.values())
        tensors |= _of_one_rank(layers, rank)
    with torch.device("meta"):
        shells = UNet2DConditionModel.from_config(image_unet.config), MotionAdapter.from_config(motion.config)
        unet = UNetMotionModel.from_unet2d(*shells, load_weights=False)
    lightning = kind.id == _LIGHTNING
    info = StudentInfo(
        holds="motion" if lightning else "motion+lora",
        timesteps=tuple(trailing_timesteps(steps) if lightning else lcm_timesteps(steps)),
        chain="euler" if lightning else "lcm",
        frames=ANIMATEDIFF_FRAMES,
        height=_SIDE,
        width=_SIDE,
        unet_config=unet_config(unet),
        base_name="SD1.5",
        base_hash=ANY_BASE,
        lora_rank=rank,
        lora_alpha=rank,
        updates=0,
        training_config="",
        title=one_line(path.stem),
        date=_day(path),
        license="as its authors say",
    )
    return Student(info, tensors, str(path))


def _day(path: Path) -> str:
    """When the file was written, ISO 8601."""
    with told(path, "a model file with a date"):
        return datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()


def _steps_in_name(path: Path) -> int:
    found = _STEPS_IN_NAME.search(path.stem)
    if not found or not 0 < int(found[1]) <= TRAIN_TIMESTEPS:
        raise FileFormatError(
            f"Expected a number of steps in the name of {path.name}, 1 to {TRAIN_TIMESTEPS}, as in "
            "animatediff_lightning_4step_comfyui.safetensors, found none; give it its published name, or load it as a teacher's "
            "motion module if it is one."
        )
    return int(found[1])


def _of_one_rank(layers: Mapping[str, Layer], rank: int) -> dict[str, Tensor]:
    """LoRA layers under a student's names, all of `rank` (the missing rows are zero) and of an alpha of the rank."""
    tensors = {}
    for module, (down, up, alpha) in layers.items():
        missing = rank - len(down)
        after = [0, 0] * (down.ndim - 2)  # pad counts from the last axis
        tensors[f"{module}.lora_A.weight"] = pad(down.float(), [*after, 0, 0, 0, missing])
        tensors[f"{module}.lora_B.weight"] = pad(up.float() * (alpha / len(down)), [*after, 0, missing])
    return tensors
