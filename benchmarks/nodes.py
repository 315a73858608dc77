"""The student sampler's node inside ComfyUI, where COMFYUI_DIR names a checkout and this Python has its requirements."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from torch import Tensor

from avdm2_nodes.diffusion.schedules import trailing_timesteps
from avdm2_nodes.diffusion.unets import share_spatial_layers
from avdm2_nodes.files.architecture import unet_config
from avdm2_nodes.files.student import Student
from avdm2_nodes.files.student_info import StudentInfo


def why_not() -> str | None:
    """Why ComfyUI cannot be run here; None where it can."""
    named = os.environ.get("COMFYUI_DIR")
    if not named:
        return "COMFYUI_DIR names no ComfyUI"
    if not (Path(named) / "comfy" / "cli_args.py").is_file():
        return f"no ComfyUI at {named}"
    try:
        _bridge(Path(named))
    except ModuleNotFoundError as missing:
        return f"this Python lacks ComfyUI's {missing.name}"
    return None


def version() -> str:
    """ComfyUI's, once it is known to run."""
    return importlib.import_module("comfyui_version").__version__


def student_node(unet: UNetMotionModel, text: Tensor, clip: tuple[int, ...], steps: int) -> Callable[[], dict]:
    """What the node does when it is run: from conditioning (1, L, D) and an empty latent to a LATENT of `clip` (1, C, F, h, w).

    The weights of `unet` are copied into a native MODEL and its motion modules.
    """
    native, motion, facts, sampling, formats = _bridge(Path(os.environ["COMFYUI_DIR"]))
    _, channels, frames, height, width = clip
    config = {key: value for key, value in unet.config.items() if key in inspect.signature(UNet2DConditionModel).parameters}
    for key in ("down_block_types", "up_block_types"):
        config[key] = tuple(kind.replace("Motion", "2D") for kind in config[key])
    config |= {
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "attention_head_dim": unet.config.num_attention_heads,
        "num_attention_heads": None,
    }
    with torch.device("meta"):
        shell = UNet2DConditionModel(**config)
    image_model = native.image_model(share_spatial_layers(unet, shell), formats.SD15())
    modules = {name: tensor for name, tensor in unet.state_dict().items() if "motion_modules" in name}
    weights = motion.MotionWeights(modules, unet.config.motion_num_attention_heads, unet.config.norm_num_groups)
    model = sampling.look_after(motion.with_motion(image_model, weights))
    info = StudentInfo(
        holds="all",
        timesteps=tuple(trailing_timesteps(steps)),
        frames=frames,
        height=8 * height,
        width=8 * width,
        unet_config=unet_config(unet),
        base_name="benchmark",
        base_hash="0" * 64,
        updates=0,
        training_config="",
        title="benchmark",
        date="2026-01-01",
        license="Apache-2.0",
    )
    model.set_attachments(motion.KEY, facts.Facts(image_model, None, None, frames, Student(info, {}, "benchmark")))
    latent = {"samples": torch.zeros(frames, channels, height, width)}

    def run() -> dict:
        with torch.inference_mode():
            return sampling.student_latent(model, [[text.cpu(), {}]], latent, 0, steps, 1.0)

    return run


def _bridge(comfyui: Path) -> tuple:
    """comfy_bridge's native, motion, facts and sampling, and ComfyUI's latent formats."""
    if str(comfyui) not in sys.path:
        sys.path.insert(1, str(comfyui))  # and it stays: ComfyUI imports parts of itself when they are used
        arguments, sys.argv = sys.argv, ["main.py"] + ([] if torch.cuda.is_available() else ["--cpu"])
        try:
            importlib.import_module("comfy.options").enable_args_parsing()
            importlib.import_module("comfy.cli_args")
        finally:
            sys.argv = arguments
    ours = [importlib.import_module(f"avdm2_nodes.comfy_bridge.{name}") for name in ("native", "motion", "facts", "sampling")]
    return *ours, importlib.import_module("comfy.latent_formats")
