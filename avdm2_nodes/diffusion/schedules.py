"""The two noise schedules and the conversions between what a diffusion model predicts.

AnimateDiff's video UNet was trained on diffusers' `linear` betas, the SD1.5 image UNet on `scaled_linear`, both from 0.00085 to
0.012 (AnimateDiff, arXiv 2307.04725; Stable Diffusion v1). They are different functions of t: a clip diffused with one and read by
a model of the other is a silent error, so every function here is handed its schedule.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """A discrete variance-preserving schedule, named as diffusers names its `beta_schedule`.

    alpha_t = sqrt(abar_t) and sigma_t = sqrt(1 - abar_t), with x_t = alpha_t x0 + sigma_t eps.
    """

    beta_schedule: str
    beta_start: float = 0.00085
    beta_end: float = 0.012

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(1000,) float64, abar_t."""
        if self.beta_schedule == "linear":
            betas = torch.linspace(self.beta_start, self.beta_end, TRAIN_TIMESTEPS, dtype=torch.float64)
        elif self.beta_schedule == "scaled_linear":
            betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, TRAIN_TIMESTEPS, dtype=torch.float64) ** 2
        else:
            raise ValueError(
                f"Expected a beta schedule 'linear' or 'scaled_linear', found {self.beta_schedule!r}; "
                "other schedules are not those of SD1.5 and AnimateDiff."
            )
        return torch.cumprod(1 - betas, 0)

    def alpha_sigma(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t for t of shape () or (B,), shaped to multiply `like` (B, ...), in at least float32."""
        abar = _on_device(self, like.device)[t if isinstance(t, int) else t.to(like.device)]
        abar = abar.reshape(abar.shape + (1,) * (like.ndim - abar.ndim))
        dtype = torch.promote_types(like.dtype, torch.float32)
        return abar.sqrt().to(dtype), (1 - abar).sqrt().to(dtype)

    def diffuse(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x_t = alpha_t x0 + sigma_t noise; shapes (B, ...), t of shape () or (B,)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * noise

    def x0_from_eps(self, x_t: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
        """x0 = (x_t - sigma_t eps) / alpha_t, never computed in half precision: alpha_999 is 0.04."""
        alpha, sigma = self.alpha_sigma(t, x_t)
        return (x_t - sigma * eps) / alpha

    def timestep_of(self, abar: Tensor) -> Tensor:
        """The first timestep at which as much noise lies as at `abar` (B,) on the CPU, a value of another schedule; 999 where none does."""
        return torch.searchsorted(-self.alphas_cumprod, -abar.double()).clamp(max=TRAIN_TIMESTEPS - 1)

    def eps_from_x0(self, x_t: Tensor, x0: Tensor, t: Tensor | int) -> Tensor:
        """eps = (x_t - alpha_t x0) / sigma_t."""
        alpha, sigma = self.alpha_sigma(t, x_t)
        return (x_t - alpha * x0) / sigma


@cache
def _on_device(schedule: Schedule, device: torch.device) -> Tensor:
    """alphas_cumprod where it is read, copied there once: a copy from the CPU makes it wait for the GPU."""
    return schedule.alphas_cumprod.to(device)


VIDEO = Schedule("linear")
IMAGE = Schedule("scaled_linear")


def trailing_timesteps(steps: int) -> list[int]:
    """`steps` timesteps from 999 downwards, evenly spaced at the trailing ends (Lin et al., arXiv 2305.08891): 4 -> 999, 749, 499, 249."""
    if not 1 <= steps <= TRAIN_TIMESTEPS:
        raise ValueError(f"Expected 1 to {TRAIN_TIMESTEPS} steps, found {steps}.")
    return [round(TRAIN_TIMESTEPS - i * TRAIN_TIMESTEPS / steps) - 1 for i in range(steps)]


def lcm_timesteps(steps: int, solver_steps: int = 100) -> list[int]:
    """`steps` of the `solver_steps` trailing timesteps that a latent consistency model was trained at (LCM, arXiv 2310.04378).

    As diffusers' LCMScheduler picks them; AnimateLCM's own configuration says 100. ValueError outside 1..`solver_steps`.
    """
    if not 1 <= steps <= solver_steps:
        raise ValueError(f"Expected 1 to {solver_steps} steps of a latent consistency model, found {steps}.")
    trained = trailing_timesteps(solver_steps)
    return [trained[i * solver_steps // steps] for i in range(steps)]


def classifier_free_guidance(eps_uncond: Tensor, eps_cond: Tensor, scale: float) -> Tensor:
    """eps = eps_uncond + scale (eps_cond - eps_uncond) (Ho & Salimans, arXiv 2207.12598); scale 1 is the conditional prediction."""
    return eps_uncond + scale * (eps_cond - eps_uncond)
