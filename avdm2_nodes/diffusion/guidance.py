"""Style transfer while sampling: a student's frames are pulled by the difference of two image models' scores."""

from collections.abc import Collection, Sequence

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
    style_texts: Sequence[Tensor] | None = None,
    pulls: int = 1,
    steps: Collection[int] | None = None,
) -> Refine:
    """A refinement for `sample_student`: after these steps of it (from 0; None: all) the clip (1, C, F, h, w) is pulled `pulls` times.

    A pull is four evaluations a frame, by style and source with and without the text, under the same guidance. `style_texts` are text
    and empty text by the style's own encoder, where it has one. All frames get the same noise, so that what moves goes on moving; it
    comes from the pull's own generator, so a strength of 0, which evaluates nothing, leaves the clip as it was.
    """
    texts = (style_texts or (text, empty_text)), (text, empty_text)

    def refine(x0: Tensor, step: int) -> Tensor:
        if strength == 0 or (steps is not None and step not in steps):
            return x0
        frames = x0[0].transpose(0, 1)
        for _ in range(pulls):
            noise = to_device(torch.randn(1, *frames.shape[1:], generator=generator), x0.device)
            style_x0, source_x0 = (
                predict_frames(model, frames, noise, t, *own, guidance)
                for model, own in zip((style, source), texts, strict=True)
            )
            frames = style_pull(frames, style_x0, source_x0, strength)
        return frames.transpose(0, 1)[None]

    return refine
