"""Samples clips into video files: python training/sample.py --prompt "…" --seed 0 --out clip.mp4 (--help lists the rest)."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this script's own folder, so that it runs from anywhere with nothing of ours installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from torch import Tensor
from tqdm import tqdm

from avdm2_nodes.diffusion.guidance import in_turn, pull_generators, pulled
from avdm2_nodes.diffusion.precision import decoding_dtype, sampling_dtype
from avdm2_nodes.diffusion.samplers import (
    Callback,
    Chain,
    Generators,
    Refine,
    draw_noise,
    sample_student,
    sample_teacher,
    student_timesteps,
)
from avdm2_nodes.diffusion.schedules import TRAIN_TIMESTEPS
from avdm2_nodes.diffusion.style import StyleChange, StyleError, add_change, require_same_family
from avdm2_nodes.diffusion.unets import image_predictor, video_predictor
from avdm2_nodes.diffusion.windows import ANIMATEDIFF_FRAMES, windowed
from avdm2_nodes.files.containers import FileFormatError
from avdm2_nodes.files.peers import is_peer, load_peer
from avdm2_nodes.files.stack import Stack, StackError, load_image_unet, load_stack
from avdm2_nodes.files.student import Student, read_student
from avdm2_nodes.files.student_info import StudentFileError
from avdm2_nodes.files.student_unet import student_unet
from avdm2_nodes.files.style import StyleFileError, is_style, lora_change, read_style, require_student
from avdm2_nodes.files.taesd import load_taesd_file
from training.data.video import VideoError, write_video
from training.run import console
from training.run.config import ROOT
from training.run.precision import pick_device

MODEL = ROOT / "miniature"
STUDENT = MODEL / "student.safetensors"
TEACHER_STEPS, TEACHER_GUIDANCE = 25, 3.0
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
    backend: str | None = None,
    guides: Sequence[Guide] = (),
) -> Sampler:
    """The student's own chain over `timesteps`, longer clips in windows of `window` frames; `backend` is `video_predictor`'s."""
    predict = windowed(video_predictor(unet, backend), window)
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
    backend: str | None = None,
) -> Sampler:
    """The teacher's guided steps, trailing, windows as the student's; all its randomness is the noise. empty_text (1, L, D)."""
    predict = windowed(video_predictor(unet, backend), window)
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


def teacher_size(stack: Stack) -> tuple[int, int]:
    """Height and width in pixels that the image UNet was made for."""
    size, factor = stack.image_unet.config.sample_size, stack.pixels
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height * factor, width * factor


def sample(args: argparse.Namespace) -> None:
    """What the command line asks for. One of the errors named in `main`, before any clip is written or between two."""
    outs = numbered(args.out, len(args.prompt))
    if not args.out.parent.is_dir():
        raise SampleError(f"Expected a folder at {args.out.parent} for {args.out.name}, found none; make it.")
    device, guiding = pick_device(), []
    if args.teacher:
        stack = load_stack(args.model, args.motion, tokenizer=args.tokenizer)
        unet, window, (height, width) = stack.teacher, stack.frames, teacher_size(stack)
        steps = args.steps or TEACHER_STEPS
        guidance = TEACHER_GUIDANCE if args.guidance is None else args.guidance
    else:
        # Before the base: the smaller file fails faster.
        student = None if is_peer(args.student) else read_student(args.student)
        stack = load_stack(args.model, with_motion=False, tokenizer=args.tokenizer)
        student = student or load_peer(args.student, stack.image_unet)
        unet, info = student_unet(student, stack.image_unet), student.info
        guiding = add_styles(zip(args.style, args.style_strength, strict=True), args.style_mode, student, unet, stack)
        window, height, width = info.frames, info.height, info.width
        timesteps = student_timesteps(info.timesteps, args.steps or len(info.timesteps), info.chain)
        steps = len(timesteps)
    frames, height, width = args.frames or window, args.height or height, args.width or width
    if args.taesd:
        stack.vae = load_taesd_file(args.taesd)
    # diffusers' own `to` warns of parts that these networks do not have
    for network in (unet, *([stack.image_unet, *(style for style, _ in guiding)] if guiding else [])):
        torch.nn.Module.to(network, device, sampling_dtype(device))
    torch.nn.Module.to(stack.vae, device, decoding_dtype(device))
    stack.text_encoder.to(device)
    guides = [
        style_guide(style, stack.image_unet, stack.encode_text([""]), strength, i)
        for i, (style, strength) in enumerate(guiding)
    ]
    backend = "inductor" if args.compile else None
    sampler = (
        teacher_sampler(unet, stack.encode_text([""]), steps, guidance, window, backend)
        if args.teacher
        else student_sampler(unet, timesteps, window, info.chain, backend, guides)
    )
    with tqdm(total=steps * len(outs), unit="step", desc="teacher" if args.teacher else "student") as bar:
        for prompt, out in zip(args.prompt, outs, strict=True):
            clip = generate(
                sampler, stack, [prompt], [args.seed], frames, height, width, callback=lambda done, x0: bar.update()
            )
            write_video(out, clip[0].numpy(), args.fps)
            tqdm.write(str(out))


def numbered(out: Path, count: int) -> list[Path]:
    """`out` itself for one clip, clip-1.mp4, clip-2.mp4, … for several."""
    if count == 1:
        return [out]
    digits = len(str(count))
    return [out.with_name(f"{out.stem}-{i:0{digits}d}{out.suffix}") for i in range(1, count + 1)]


def between(low: int, high: int) -> Callable[[str], int]:
    """A type for argparse."""

    def whole_number(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, found {text!r}")
        return int(text)

    return whole_number


def scale(text: str) -> float:
    """A type for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number from 0, found {text!r}")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sample clips from a student, or from its teacher.")
    student_help = "student file, or an AnimateDiff-Lightning or AnimateLCM module (default: the shipped student)"
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--student", type=Path, default=STUDENT, metavar="FILE", help=student_help)
    who.add_argument("--teacher", action="store_true", help="sample the teacher instead")
    model_help = "the teacher, or the student's base: a diffusers folder or an SD1.5 checkpoint (default: the miniature)"
    parser.add_argument("--model", type=Path, default=MODEL, metavar="PATH", help=model_help)
    parser.add_argument("--motion", type=Path, metavar="PATH", help="motion modules of the teacher, where its folder has none")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="CLIP's vocabulary, for a checkpoint in one file")
    parser.add_argument("--prompt", action="append", required=True, help="what the clip shows; repeat it for more clips")
    parser.add_argument("--seed", type=between(0, 2**63 - 1), default=0, help="of each clip (default: 0)")
    steps_help = f"evaluations of the student (default: its own) or steps of the teacher (default: {TEACHER_STEPS})"
    parser.add_argument("--steps", type=between(1, TRAIN_TIMESTEPS), help=steps_help)
    parser.add_argument("--guidance", type=scale, help=f"CFG scale of the teacher (default: {TEACHER_GUIDANCE})")
    style_help = (
        "another look for the student: a style file, or an image model (a diffusers folder or an SD1.5 checkpoint); repeat it "
        "for more styles"
    )
    parser.add_argument("--style", type=Path, action="append", default=[], metavar="PATH", help=style_help)
    strength_help = "of each style in turn; 0 is the plain student (default: 1)"
    parser.add_argument("--style-strength", type=scale, action="append", default=[], metavar="NUMBER", help=strength_help)
    mode_help = (
        "how an image model is used: it guides the sampling, two image evaluations a step, or its weights take the place of the "
        "base's (default: guidance)"
    )
    parser.add_argument("--style-mode", choices=STYLE_MODES, default="guidance", help=mode_help)
    out_help = "video to write; several prompts are numbered (default: clip.mp4)"
    parser.add_argument("--out", type=Path, default=Path("clip.mp4"), metavar="FILE", help=out_help)
    parser.add_argument(
        "--frames",
        type=between(1, 1024),
        help="default: those it was trained on; more are made in windows",
    )
    parser.add_argument("--fps", type=between(1, 240), default=8, help="frames a second of the video (default: 8)")
    parser.add_argument("--height", type=between(8, 8192), help="pixels (default: the model's)")
    parser.add_argument("--width", type=between(8, 8192), help="pixels (default: the model's)")
    taesd_help = "decode by TAESD's decoder (taesd_decoder.safetensors): fast, with less detail; of SD1.5 and its students"
    parser.add_argument("--taesd", type=Path, metavar="FILE", help=taesd_help)
    compile_help = "compile the UNet first: takes minutes, once for all prompts; needs a C++ compiler, or Triton on a GPU"
    parser.add_argument("--compile", action="store_true", help=compile_help)
    args = parser.parse_args(argv)
    if args.guidance is not None and not args.teacher:
        parser.error("--guidance is the teacher's: a student is sampled without; leave it out or add --teacher")
    if args.style and args.teacher:
        parser.error("--style is for a student; leave out --teacher")
    args.style_strength = args.style_strength or [1.0] * len(args.style)
    if len(args.style_strength) != len(args.style):
        parser.error(
            f"expected a --style-strength for each --style or none, found {len(args.style_strength)} for {len(args.style)}"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """0, or 1 after a sentence on stderr; argparse leaves with 2."""
    args = parse(argv)
    console.set_up()
    try:
        sample(args)
    except (FileFormatError, SampleError, StackError, StudentFileError, StyleError, StyleFileError, VideoError) as error:
        print(error, file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print("Expected room for the clip on the GPU, found too little; lower --frames, --height or --width.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
