"""Style transfer while sampling: a student's frames are pulled by the difference of two image models' scores."""

import torch
from torch import Tensor

from .samplers import Refine, to_device
from .schedules import IMAGE, classifier_free_guidance
from .unets import Predictor

PULL_TIMESTEP = 500  # of the image schedule: coarse enough for a style, fine enough to leave the motion
PULL_GUIDANCE = 2.0


def style_pull(x0: Tensor, style_x0: Tensor, source_x0: Tensor, strength: float) -> Tensor:
    """x0 moved along style minus source, the difference of two x0 predictions of the same noisy frames: nothing where they agree.

    A delta of denoising scores (Hertz et al., arXiv 2304.07090), the direction of SDM (DMD, arXiv 2311.18828) between two real scores.
    """
    return x0 + strength * (style_x0 - source_x0)


@torch.no_grad()
def predict_frames(
    predict: Predictor, frames: Tensor, noise: Tensor, t: int, text: Tensor, empty_text: Tensor, guidance: float
):
    """Guided x0 predictions, (N, C, h, w) float32, of frames (N, C, h, w) diffused to t on the image schedule."""
    x_t = IMAGE.diffuse(frames, noise, t)
    ts = torch.full((len(x_t),), t, device=x_t.device)
    uncond, cond = (predict(x_t, ts, y.expand(len(x_t), -1, -1)) for y in (empty_text, text))
    return IMAGE.x0_from_eps(x_t, classifier_free_guidance(uncond, cond, guidance), t)


def pulled(
    style: Predictor,
    source: Predictor,
    text: Tensor,
    empty_text: Tensor,
    strength: float,
    generator: torch.Generator,
    t: int = PULL_TIMESTEP,
    guidance: float = PULL_GUIDANCE,
) -> Refine:
    """A refinement for `sample_student`: after each step the clip (1, C, F, h, w) is pulled once, four evaluations a frame.

    All frames get the same noise, so that what moves goes on moving; it comes from the pull's own generator, so that a strength
    of 0 leaves the clip as it was.
    """

    def refine(x0: Tensor, step: int) -> Tensor:
        frames = x0[0].transpose(0, 1)
        noise = to_device(torch.randn(1, *frames.shape[1:], generator=generator), x0.device)
        both = [predict_frames(model, frames, noise, t, text, empty_text, guidance) for model in (style, source)]
        return style_pull(frames, *both, strength).transpose(0, 1)[None]

    return refine
