"""Stage 1: an autoencoder of the TAESD architecture (github.com/madebyollin/taesd), 4 channels, 8x down, width 64."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from einops import rearrange
from torch import Tensor

# Opponent axes: luminance, red-green, blue-yellow. Textured backgrounds are all luminance; in plain RGB they would buy their
# sharpness with the object's colour.
_OPPONENT = torch.tensor([[2 / 3, 2 / 3, 2 / 3], [1.0, -1.0, 0.0], [-0.5, -0.5, 1.0]])
CROP = 32


def new_vae() -> AutoencoderTiny:
    return AutoencoderTiny(encoder_block_out_channels=(64,) * 4, decoder_block_out_channels=(64,) * 4)


def crop_where_colourful(frames: Tensor, generator: torch.Generator) -> Tensor:
    """(N, 3, H, W) in -1..1 -> (N, 3, CROP, CROP), one crop a frame, centred more often where there is colour."""
    n, _, height, width = frames.shape
    chroma = F.avg_pool2d((frames.amax(1) - frames.amin(1))[:, None], 4).flatten(1) + 0.15
    place = torch.multinomial(chroma, 1, generator=generator).squeeze(1)
    shift = torch.randint(-CROP // 2, CROP // 2, (2, n), generator=generator)
    top = (place // (width // 4) * 4 - CROP // 2 + shift[0] // 2).clamp(0, height - CROP)
    left = (place % (width // 4) * 4 - CROP // 2 + shift[1] // 2).clamp(0, width - CROP)
    return torch.stack([f[:, t : t + CROP, x : x + CROP] for f, t, x in zip(frames, top.tolist(), left.tolist(), strict=True)])


def reconstruction_loss(decoded: Tensor, target: Tensor) -> Tensor:
    """Weighted L1 + MSE in opponent colours and L1 of the edges; both images (N, 3, H, W) in -1..1."""
    axes = _OPPONENT.to(target)
    difference = torch.einsum("oc,nchw->nohw", axes, decoded - target)
    colourful = (target.amax(1, keepdim=True) - target.amin(1, keepdim=True) > 0.6).to(target)
    weight = 1 + 2 * F.max_pool2d(colourful, 5, stride=1, padding=2)  # the object, with its rim and its lamp
    edges = sum((torch.diff(decoded, dim=dim) - torch.diff(target, dim=dim)).abs().mean() for dim in (2, 3))
    return (weight * (difference.abs() + 2 * difference.square())).mean() / weight.mean() + edges


def vae_losses(vae: AutoencoderTiny, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Losses of one step on (N, 3, H, W) images in -1..1.

    Latents are held near zero mean and unit variance (so that the stack's scaling factor is about 1 and the decoder's tanh at +-3
    cuts little), and are decoded with a little noise, which keeps the decoder tolerant of a diffusion model's small errors.
    """
    latents = vae.encode(images).latents.float()
    decoded = vae.decode(latents + 0.05 * torch.randn(latents.shape, generator=generator)).sample.float()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    moments = mean.square().mean() + (std - 1).square().mean() + F.relu(latents.abs() - 2.5).mean()
    reconstruction = reconstruction_loss(decoded, images)
    mse = F.mse_loss(decoded.clamp(-1, 1), images)
    return {"loss": reconstruction + 0.1 * moments, "psnr": -10 * torch.log10(mse / 4), "std": std.mean()}


def preview_colours(latents: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (C, 3) and bias (3,) that turn latents (N, C, h, w) into the mean colours -1..1 of their patches, by least squares.

    images (N, 3, H, W) in -1..1. ComfyUI previews with such factors while it samples.
    """
    patches = torch.nn.functional.adaptive_avg_pool2d(images, latents.shape[2:])
    x = rearrange(latents, "n c h w -> (n h w) c").double()
    y = rearrange(patches, "n c h w -> (n h w) c").double()
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1), y).solution
    return solution[:-1].float(), solution[-1].float()
