"""The student's clips of an update: what all its losses look at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avdm2_nodes.diffusion.samplers import backward_simulation, draw_noise, to_device
from avdm2_nodes.diffusion.schedules import VIDEO, Schedule
from training.method.losses import scale_gradient
from training.run.config import DistillConfig
from training.run.randomness import chain_steps, sample_generators


@dataclass
class Made:
    """Clips that the student made for one part of a batch: they serve its own update and, detached, the critics'."""

    samples: Sequence[int]  # global sample numbers, which key all randomness
    text: Tensor  # (B, L, D)
    real: Tensor  # (B, C, F, h, w), clips of the data with the same captions
    x_t: Tensor  # (B, C, F, h, w), states of the student's chain at t
    t: Tensor  # (B,)
    next_t: Tensor  # (B,) timesteps that the chain goes on at, 0 at its end; on the CPU
    least_t: Tensor  # (B,) timesteps of the video schedule at and above which the clips are judged; on the CPU
    fake: Tensor  # (B, C, F, h, w), the x0 that it made of x_t, detached
    target: Tensor | None = None  # (B, C, F, h, w), what a peer's x0 is to be like

    def __getitem__(self, chosen: list[int]) -> "Made":
        """The clips of these places in the batch only."""
        if len(chosen) == len(self.samples):
            return self
        tensors = (self.text, self.real, self.x_t, self.t, self.next_t, self.least_t, self.fake, self.target)
        return Made([self.samples[i] for i in chosen], *(None if tensor is None else tensor[chosen] for tensor in tensors))

    def judged_from(self, schedule: Schedule) -> Tensor:
        """(B,) timesteps of a schedule with as much noise as `least_t` has of the video's."""
        return schedule.timestep_of(VIDEO.alphas_cumprod[self.least_t])

    def judged(self, schedule: Schedule, t_max: int) -> list[int]:
        """The places of the clips that a loss judges: those whose lowest timestep to be judged at lies within its range."""
        return (self.judged_from(schedule) < t_max).nonzero().flatten().tolist()


def chain_places(samples: Sequence[int], config: DistillConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Of samples (B,): their steps of the student's chain, the timesteps that it goes on at, and those that they are judged from.

    An x0 in the middle of the chain is diffused to the next step, so with `student.phased` it is judged at that much noise and more
    only: its law matters there alone, and judged at less, each step would have to be a one-step generator (Phased DMD, arXiv
    2510.27684).
    """
    steps = chain_steps(samples, len(config.student.steps), config.run.seed)
    next_t = torch.tensor([*config.student.steps[1:], 0])[steps]
    return steps, next_t, next_t if config.student.phased else torch.zeros_like(next_t)


def make_clips(
    student: Callable, real: Tensor, text: Tensor, samples: Sequence[int], config: DistillConfig
) -> tuple[Made, Tensor]:
    """The student's clips, each at a step of its own chain, and the same x0 (B, C, F, h, w) with its gradient."""
    timesteps, device = torch.as_tensor(config.student.steps), real.device
    steps, next_t, least_t = chain_places(samples, config)
    generators = sample_generators(samples, config.run.seed, "student")
    noise = draw_noise(real.shape, generators, device)
    x_t, x0 = backward_simulation(student, noise, text, config.student.steps, steps, generators)
    # x0 = (x_t - sigma eps) / alpha magnifies an error of eps up to 25 times, and its gradient with it.
    t = to_device(timesteps[steps], device)
    alpha, sigma = VIDEO.alpha_sigma(t, x0)
    made = Made(samples, text, real, x_t, t, next_t, least_t, x0.detach())
    return made, scale_gradient(x0, (alpha / sigma).clamp(max=1.0))
