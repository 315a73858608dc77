"""How a student, a teacher and styles make clips of prompts: samplers in windows, with guides, to frames."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from torch import Tensor

from avdm2_nodes.diffusion.compiled import compiled_predictor
from avdm2_nodes.diffusion.guidance import in_turn, pull_generators, pulled
from avdm2_nodes.diffusion.samplers import Callback, Chain, Generators, Refine, draw_noise, sample_student, sample_teacher
from avdm2_nodes.diffusion.style import StyleChange, add_change, require_same_family
from avdm2_nodes.diffusion.unets import image_predictor, video_predictor
from avdm2_nodes.diffusion.windows import ANIMATEDIFF_FRAMES, windowed
from avdm2_nodes.files.stack import Stack, load_image_unet
from avdm2_nodes.files.student import Student
from avdm2_nodes.files.style import is_style, lora_change, read_style, require_student

STYLE_MODES = ("guidance", "transplant")

# (noise (B, C, F, h, w), text (B, L, D), generators, callback) -> clips in model space (B, C, F, h, w)
Sampler = Callable[[Tensor, Tensor, Generators, Callback | None], Tensor]
# (text (B, L, D), the clips' generators) -> how a style pulls those clips after each step
Guide = Callable[[Tensor, Generators], Refine]


class SampleError(ValueError):
    """A clip that cannot be sampled; the message is one sentence."""


def student_sampler(
    unet: UNetMotionModel,
    timesteps: Sequence[int],
    window: int,
    chain: Chain = "renoise",
    compiled: bool = False,
    guides: Sequence[Guide] = (),
) -> Sampler:
    """The student's own chain over `timesteps`, longer clips in windows of `window` frames; `compiled` changes the UNet."""
    predict = windowed((compiled_predictor if compiled else video_predictor)(unet), window)
    return lambda noise, text, generators, callback=None: sample_student(
        predict, noise, text, timesteps, generators, callback, None, in_turn([g(text, generators) for g in guides]), chain
    )


def style_guide(
    style: UNet2DConditionModel, source: UNet2DConditionModel, empty_text: Tensor, strength: float, number: int = 0
) -> Guide:
    """Guidance by the style's image model against the student's own, `source`; `number` counts the guides, each with its own noise."""
    predictors = image_predictor(style), image_predictor(source)

    def guide(text: Tensor, generators: Generators) -> Refine:
        alone = isinstance(generators, torch.Generator)
        own = pull_generators((g.initial_seed() for g in ([generators] if alone else generators)), number)
        return pulled(*predictors, text, empty_text, strength, own[0] if alone else own)

    return guide


def add_styles(
    styles: Iterable[tuple[Path, float]], mode: str, student: Student, unet: UNetMotionModel, stack: Stack
) -> list[tuple[UNet2DConditionModel, float]]:
    """Adds styles, (path, strength) each, to the student's UNet in place; returns those that are to guide, as image models.

    Style files, and by `mode` "transplant" image models, go into its weights. StackError, StyleError or StyleFileError.
    """
    guiding = []
    for path, strength in styles:
        if is_style(path):
            style = read_style(path)
            require_student(style, student)
            add_change(unet, lora_change(style), strength)
        else:
            style = load_image_unet(path)
            require_same_family(style, stack.image_unet)
            if mode == "transplant":
                add_change(unet, StyleChange(stack.image_unet, style), strength)
            elif strength != 0:
                guiding.append((style, strength))
    return guiding


def teacher_sampler(
    unet: UNetMotionModel,
    empty_text: Tensor,
    steps: int,
    guidance: float,
    window: int = ANIMATEDIFF_FRAMES,
    compiled: bool = False,
) -> Sampler:
    """The teacher's guided steps, trailing, windows as the student's; all its randomness is the noise. empty_text (1, L, D)."""
    predict = windowed((compiled_predictor if compiled else video_predictor)(unet), window)
    return lambda noise, text, generators, callback=None: sample_teacher(
        predict, noise, text, empty_text, steps, guidance, callback=callback
    )


@torch.no_grad()
def generate(
    sampler: Sampler,
    stack: Stack,
    prompts: Sequence[str],
    seeds: Sequence[int],
    frames: int,
    height: int,
    width: int,
    callback: Callback | None = None,
) -> Tensor:
    """One clip a prompt, (B, frames, height, width, 3) uint8 on the CPU; the randomness of clip i is seeds[i]'s alone.

    height and width are pixels. Runs on the text encoder's device. SampleError for a size that the VAE cannot make.
    """
    factor = stack.pixels
    if height % factor or width % factor:
        raise SampleError(f"Expected --height and --width as multiples of {factor}, found {height} and {width}; change them.")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    text = stack.encode_text(list(prompts))
    shape = (len(prompts), stack.vae.config.latent_channels, frames, height // factor, width // factor)
    return stack.decode_clips(sampler(draw_noise(shape, generators, text.device), text, generators, callback))


def require_positions(unet: UNetMotionModel, window: int) -> None:
    """SampleError for windows of more frames than the motion modules know positions for."""
    most = unet.config.motion_max_seq_length
    if window > most:
        raise SampleError(
            f"Expected {most} frames at most, which is as many positions as the motion modules know, found {window} in the model's own "
            "facts (a student's frames, or stack.json's); correct them there."
        )


def teacher_size(stack: Stack) -> tuple[int, int]:
    """Height and width in pixels that the image UNet was made for."""
    size, factor = stack.image_unet.config.sample_size, stack.pixels
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height * factor, width * factor
