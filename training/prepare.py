"""Prepares clips for training: every video is decoded and checked once, latents and text embeddings are kept in shards with hashes.

python training/prepare.py --out FOLDER [--config FILE] [--section.key VALUE ...]
python training/prepare.py --out FOLDER --prompts FILE [--clips N] [--config FILE] [--section.key VALUE ...]

The first takes the clips of `data.folder`, the second, without any video, samples them from the teacher. The settings are those of
training/distill.py, which then trains on them with `--data.folder FOLDER`. A command that was interrupted goes on when it is given again.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository in place of this folder: runs from anywhere
    from training.run import entry

    entry.begin()
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; nothing is looked up anywhere

import argparse
import logging

import torch
from diffusers import MotionAdapter

from avdm2_nodes.diffusion.unets import video_predictor
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.stack import Stack, load_motion, load_stack
from training.data import DataError
from training.data.cache import Cache, is_cache, space_of, write_cache
from training.data.clips import ClipFolder, needs_clips, tell_of_rates
from training.data.latents import Encoder
from training.data.sources import render_clips, require_positions, require_whole
from training.data.teacher_clips import read_prompts, sampled_clips
from training.data.unusable import Unusable, counted, named, require_none
from training.data.workers import encoded_videos, told_of_workers
from training.method.errors import EXPECTED_ERRORS
from training.run import console
from training.run.command_line import load_config
from training.run.config import DistillConfig
from training.run.console import between
from training.run.folder import RunFolder, require_writable
from training.run.precision import pick_device, uses_bf16
from training.run.sections import ModelConfig

logger = logging.getLogger("prepare")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command's own arguments, and the rest, which are settings."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Every other argument is one of training/distill.py (see its --help): the data, the model, evaluation.teacher_steps "
        "and evaluation.teacher_guidance of the teacher, run.seed, run.device and run.precision bear on what is made.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=console.path, required=True, metavar="FOLDER", help="where the cache goes")
    parser.add_argument(
        "--prompts", type=console.path, metavar="FILE", help="a text of prompts, one a line, for clips of the teacher"
    )
    parser.add_argument("--clips", type=between(1, 10**9), metavar="N", help="of the teacher (default: one a prompt)")
    workers_help = "processes that decode videos (default: one a CPU core)"
    parser.add_argument("--workers", type=between(0, 1024), default=os.cpu_count() or 1, metavar="N", help=workers_help)
    shard_help = "clips a shard, the most that an interruption loses (default: 64)"
    parser.add_argument("--shard-clips", type=between(1, 10**6), default=64, metavar="N", help=shard_help)
    strict_help = "a clip or a caption that cannot be used is an error, not left out (as --data.strict true)"
    parser.add_argument("--strict", action="store_true", help=strict_help)
    args, settings = parser.parse_known_args(argv)
    if args.strict:
        settings += ["--data.strict", "true"]
    if args.clips and not args.prompts:
        parser.error("--clips is for clips of the teacher: name their --prompts too, or leave it out")
    return args, settings


def main(argv: list[str] | None = None) -> None:
    args, settings = parse(argv)
    prepare(args, load_config(settings))


def prepare(args: argparse.Namespace, config: DistillConfig) -> None:
    """What the command line asks for. One of EXPECTED_ERRORS, each a sentence."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    _require_room_for_a_cache(args.out)
    require_writable(args.out)
    prompts = read_prompts(args.prompts) if args.prompts else []
    device, model = pick_device(config.run.device), config.model
    stack = load_stack(model.teacher, model.motion, with_motion=bool(prompts), tokenizer=model.tokenizer)
    for part in (stack.vae, stack.text_encoder):
        part.to(device)
    encoder, space = Encoder(stack, device, config.run.precision), space_of(stack, config.data)
    require_positions(stack.motion or _motion_of(model), config.data.frames)
    left_out: list[Unusable] = []
    if prompts:
        count, space["stride"], space["fps"] = args.clips or len(prompts), None, None
        require_whole(encoder.tell_of_cut(prompts), config.data.strict)
        torch.nn.Module.to(stack.teacher, device)  # diffusers' own `to` warns of parts that this UNet does not have
        source, make = sampled_clips(config, video_predictor(stack.teacher), weights_hash(stack.teacher), encoder, prompts)
    else:
        clips = open_videos(config)
        count, left_out = len(clips), clips.left_out
        require_whole(encoder.tell_of_cut(clips.captions), config.data.strict)
        source, make = encoded_videos(clips, encoder, args.workers)
    source["precision"] = "bf16" if uses_bf16(device, config.run.precision) else "float32"
    with (
        RunFolder(args.out, count * _clip_bytes(config, stack, encoder) - _written_bytes(args.out), "--out"),
        told_of_workers(),
    ):
        usable, skipped = write_cache(args.out, space, source, count, args.shard_clips, make, left_out)
    named(skipped)
    left_out = sorted([*left_out, *skipped], key=lambda clip: clip.name)
    if not usable:
        raise DataError(
            f"Expected clips that can be used, found {len(left_out)} that cannot be used, first: {left_out[0].reason}"
        )
    if not prompts and config.data.fps is None:
        tell_of_rates(Cache(args.out, space).rates)
    logger.info("%d clips are in %s, %s. Train on them with --data.folder %s", usable, args.out, counted(left_out), args.out)
    require_none(left_out, args.prompts or config.data.folder, config.data.strict)


def _motion_of(model: ModelConfig) -> MotionAdapter | None:
    """The motion modules that training will take, where they are named or lie in the teacher's folder."""
    beside = model.teacher / "motion_adapter"
    return load_motion(model.motion or beside) if model.motion or beside.is_dir() else None


def open_videos(config: DistillConfig) -> ClipFolder:
    """The captioned videos of `data.folder`, none decoded yet. DataError where there are none, or a cache in their place."""
    data = config.data
    if is_cache(data.folder):
        raise DataError(f"Expected videos or tar shards in {data.folder}, found a cache of them; train on it as it is.")
    if data.render and needs_clips(data.folder):
        render_clips(config)
    return ClipFolder(
        data.folder, data.frames, data.height, data.width, data.stride, check=False, fps=data.fps, strict=data.strict
    )


def _require_room_for_a_cache(folder: Path) -> None:
    """DataError for a path that is a file, or a folder that holds other things than a cache."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"Expected a folder for the cache at {folder}, found a file; name another with --out.")
    if folder.is_dir() and not is_cache(folder) and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise DataError(f"Expected a new or empty folder for the cache, found {folder} in use; name another with --out.")


def _clip_bytes(config: DistillConfig, stack: Stack, encoder: Encoder) -> int:
    data = config.data
    latents = stack.vae.config.latent_channels * data.frames * (data.height // stack.pixels) * (data.width // stack.pixels)
    return 4 * (latents + encoder.text("").numel())


def _written_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0


if __name__ == "__main__":
    console.set_up()
    entry.run(main, EXPECTED_ERRORS, "Interrupted; the same command goes on where it was.")
