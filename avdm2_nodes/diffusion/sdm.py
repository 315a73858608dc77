"""Score distribution matching on single frames (DMD, arXiv 2311.18828, with a 2D backbone as AVDM2, arXiv 2412.05899, has it)."""

import torch
from torch import Tensor

from .schedules import IMAGE
from .unets import Predictor, guided


def sdm_difference(fake_x0: Tensor, real_x0: Tensor) -> Tensor:
    """y_fake - y_real = (sigma_t^2 / alpha_t) (score_fake - score_real): the direction in which the frames leave the real ones."""
    return fake_x0 - real_x0


def sdm_gradient(frames: Tensor, fake_x0: Tensor, real_x0: Tensor) -> Tensor:
    """The gradient of SDM on clean frames, all of shape (B, C, h, w), computed in float32 or wider.

    The difference is divided by each sample's own mean |y - y_real| (DMD, equation 8), never by the batch's, and what is not
    finite becomes 0.
    """
    dtype = torch.promote_types(frames.dtype, torch.float32)
    frames, fake_x0, real_x0 = (x.to(dtype) for x in (frames, fake_x0, real_x0))
    size = (frames - real_x0).abs().mean(dim=tuple(range(1, frames.ndim)), keepdim=True)
    return torch.nan_to_num(sdm_difference(fake_x0, real_x0) / size, nan=0.0, posinf=0.0, neginf=0.0)


@torch.no_grad()
def score_pair(
    frames: Tensor,
    noise: Tensor,
    t: Tensor,
    text: Tensor,
    empty_text: Tensor,
    real: Predictor,
    fake: Predictor,
    guidance: float,
) -> tuple[Tensor, Tensor]:
    """(fake x0, real x0) of frames (B, C, h, w) diffused to t (B,) on the image schedule; the real score is guided, the fake is not."""
    x_t = IMAGE.diffuse(frames, noise, t)
    fake_eps = fake(x_t, t, text)
    real_eps = guided(real, empty_text, guidance)(x_t, t, text)
    return IMAGE.x0_from_eps(x_t, fake_eps, t), IMAGE.x0_from_eps(x_t, real_eps, t)
