"""Samples clips into video files: python training/sample.py --prompt "…" --seed 0 --out clip.mp4 (--help lists the rest)."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this script's own folder, so that it runs from anywhere with nothing of ours installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from training.run import entry

    entry.begin()

import argparse
import os

import torch
from tqdm import tqdm

from avdm2_nodes.diffusion.precision import decoding_dtype, sampling_dtype
from avdm2_nodes.diffusion.samplers import student_timesteps
from avdm2_nodes.diffusion.schedules import TRAIN_TIMESTEPS
from avdm2_nodes.diffusion.style import StyleError
from avdm2_nodes.files.containers import FileFormatError
from avdm2_nodes.files.paths import is_folder
from avdm2_nodes.files.peers import is_peer, load_peer
from avdm2_nodes.files.stack import StackError, load_stack
from avdm2_nodes.files.student import read_student
from avdm2_nodes.files.student_info import StudentFileError
from avdm2_nodes.files.student_unet import student_unet
from avdm2_nodes.files.style import StyleFileError
from avdm2_nodes.files.taesd import load_taesd_file
from training.data.captions import cut_by
from training.data.video import VideoError, codec, require_video_place, write_video
from training.evaluation.sampling import (
    STYLE_MODES,
    SampleError,
    add_styles,
    generate,
    require_positions,
    student_sampler,
    style_guide,
    teacher_sampler,
    teacher_size,
)
from training.run import console
from training.run.config import MODEL, STUDENT
from training.run.console import between, scale
from training.run.packages import MissingPackageError
from training.run.precision import pick_device

TEACHER_STEPS, TEACHER_GUIDANCE = 25, 3.0


EXPECTED_ERRORS = (  # told in their own words
    FileFormatError, MissingPackageError, SampleError, StackError, StudentFileError, StyleError, StyleFileError, VideoError,
)  # fmt: skip


def sample(args: argparse.Namespace) -> None:
    """What the command line asks for. One of EXPECTED_ERRORS, before any clip is written or between two."""
    codec()  # before minutes of sampling
    outs = numbered(args.out, len(args.prompt))
    if not is_folder(args.out.parent):
        raise SampleError(f"Expected a folder at {args.out.parent} for {args.out.name}, found none; make it.")
    for out in outs:
        require_video_place(out)
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
    require_positions(unet, window)
    for prompt in cut_by(stack.tokenizer, args.prompt):
        print(
            f"This prompt is longer than the text encoder takes ({stack.tokenizer.model_max_length} tokens), the rest is not seen: "
            f"{prompt}",
            file=sys.stderr,
        )
    frames, height, width = args.frames or window, args.height or height, args.width or width
    if args.taesd:
        latents, stack.vae = stack.vae.config.latent_channels, load_taesd_file(args.taesd)
        if latents != stack.vae.config.latent_channels:
            raise SampleError(f"Expected a model of SD1.5's latents for --taesd, found {latents} channels; leave out --taesd.")
    # diffusers' own `to` warns of parts that these networks do not have
    for network in (unet, *([stack.image_unet, *(style for style, _ in guiding)] if guiding else [])):
        torch.nn.Module.to(network, device, sampling_dtype(device))
    torch.nn.Module.to(stack.vae, device, decoding_dtype(device))
    stack.text_encoder.to(device)
    guides = [
        style_guide(style, stack.image_unet, stack.encode_text([""]), strength, i)
        for i, (style, strength) in enumerate(guiding)
    ]
    if args.compile:
        keep_compiled()
    sampler = (
        teacher_sampler(unet, stack.encode_text([""]), steps, guidance, window, args.compile)
        if args.teacher
        else student_sampler(unet, timesteps, window, info.chain, args.compile, guides)
    )
    with tqdm(total=steps * len(outs), unit="step", desc="teacher" if args.teacher else "student") as bar:
        for prompt, out in zip(args.prompt, outs, strict=True):
            clip = generate(
                sampler, stack, [prompt], [args.seed], frames, height, width, callback=lambda done, x0: bar.update()
            )
            write_video(out, clip[0].numpy(), args.fps)
            tqdm.write(str(out))


def keep_compiled() -> None:
    """What is compiled is kept between runs, in a folder of this user's own, unless torch was told of another."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "avdm2" / "compiled"))


def numbered(out: Path, count: int) -> list[Path]:
    """`out` itself for one clip, clip-1.mp4, clip-2.mp4, … for several."""
    if count == 1:
        return [out]
    digits = len(str(count))
    return [out.with_name(f"{out.stem}-{i:0{digits}d}{out.suffix}") for i in range(1, count + 1)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sample clips from a student, or from its teacher.")
    student_help = "student file, or an AnimateDiff-Lightning or AnimateLCM module (default: the shipped student)"
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--student", type=console.path, default=STUDENT, metavar="FILE", help=student_help)
    who.add_argument("--teacher", action="store_true", help="sample the teacher instead")
    model_help = "the teacher, or the student's base: a diffusers folder or an SD1.5 checkpoint (default: the miniature)"
    parser.add_argument("--model", type=console.path, default=MODEL, metavar="PATH", help=model_help)
    parser.add_argument(
        "--motion", type=console.path, metavar="PATH", help="motion modules of the teacher, where its folder has none"
    )
    parser.add_argument(
        "--tokenizer", type=console.path, metavar="FOLDER", help="CLIP's vocabulary, for a checkpoint in one file"
    )
    parser.add_argument(
        "--prompt", type=console.prompt, action="append", required=True, help="what the clip shows; repeat it for more clips"
    )
    parser.add_argument("--seed", type=between(0, 2**63 - 1), default=0, help="of each clip (default: 0)")
    steps_help = f"evaluations of the student (default: its own) or steps of the teacher (default: {TEACHER_STEPS})"
    parser.add_argument("--steps", type=between(1, TRAIN_TIMESTEPS), help=steps_help)
    parser.add_argument("--guidance", type=scale, help=f"CFG scale of the teacher (default: {TEACHER_GUIDANCE})")
    style_help = (
        "another look for the student: a style file, or an image model (a diffusers folder or an SD1.5 checkpoint); repeat it "
        "for more styles"
    )
    parser.add_argument("--style", type=console.path, action="append", default=[], metavar="PATH", help=style_help)
    strength_help = "of each style in turn; 0 is the plain student (default: 1)"
    parser.add_argument("--style-strength", type=scale, action="append", default=[], metavar="NUMBER", help=strength_help)
    mode_help = (
        "how an image model is used: it guides the sampling, two image evaluations a step, or its weights take the place of the "
        "base's (default: guidance)"
    )
    parser.add_argument("--style-mode", choices=STYLE_MODES, default="guidance", help=mode_help)
    out_help = "video to write; several prompts are numbered (default: clip.mp4)"
    parser.add_argument("--out", type=console.path, default=Path("clip.mp4"), metavar="FILE", help=out_help)
    parser.add_argument(
        "--frames",
        type=between(1, 1024),
        help="default: those it was trained on; more are made in windows",
    )
    parser.add_argument("--fps", type=between(1, 240), default=8, help="frames a second of the video (default: 8)")
    parser.add_argument("--height", type=between(8, 8192), help="pixels (default: the model's)")
    parser.add_argument("--width", type=between(8, 8192), help="pixels (default: the model's)")
    taesd_help = "decode by TAESD's decoder (taesd_decoder.safetensors): fast, with less detail; of SD1.5 and its students"
    parser.add_argument("--taesd", type=console.path, metavar="FILE", help=taesd_help)
    compile_help = (
        "compile the UNet's layers first, once for all prompts, and keep what is made for later runs; needs a C++ compiler, or "
        "Triton on a GPU"
    )
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
    except EXPECTED_ERRORS as error:
        print(error, file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print("Expected room for the clip on the GPU, found too little; lower --frames, --height or --width.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    entry.run(main)
