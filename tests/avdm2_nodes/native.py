"""What tests do with native MODELs, and what they are compared with: diffusers' networks, given the same inputs."""

import math
from collections.abc import Callable, Sequence

import torch
from diffusers import UNetMotionModel
from torch import Tensor

from avdm2_nodes.diffusion.samplers import Chain, draw_noise, sample_student
from avdm2_nodes.diffusion.unets import Predictor
from tests.avdm2_nodes.conftest import as_latent

# How far float32 may be off, as `difference` has it: one evaluation, a clip at cfg 1, a clip with guidance.
EVALUATION, CLIP, GUIDED = 1e-5, 1e-5, 1e-4


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, by the second's root mean square where that is above 1: an untrained network's clips are large."""
    assert one.shape == other.shape and one.isfinite().all() and other.isfinite().all()
    return float((one.float() - other.float()).abs().max()) / max(1.0, rms(other))


def rms(tensor: Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())


@torch.inference_mode()
def evaluate(model, x: Tensor, t: int, text: Tensor, copies: int = 1) -> Tensor:
    """eps (N, C, h, w) of a MODEL at x, which is x_t in model space, as core's sampling asks for it; text (1 or N, L, D)."""
    import comfy.model_management as management

    management.load_models_gpu([model, *model.get_nested_additional_models()])
    model.pre_run()
    try:
        sigma = model.get_model_object("model_sampling").sigmas[t].float()
        options = {
            **model.model_options["transformer_options"],
            "wrappers": dict(model.wrappers),
            "cond_or_uncond": list(range(copies)),
        }
        scaled = x * (sigma**2 + 1).sqrt()
        text = text if len(text) == len(x) else text.repeat(len(x) // len(text), 1, 1)
        x0 = model.model.apply_model(scaled, sigma.expand(len(x)), c_crossattn=text, transformer_options=options)
        return (scaled - x0) / sigma
    finally:
        model.cleanup()


@torch.no_grad()
def diffusers_eps(unet: UNetMotionModel, x: Tensor, t: int, text: Tensor) -> Tensor:
    """eps (F, C, h, w) of one clip's frames by diffusers' video UNet."""
    return unet(x.transpose(0, 1)[None], torch.tensor(t), text, return_dict=False)[0][0].transpose(0, 1)


@torch.no_grad()
def chain(
    predict: Predictor,
    text: Tensor,
    shape: Sequence[int],
    seed: int,
    timesteps: Sequence[int],
    kind: Chain = "renoise",
    refine=None,
) -> Tensor:
    """The LATENT (F, C, h, w) of a student's chain by any predictor, noises as everywhere."""
    frames, channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    noise = draw_noise((1, channels, frames, height, width), generator)
    return as_latent(sample_student(predict, noise, text, timesteps, generator, refine=refine, chain=kind))


def with_residuals(unet: UNetMotionModel, residuals: Callable[[Tensor, int, Tensor], tuple[list, Tensor]]) -> Predictor:
    """A video UNet that gets a ControlNet's residuals: `residuals(x (F, C, h, w), t, text)` are those of the blocks and the middle's."""

    def eps(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        down, middle = residuals(x_t[0].transpose(0, 1), int(t.flatten()[0]), text)
        return unet(
            x_t, t, text, down_block_additional_residuals=tuple(down), mid_block_additional_residual=middle, return_dict=False
        )[0]

    return eps


def in_windows(predict: Callable, windows: Callable[[int], list[list[int]]], weights: Callable[[list[int]], list[float]]):
    """A predictor that reads windows of frames, `windows(evaluation)` from 0, and means them by `weights(window)`: core's, looped out.

    `predict(x_t, t, text, window)`.
    """
    count = iter(range(10**6))

    def eps(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        total, share = torch.zeros_like(x_t), torch.zeros(x_t.shape[2])
        for window in windows(next(count)):
            found = predict(x_t[:, :, window], t, text, window)
            for place, (frame, weight) in enumerate(zip(window, weights(window), strict=True)):
                total[:, :, frame] += weight * found[:, :, place]
                share[frame] += weight
        return total / share[:, None, None]

    return eps


def random_weights(module: torch.nn.Module, seed: int = 1) -> None:
    """Weights of the size that training starts from: ComfyUI's layers begin with whatever is in memory."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        fan_in = max(1, math.prod(parameter.shape[1:])) if parameter.ndim > 1 else 100
        parameter.data = drawn / fan_in**0.5 + (1.0 if parameter.ndim == 1 else 0.0)
