"""The rows of a table: who makes the clips, at what cost, and what is measured on them.

All rows show the same held-out prompts; whoever samples starts from the same noise.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from avdm2_nodes.diffusion.samplers import Chain, draw_noise, sample_student, sample_teacher
from avdm2_nodes.diffusion.unets import Predictor
from avdm2_nodes.files.stack import Stack
from training.data.clips import ClipFolder
from training.evaluation.backbones import Networks
from training.evaluation.feature_net import VideoFeatures
from training.evaluation.measure import Figure, figures, measure
from training.run.checkpoint import write_atomically
from training.run.folder import told_of_disk
from training.run.precision import autocast, lent
from training.run.randomness import sample_generators
from training.world import scenes

# (noise (B, C, F, h, w), text (B, L, D), one generator a sample) -> clips in model space
Sampler = Callable[[Tensor, Tensor, list[torch.Generator]], Tensor]

CPU = torch.device("cpu")
_PLACES = 2**14  # of latents (frames x height x width) that are sampled at once


@dataclass(frozen=True)
class Method:
    """A row's name, how its clips are sampled, and UNet evaluations a clip: of a video UNet, and of an image UNet on all its frames."""

    name: str
    sample: Sampler
    evaluations: int
    image_evaluations: int = 0


def steps_in_words(count: int) -> str:
    """ "1 step", "4 steps" """
    return f"{count} step{'' if count == 1 else 's'}"


def student_method(name: str, student: Predictor, timesteps: Sequence[int], chain: Chain = "renoise") -> Method:
    def sample(noise: Tensor, text: Tensor, generators) -> Tensor:
        return sample_student(student, noise, text, timesteps, generators, chain=chain)

    return Method(name, sample, len(timesteps))


def teacher_method(name: str, teacher: Predictor, stack: Stack, steps: int, guidance: float) -> Method:
    """The teacher by DDIM on trailing steps; guidance 1 is no guidance, and half the evaluations."""

    def sample(noise: Tensor, text: Tensor, generators) -> Tensor:
        return sample_teacher(teacher, noise, text, stack.encode_text([""]).to(noise), steps, guidance)

    return Method(name, sample, steps * (1 if guidance == 1 else 2))


class Gallery:
    """Prompts and the way their clips are sampled: every method starts from the same noise."""

    def __init__(
        self, stack: Stack, prompts: Sequence[str], frames: int, height: int, width: int, seed: int = 0, precision: str = "auto",
        device: torch.device = CPU,
    ):  # fmt: skip
        self.stack, self.prompts, self.seed, self.precision = stack, list(prompts), seed, precision
        self.shape = (stack.vae.config.latent_channels, frames, height // stack.pixels, width // stack.pixels)
        self.batch = max(1, _PLACES // math.prod(self.shape[1:]))  # clips
        self.device = device  # where the UNets are that sample; VAE and text encoder come there when they are needed

    @torch.no_grad()
    def sample(self, method: Method, count: int | None = None) -> tuple[np.ndarray, float]:
        """(clips (N, F, H, W, 3) uint8, seconds a clip without decoding) of the first `count` prompts, by default all."""
        count = min(count or len(self.prompts), len(self.prompts))
        seconds, latents = 0.0, []
        with lent(self.device, self.stack.text_encoder):
            for start in tqdm(range(0, count, self.batch), method.name, leave=False, mininterval=2):
                samples = range(start, min(start + self.batch, count))
                generators = sample_generators(samples, self.seed, "evaluation")
                noise = draw_noise((len(samples), *self.shape), generators, self.device)
                with autocast(self.device, self.precision):
                    text = self.stack.encode_text(self.prompts[samples.start : samples.stop])
                    began = time.perf_counter()
                    latents.append(method.sample(noise, text.float(), generators).cpu())
                seconds += time.perf_counter() - began
        with self.vae():
            return np.concatenate([self.stack.decode_clips(part).numpy() for part in latents]), seconds / count

    @contextlib.contextmanager
    def vae(self) -> Iterator[None]:
        """A context in which clips are encoded and decoded, on the device and in its arithmetic."""
        with lent(self.device, self.stack.vae), autocast(self.device, self.precision):
            yield


class Bench(Gallery):
    """A gallery of the miniature world's held-out prompts, whose clips are measured against ones rendered in `style`.

    `judge_style` asks also whether clips are in that style.
    """

    def __init__(
        self, stack: Stack, net: VideoFeatures, clips: int, seed: int = 0, style: str = "plain", judge_style: bool = False,
        precision: str = "auto", device: torch.device = CPU,
    ):  # fmt: skip
        self.net, self.style, self.judge_style = net, style, judge_style
        self.contents = scenes.draw_contents(clips, held_out=True, seed=seed)
        captions = [content.caption for content in self.contents]
        super().__init__(stack, captions, scenes.FRAMES, scenes.SIDE, scenes.SIDE, seed, precision, device)

    def real_clips(self, draw: int) -> np.ndarray:
        """(N, F, H, W, 3) uint8: rendered clips of the prompts; another `draw` is another place, speed and ground of each."""
        rngs = (np.random.default_rng([self.seed, draw, i]) for i in range(len(self.contents)))
        return np.stack([scenes.render(c, self.style, rng).frames for c, rng in zip(self.contents, rngs, strict=True)])

    def reference(self) -> dict[str, np.ndarray]:
        return self.measure(self.real_clips(draw=0))

    def floor_clips(self) -> np.ndarray:
        """Other real clips than the reference's, through the VAE: as near as anything sampled could come."""
        parts = torch.from_numpy(self.real_clips(draw=1)).split(self.batch)
        with self.vae():
            return np.concatenate([self.stack.decode_clips(self.stack.encode_clips(part)).numpy() for part in parts])

    def measure(self, clips: np.ndarray) -> dict[str, np.ndarray]:
        return measure(clips, self.contents[: len(clips)], self.net, self.style if self.judge_style else None)

    def figures(self, row: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, Figure]:
        return figures(row, reference, self.prompts, self.seed)


class VideoBench(Gallery):
    """A gallery of the captions of real videos, whose clips public networks compare with those videos.

    The first `clips` videos give the prompts and the reference; as many others, where the folder has them, the floor.
    """

    def __init__(
        self, stack: Stack, networks: Networks, real: ClipFolder, clips: int, seed: int = 0, precision: str = "auto",
        device: torch.device = CPU,
    ):  # fmt: skip
        self.networks, self.real = networks, real
        super().__init__(stack, real.captions[:clips], real.frames, real.height, real.width, seed, precision, device)

    def reference(self) -> dict[str, np.ndarray]:
        return self.networks.measure(self.real.read, self.prompts, len(self.prompts))

    def floor_clips(self) -> np.ndarray:
        """Real clips through the VAE: others than the reference's as far as there are."""
        numbers = range(len(self.real))[-len(self.prompts) :]
        with self.vae():
            clips = (self.stack.encode_clips(self.real.read(i)[None]) for i in numbers)
            return np.concatenate([self.stack.decode_clips(clip).numpy() for clip in clips])

    def measure(self, clips: np.ndarray) -> dict[str, np.ndarray]:
        return self.networks.measure(lambda i: torch.from_numpy(clips[i]), self.prompts, len(clips))

    def figures(self, row: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, Figure]:
        return self.networks.figures(row, reference, self.seed)


def kept(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What `make` measures, from the file at `path` if it was measured before: a table goes on at the row where it stopped.

    RunFolderError where it cannot be written.
    """
    if path.exists():
        return load_file(path)
    row = make()
    arrays = {name: np.ascontiguousarray(array) for name, array in row.items()}
    with told_of_disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: save_file(arrays, temporary))
    return row
