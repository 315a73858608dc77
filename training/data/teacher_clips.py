"""Clips without videos: sampled from a teacher, for prompts."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from avdm2_nodes.diffusion.samplers import draw_noise, sample_teacher
from avdm2_nodes.diffusion.unets import Predictor
from training.data import DataError
from training.data.cache import Cache, LatentClip, Maker, space_of, write_cache
from training.data.captions import words
from training.data.latents import Encoder, LatentClips, Prompts, latent_shape
from training.data.unusable import Unusable
from training.run.config import DistillConfig
from training.run.precision import autocast, uses_bf16
from training.run.randomness import sample_generators
from training.run.reading import UnreadableError, read_text

SHARD_CLIPS = 32  # the most that an interruption loses


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank. DataError where it cannot be read or has none."""
    try:
        prompts = [words(line) for line in read_text(path).splitlines()]
    except UnreadableError as error:
        raise DataError(f"Expected a text of prompts at {path}, found: {error}; name another.") from error
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise DataError(f"Expected a prompt a line in {path}, found none; write some.")
    return prompts


def sampled_clips(
    config: DistillConfig, teacher: Predictor, teacher_hash: str, encoder: Encoder, prompts: Sequence[str]
) -> tuple[dict, Maker]:
    """(what the clips are made of, their maker): clip i shows prompt i, then the first again, from a generator of its own.

    `teacher_hash` names the teacher. As many at once as a training step takes, never over the bounds of a part.
    """
    run, steps, device = config.run, config.evaluation.teacher_steps, encoder.device
    guidance, at_once = config.evaluation.teacher_guidance, config.run.clips_at_once
    shape, empty = latent_shape(config, encoder), encoder.text("")[None].to(device)

    def make(parts: Sequence[range]) -> Iterator[LatentClip | Unusable]:
        for part in parts:
            for start in range(part.start, part.stop, at_once):
                samples = range(start, min(start + at_once, part.stop))
                captions = [prompts[i % len(prompts)] for i in samples]
                texts = [encoder.text(caption) for caption in captions]
                noise = draw_noise((len(samples), *shape), sample_generators(samples, run.seed, "teacher clip"), device)
                with autocast(device, run.precision):
                    clips = sample_teacher(teacher, noise, torch.stack(texts).to(device), empty, steps, guidance)
                for i, caption, clip, text in zip(samples, captions, clips.float().cpu(), texts, strict=True):
                    if clip.isfinite().all():
                        yield LatentClip(f"clip {i}", caption, clip, text)
                    else:
                        yield Unusable(f"clip {i}", f"Expected finite numbers from the teacher for {caption!r}, found others.")

    source = {
        "kind": "teacher",
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "teacher": teacher_hash,
        "steps": steps,
        "guidance": guidance,
        "seed": run.seed,
        "at_once": at_once,
    }
    return source, make


def clips_for_prompts(
    config: DistillConfig, folder: Path, teacher: Predictor, teacher_hash: str, encoder: Encoder
) -> LatentClips:
    """What `data.prompts` stands for: where ADM is on, a cache in `folder` of the teacher's clips, made as far as it is not there."""
    prompts = read_prompts(config.data.prompts)
    if not config.has_heads and config.method.kind == "avdm2":
        shape = latent_shape(config, encoder)
        return LatentClips(Prompts(prompts, shape, encoder), encoder, shape)
    space = space_of(encoder.stack, config.data)
    source, make = sampled_clips(config, teacher, teacher_hash, encoder, prompts)
    source["precision"] = "bf16" if uses_bf16(encoder.device, config.run.precision) else "float32"
    folder.mkdir(exist_ok=True)
    write_cache(folder, space | {"stride": None, "fps": None}, source, config.data.clips, SHARD_CLIPS, make)
    return LatentClips(Cache(folder, space), encoder, latent_shape(config, encoder))
