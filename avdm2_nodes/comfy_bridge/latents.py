"""ComfyUI's LATENT, whose batch is the frames, and clips in model space."""

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class LatentError(ValueError):
    """A LATENT that cannot be sampled; the message is one sentence."""


def to_clip(latent: dict, latent_format, pixels: int) -> Tensor:
    """A LATENT (F, C, h, w) as a clip in model space (1, C, F, h, w) float32 on the CPU.

    `pixels` is what each side in pixels must be a multiple of. LatentError for another kind of latent or size; a single
    frame and a mask are only warned of.
    """
    samples, channels = latent["samples"], latent_format.latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise LatentError(
            f"Expected a latent (frames, {channels}, height / 8, width / 8), found {tuple(samples.shape)}; "
            "use Empty Latent Image with batch_size as the number of frames, or VAE Encode with this stack's VAE."
        )
    height, width = (8 * side for side in samples.shape[2:])
    if height % pixels or width % pixels:
        fitting = " x ".join(str(max(pixels, round(side / pixels) * pixels)) for side in (width, height))
        raise LatentError(
            f"Expected width and height as multiples of {pixels} pixels, found {width} x {height}; take {fitting} instead."
        )
    if len(samples) == 1:
        logger.warning("AVDM2: one frame only; for a clip set batch_size of the latent to the number of frames.")
    if latent.get("noise_mask") is not None:
        logger.warning("AVDM2: the latent's noise mask is not used; every pixel is sampled.")
    return latent_format.process_in(samples.float().cpu()).transpose(0, 1)[None].contiguous()


def from_clip(clip: Tensor, latent: dict, latent_format) -> dict:
    """A sampled clip (1, C, F, h, w) as the LATENT that it came from, all other keys kept."""
    samples = latent_format.process_out(clip[0].transpose(0, 1).float().cpu()).contiguous()
    return {**latent, "samples": samples}


def frame_index(latent: dict) -> list[int] | None:
    """Which frames of a longer clip these are, where core's batch nodes say so."""
    index = latent.get("batch_index")
    return None if index is None else [int(i) for i in index][: len(latent["samples"])]


def evaluation_shape(clip: Tensor, copies: int = 1) -> torch.Size:
    """The shape (N, C, h, w) of the frames in one evaluation of `copies` of a clip (1, C, F, h, w), to ask for room with."""
    _, channels, frames, height, width = clip.shape
    return torch.Size((copies * frames, channels, height, width))
