"""Style transfer while sampling: a student's frames are pulled by the difference of two image models' scores."""

from collections.abc import Collection, Iterable, Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor

from .samplers import Generators, Refine, draw_noise
from .schedules import IMAGE
from .sdm import sdm_difference
from .unets import Predictor, guided

# Found with the miniature's student and style on 32 clips, one pull after each of four steps: at 200 fewer clips take the style
# on, at 500 with a guidance of 2 shapes and motion suffer, at 700 they are lost. Guidance doubles the cost of a pull and gained
# nothing.
PULL_TIMESTEP = 400  # of the image schedule
PULL_GUIDANCE = 1.0


def style_pull(x0: Tensor, style_x0: Tensor, source_x0: Tensor, strength: float) -> Tensor:
    """x0 moved along style minus source, the difference of two x0 predictions of the same noisy frames: nothing where they agree.

    A delta of denoising scores (Hertz et al., arXiv 2304.07090): down SDM's gradient before its normaliser, with the source in the
    place of the fake score, which is where a student's frames are, and the style in that of the real one.
    """
    return x0 - strength * sdm_difference(source_x0, style_x0)


def pull_generators(seeds: Iterable[int], style: int = 0) -> list[torch.Generator]:
    """The generators of a style's pulls for clips of these seeds: each has the seed after its clip's own, the second style the next.

    One rule for command line, nodes and measuring, so that they make the same clips.
    """
    return [torch.Generator().manual_seed((seed + 1 + style) % 2**64) for seed in seeds]


def pull_evaluations(steps: int, pulls: int = 1, guidance: float = PULL_GUIDANCE, at: Collection[int] | None = None) -> int:
    """Evaluations of an image UNet on every frame that `pulled` adds to a chain of `steps`, at any strength but 0.

    `at` is `pulled`'s own `steps`.
    """
    pulled_steps = steps if at is None else len(set(range(steps)).intersection(at))
    return pulled_steps * pulls * (2 if guidance == 1.0 else 4)


@torch.no_grad()
def predict_frames(
    predict: Predictor, frames: Tensor, noise: Tensor, t: int, text: Tensor, empty_text: Tensor, guidance: float
) -> Tensor:
    """Guided x0 predictions, (N, C, h, w) float32, of frames (N, C, h, w) diffused to t on the image schedule; texts (1 or N, L, D)."""
    x_t = IMAGE.diffuse(frames, noise, t)
    ts = torch.full((len(x_t),), t, device=x_t.device)
    return IMAGE.x0_from_eps(x_t, guided(predict, empty_text, guidance)(x_t, ts, text.expand(len(x_t), -1, -1)), t)


def pulled(
    style: Predictor,
    source: Predictor,
    text: Tensor,
    empty_text: Tensor,
    strength: float,
    generator: Generators,
    t: int = PULL_TIMESTEP,
    guidance: float = PULL_GUIDANCE,
    style_texts: Sequence[Tensor] | None = None,
    pulls: int = 1,
    steps: Collection[int] | None = None,
) -> Refine:
    """A refinement for `sample_student`: after these steps of it (from 0; None: all) clips (B, C, F, h, w) are pulled `pulls` times.

    A pull is two evaluations a frame, one by the style and one by the source, or four with a guidance other than 1, which is the same
    for both. text (1, B or, a prompt a frame, B F, L, D), empty_text (1, L, D); `style_texts` are both by the style's own encoder,
    where it has one. All frames of a clip get the same noise, so that what moves goes on moving; it comes from the pull's own
    generator, or one a clip, so a strength of 0, which evaluates nothing, leaves the clips as they were.
    """
    texts = (style_texts or (text, empty_text)), (text, empty_text)

    def refine(x0: Tensor, step: int) -> Tensor:
        if strength == 0 or (steps is not None and step not in steps):
            return x0
        batch, channels, count, height, width = x0.shape
        frames = rearrange(x0, "b c f h w -> (b f) c h w")
        for _ in range(pulls):
            noise = draw_noise((batch, channels, height, width), generator, x0.device)
            noise = repeat(noise, "b c h w -> (b f) c h w", f=count)
            style_x0, source_x0 = (
                predict_frames(model, frames, noise, t, _a_frame(y, batch, count), empty, guidance)
                for model, (y, empty) in zip((style, source), texts, strict=True)
            )
            frames = style_pull(frames, style_x0, source_x0, strength)
        return rearrange(frames, "(b f) c h w -> b c f h w", f=count)

    return refine


def _a_frame(text: Tensor, batch: int, count: int) -> Tensor:
    """(batch * count, L, D): each frame's text."""
    return text if len(text) == batch * count else repeat(text.expand(batch, -1, -1), "b l d -> (b f) l d", f=count)


def in_turn(refinements: Sequence[Refine]) -> Refine | None:
    """One refinement after the other; None, which `sample_student` takes too, for none."""
    if not refinements:
        return None

    def refine(x0: Tensor, step: int) -> Tensor:
        for one in refinements:
            x0 = one(x0, step)
        return x0

    return refine
