"""Where a run's clips come from, as its settings say: a folder, clips rendered into it, or the teacher."""

from pathlib import Path

import torch
from diffusers import MotionAdapter, UNet2DConditionModel
from tqdm import tqdm

from avdm2_nodes.diffusion.unets import Predictor
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.sentences import one_line
from avdm2_nodes.files.stack import Stack
from training.data import DataError
from training.data.clips import needs_clips, write_clips
from training.data.latents import Encoder, LatentClips, open_clips
from training.data.teacher_clips import clips_for_prompts
from training.run.config import DistillConfig
from training.world import scenes


def open_data(
    config: DistillConfig,
    folder: Path,
    stack: Stack,
    teacher: Predictor,
    score_unet: UNet2DConditionModel | None,
    device: torch.device,
) -> LatentClips:
    """The clips that the settings name: `data.prompts`, for which the teacher makes them, kept in `folder`, or `data.folder`."""
    require_positions(stack.motion, config.data.frames)
    if config.data.prompts:
        encoder = Encoder(stack, device, config.run.precision)
        styled = config.model.train == "style"
        backbone = weights_hash(score_unet if styled else stack.image_unet)
        teacher_hash = f"{backbone} with {weights_hash(stack.motion)}"
        return clips_for_prompts(config, folder / "clips", teacher, teacher_hash, encoder)
    if config.data.render and needs_clips(config.data.folder):
        render_clips(config)
    data = open_clips(config, stack, device)
    require_whole(data.encoder.tell_of_cut(data.captions), config.data.strict)
    return data


def require_positions(motion: MotionAdapter | None, frames: int) -> None:
    """DataError for clips of more frames than the motion modules know positions for."""
    most = motion.config.motion_max_seq_length if motion is not None else frames
    if frames > most:
        raise DataError(
            f"Expected data.frames of {most} at most, which is as many positions as the motion modules know, found {frames}; "
            "lower it, or name other modules with model.motion."
        )


def require_whole(cut: list[str], strict: bool) -> None:
    """DataError where data.strict is set and captions are longer than the text encoder takes."""
    if strict and cut:
        raise DataError(
            f"Expected captions that the text encoder takes whole (data.strict), found {len(cut)} that are cut, "
            f"first {one_line(cut[0])!r}; shorten them, or set data.strict false."
        )


def render_clips(config: DistillConfig) -> None:
    """Renders clips of the miniature world into the data folder, as video files like anybody's."""
    clips = scenes.render_split(config.data.render, style="plain", held_out=False, seed=config.run.seed)
    frames = ((clip.frames, clip.content.caption) for clip in clips)
    write_clips(config.data.folder, tqdm(frames, "rendering clips", config.data.render), scenes.FPS)
