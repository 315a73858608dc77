"""Sampling: the student's few-step chain and the teacher's many guided steps, in model space and on the video schedule."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from diffusers import DDIMScheduler
from einops import rearrange
from torch import Tensor

from .schedules import TRAIN_TIMESTEPS, VIDEO, Schedule, lcm_timesteps, trailing_timesteps
from .unets import Predictor, guided

Chain = Literal["renoise", "euler", "lcm"]  # how a few-step chain goes on from an x0
Generators = torch.Generator | Sequence[torch.Generator]
Callback = Callable[[int, Tensor], None]  # (steps done, the x0 that this step predicts)
Refine = Callable[[Tensor, int], Tensor]  # (an x0, its step from 0) -> the x0 to go on with


def draw_noise(
    shape: Sequence[int], generator: Generators, device: torch.device | str = "cpu", index: Sequence[int] | None = None
) -> Tensor:
    """Float32 noise for images (B, C, h, w) or clips (B, C, F, h, w), drawn on the CPU: a seed gives the same clip on every device.

    A clip's noise is drawn frame by frame, as ComfyUI draws it for a batch of frames. With a list of generators, sample i
    of the batch comes from the i-th alone. `index` (F) says which frames of a longer clip these are: each gets that frame's noise.
    """
    if not isinstance(generator, torch.Generator):
        return to_device(torch.cat([draw_noise((1, *shape[1:]), g, index=index) for g in generator]), device)
    if len(shape) == 4:
        return to_device(torch.randn(*shape, generator=generator), device)
    batch, channels, frames, height, width = shape
    drawn = torch.randn(batch, max(index) + 1 if index else frames, channels, height, width, generator=generator)
    drawn = drawn[:, list(index)] if index else drawn
    return to_device(rearrange(drawn, "b f c h w -> b c f h w").contiguous(), device)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on a device; the CPU does not wait until a GPU has done what it was given before."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def predict_x0(student: Predictor, x_t: Tensor, t: Tensor | int, text: Tensor) -> Tensor:
    """x0 of one student step, (B, C, F, h, w) float32; t of shape () or (B,)."""
    t = torch.full((len(x_t),), t, device=x_t.device) if isinstance(t, int) else t.to(x_t.device).expand(len(x_t))
    return VIDEO.x0_from_eps(x_t, student(x_t, t, text), t)


def sample_student(
    student: Predictor,
    noise: Tensor,
    text: Tensor,
    timesteps: Sequence[int],
    generator: Generators,
    callback: Callback | None = None,
    index: Sequence[int] | None = None,
    refine: Refine | None = None,
    chain: Chain = "renoise",
) -> Tensor:
    """The student's chain (DMD2, arXiv 2405.14867, section 4.4): predict x0, diffuse it to the next timestep with fresh noise.

    noise (B, C, F, h, w) is x_t at timesteps[0]; the last x0 is the clip. No guidance: a step is one evaluation. `index` is
    `draw_noise`'s; `refine` may change each x0 before it goes on. Other chains: "lcm" scales each x0 by `boundary_scaling`; "euler"
    goes on with the noise that x_t holds in place of fresh noise, an Euler step of the probability flow (arXiv 2206.00364).
    """
    x_t = x0 = noise
    for i, t in enumerate(timesteps):
        x0 = predict_x0(student, x_t, t, text)
        if chain == "lcm":
            c_skip, c_out = boundary_scaling(t)
            x0 = c_skip * x_t + c_out * x0
        if refine is not None:
            x0 = refine(x0, i)
        if callback is not None:
            callback(i + 1, x0)
        if i + 1 < len(timesteps):
            if chain == "euler":
                eps = VIDEO.eps_from_x0(x_t, x0, t)
            else:
                eps = draw_noise(x0.shape, generator, x0.device, index)
            x_t = VIDEO.diffuse(x0, eps, timesteps[i + 1])
    return x0


def student_timesteps(own: Sequence[int], steps: int, chain: Chain = "renoise") -> list[int]:
    """The timesteps of a student in `steps` evaluations: its own where it has as many, else evenly spaced at the trailing ends.

    ValueError for a number outside 1..1000, of a latent consistency model 1..100.
    """
    if steps == len(own):
        return list(own)
    return lcm_timesteps(steps) if chain == "lcm" else trailing_timesteps(steps)


def boundary_scaling(t: int, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> tuple[float, float]:
    """(c_skip, c_out) of a consistency model's x0 = c_skip x_t + c_out x0_hat (LCM, arXiv 2310.04378): (1, 0) at t = 0, soon (0, 1)."""
    scaled = timestep_scaling * t
    norm = scaled**2 + sigma_data**2
    return sigma_data**2 / norm, scaled / norm**0.5


def backward_simulation(
    student: Predictor,
    noise: Tensor,
    text: Tensor,
    timesteps: Sequence[int],
    steps: Tensor,
    generators: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor]:
    """(x_t, x0) of step `steps[i]` (from 0) of sample i's own chain; the steps before it run without gradient (DMD2, section 4.5).

    noise (B, C, F, h, w), steps (B,), one generator a sample. The last evaluation, with gradient, is one for the whole batch.
    """
    x_t = noise.clone()
    with torch.no_grad():
        for i in range(int(steps.max())):
            on = (steps > i).nonzero().flatten().tolist()  # the samples whose own step is yet to come
            x0 = predict_x0(student, x_t[on], timesteps[i], text[on])
            x_t[on] = VIDEO.diffuse(x0, draw_noise(x0.shape, [generators[j] for j in on], x0.device), timesteps[i + 1])
    return x_t, predict_x0(student, x_t, torch.as_tensor(timesteps)[steps].to(x_t.device), text)


@torch.no_grad()
def teacher_x0(
    teacher: Predictor, x_t: Tensor, t: Tensor, until: Tensor, text: Tensor, empty_text: Tensor, guidance: float, substeps: int
) -> Tensor:
    """The guided teacher's x0 for x_t at t (B,), after `substeps` DDIM steps evenly spaced from t towards `until` (B,).

    The last step predicts and does not move. With one substep it is the guided prediction itself (Meng et al., arXiv 2210.03142);
    more follow the teacher's trajectory to a sharper one (progressive distillation, Salimans & Ho, arXiv 2202.00512).
    """
    predict, timesteps = guided(teacher, empty_text, guidance), t
    for i in range(1, substeps + 1):
        eps = predict(x_t, timesteps, text)
        x0 = VIDEO.x0_from_eps(x_t, eps, timesteps)
        if i < substeps:
            timesteps = (t + (until - t) * i / substeps).round().long()
            x_t = VIDEO.diffuse(x0, eps, timesteps)
    return x0


def kept_timesteps(timesteps: Sequence[int], denoise: float) -> list[int]:
    """Where video-to-video starts: the timesteps up to 1000 * denoise, all of them at 1. ValueError where none is left."""
    kept = [t for t in timesteps if denoise >= 1 or t <= TRAIN_TIMESTEPS * denoise]
    if not kept:
        raise ValueError(
            f"Expected denoise of at least {(timesteps[-1] + 1) / TRAIN_TIMESTEPS:.2f} with the steps "
            f"{', '.join(map(str, timesteps))}, found {denoise:.2f}, which leaves none; raise it, or the number of steps."
        )
    return kept


def ddim_scheduler(steps: int, spacing: str = "trailing", schedule: Schedule = VIDEO) -> DDIMScheduler:
    """diffusers' DDIM on a schedule, with its `steps` timesteps set."""
    scheduler = DDIMScheduler(
        beta_schedule=schedule.beta_schedule,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        clip_sample=False,
        timestep_spacing=spacing,
        steps_offset=1 if spacing == "leading" else 0,
    )
    scheduler.set_timesteps(steps)
    return scheduler


@torch.no_grad()
def sample_teacher(
    teacher: Predictor,
    noise: Tensor,
    text: Tensor,
    empty_text: Tensor,
    steps: int,
    guidance: float,
    spacing: str = "trailing",
    callback: Callback | None = None,
    timesteps: Sequence[int] | None = None,
    schedule: Schedule = VIDEO,
) -> Tensor:
    """DDIM (Song et al., arXiv 2010.02502) with classifier-free guidance; deterministic given `noise` (B, C, F, h, w).

    empty_text (1, L, D) is the empty prompt's embedding. A step is two evaluations, or one at guidance 1. `spacing` is diffusers'
    `timestep_spacing`: trailing starts at 999, as the student does. `timesteps` are the last of these steps, for a clip that
    was diffused to the first of them. With an image UNet and its `schedule`, noise and result are images (B, C, h, w).
    """
    scheduler = ddim_scheduler(steps, spacing, schedule)
    predict, x_t = guided(teacher, empty_text, guidance), noise
    for i, t in enumerate(timesteps or scheduler.timesteps.tolist()):
        eps = predict(x_t, torch.full((len(x_t),), t, device=x_t.device), text)
        step = scheduler.step(eps, t, x_t)
        x_t = step.prev_sample
        if callback is not None:
            callback(i + 1, step.pred_original_sample)
    return x_t
