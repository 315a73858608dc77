"""Pictures in other sizes."""

import torch
from einops import rearrange
from torch.nn.functional import interpolate


def resized(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(F, H, W, 3) uint8 -> (F, height, width, 3) uint8: bicubic, antialiased."""
    planes = rearrange(frames, "f h w c -> f c h w").float()
    planes = interpolate(planes, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return rearrange(planes.round().clamp(0, 255).to(torch.uint8), "f c h w -> f h w c")


def cover(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes (F, H, W, 3) uint8 until it covers height x width, antialiased, and cuts the centre out."""
    h, w = frames.shape[1:3]
    if (h, w) != (height, width):
        scale = max(height / h, width / w)
        size = max(height, round(h * scale)), max(width, round(w * scale))
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        frames = resized(frames, *size)[:, top : top + height, left : left + width]
    return frames.contiguous()
