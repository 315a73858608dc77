"""Clips longer than the motion modules know: overlapping windows of frames, their predictions blended."""

import torch
from torch import Tensor

from .unets import Predictor

ANIMATEDIFF_FRAMES = 16  # of the clips that AnimateDiff's motion modules were trained on (arXiv 2307.04725)


def overlap_of(length: int) -> int:
    """The frames that a window of `length` shares with the next, half of them.

    With a quarter, windows of the miniature disagree where they meet: an object stands there twice, faintly, and jumps (40 frames, four
    prompts: the largest change from frame to frame .114 of the pixels' range, by half .080). Noise that windows share (FreeNoise,
    arXiv 2310.15169) keeps what stands still (.071 to .056) and makes what moves jump.
    """
    return length // 2


def window_starts(frames: int, length: int, overlap: int) -> list[int]:
    """First frames of windows of `length` that cover `frames`, each sharing at least `overlap` frames with the one before.

    As few as that allows, evenly spread. ValueError unless 0 <= overlap < length.
    """
    if not 0 <= overlap < length:
        raise ValueError(f"Expected an overlap from 0 to {length - 1} frames for windows of {length}, found {overlap}.")
    if frames <= length:
        return [0]
    count = -(-(frames - overlap) // (length - overlap))
    return [round(i * (frames - length) / (count - 1)) for i in range(count)]


def window_weights(length: int, overlap: int, device: torch.device | None = None) -> Tensor:
    """(length,) weights of a window's frames: 1 inside, falling linearly over `overlap` frames to both sides, never 0."""
    ramp = torch.arange(1, length + 1, dtype=torch.float32, device=device) / (overlap + 1)
    return torch.minimum(ramp, ramp.flip(0)).clamp(max=1)


def windowed(predict: Predictor, length: int, overlap: int | None = None) -> Predictor:
    """A video predictor that reads longer clips window by window and blends what it predicts for a frame by the windows' weights.

    Uniform sliding contexts, as AnimateDiff-Evolved has them, within every step. A clip of up to `length` frames is one window.
    The overlap is `overlap_of` the length unless given.
    """
    overlap = overlap_of(length) if overlap is None else overlap

    def eps(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        frames = x_t.shape[2]
        if frames <= length:
            return predict(x_t, t, text)
        weight = window_weights(length, overlap, x_t.device)[:, None, None]
        total = torch.zeros(x_t.shape, device=x_t.device)
        share = torch.zeros(frames, 1, 1, device=x_t.device)
        for start in window_starts(frames, length, overlap):
            window = slice(start, start + length)
            total[:, :, window] += weight * predict(x_t[:, :, window], t, text)
            share[window] += weight
        return total / share

    return eps
