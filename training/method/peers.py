"""Three other ways to a student of few steps, from the same teacher and in the same loop: `method.kind`.

They are there to be compared with. Each begins from clips of the data that are diffused, where AVDM2 begins from the student's own
chain, and learns from the guided teacher (`warmup.guidance`) in every update.

- consistency: AnimateLCM (arXiv 2402.00769), latent consistency distillation with the guidance in the teacher's step.
- progressive: AnimateDiff-Lightning (arXiv 2403.12706), a step of the student for `warmup.substeps` of its teacher's; by regression in the
  warm-up, then adversarially.
- motion-consistency: MCM (arXiv 2406.06890), consistency of what changes between frames alone, on the data's and on the student's own
  states, and an adversarial loss on single frames. MCM's discriminator has DINOv2 and CLIP features; here it is ADM's, on frames.
"""

from dataclasses import replace

import torch
from torch import Tensor

from avdm2_nodes.diffusion.samplers import boundary_scaling, draw_noise, teacher_x0, to_device
from avdm2_nodes.diffusion.schedules import TRAIN_TIMESTEPS, VIDEO
from avdm2_nodes.diffusion.unets import Predictor
from training.method.losses import guidance_loss, pseudo_huber
from training.method.made import Made, chain_places, make_clips
from training.run.config import DistillConfig
from training.run.randomness import draw_timesteps, sample_generators

SKIP = 20  # timesteps between two states of one trajectory, of 1000 (LCM, arXiv 2310.04378, appendix: k = 20)


def make_peer_clips(
    student: Predictor,
    averaged: Predictor,
    teacher: Predictor,
    real: Tensor,
    text: Tensor,
    empty_text: Tensor,
    samples: range,
    config: DistillConfig,
) -> tuple[Made, Tensor]:
    """What the student makes of an update's clips (B, C, F, h, w), and the same with its gradient, of a run of one of these kinds.

    `averaged` is the student with its averaged weights. In progressive distillation the clips are the states at the next step, the
    student's in `fake` and the teacher's in `real`. In the others they are x0, and `Made.target` is what they are to be consistent with.
    """
    kind, device = config.method.kind, real.device
    generators = sample_generators(samples, config.run.seed, "student")
    steps, next_t, _ = chain_places(samples, config)
    if kind == "progressive":
        t = torch.as_tensor(config.student.steps)[steps]
    else:
        places = torch.zeros(len(real), dtype=torch.long)
        t = SKIP * draw_timesteps(generators, places, TRAIN_TIMESTEPS // SKIP - 1) + SKIP - 1
        next_t = (t - SKIP).clamp(min=0)
    x_t = VIDEO.diffuse(real, draw_noise(real.shape, generators, device), to_device(t, device))
    if kind == "motion-consistency":
        own = [
            i for i, sample in enumerate(samples) if sample // len(config.student.steps) % 2
        ]  # half of them, and of each step
        if own:
            with torch.no_grad():
                chain, _ = make_clips(student, real[own], text[own], [samples[i] for i in own], config)
            t[own] = torch.as_tensor(config.student.steps)[steps[own]]
            x_t[own], next_t[own] = chain.x_t, (t[own] - SKIP).clamp(min=0)
    t, after = to_device(t, device), to_device(next_t, device)
    guided = {"text": text, "empty_text": empty_text, "guidance": config.warmup.guidance}
    substeps = config.warmup.substeps if kind == "progressive" else 1
    with torch.no_grad():
        taught = teacher_step(teacher, x_t, t, after, substeps=substeps, **guided)
        target = None if kind == "progressive" else consistent_x0(averaged, taught, after, text)
    least = torch.zeros_like(next_t)
    made = Made(samples, text, real, x_t, t, next_t, least, x_t, target)
    if kind == "progressive":
        eps = student(x_t, t, text)
        clips = VIDEO.diffuse(VIDEO.x0_from_eps(x_t, eps, t), eps, after)
        return replace(made, real=taught, fake=clips.detach()), clips
    clips = consistent_x0(student, x_t, t, text)
    return replace(made, fake=clips.detach()), clips


def teacher_step(
    teacher: Predictor, x_t: Tensor, t: Tensor, until: Tensor, text: Tensor, empty_text: Tensor, guidance: float, substeps: int
) -> Tensor:
    """The state at `until` (B,) that the guided teacher comes to from x_t at t (B,), by `substeps` equal DDIM steps."""
    for i in range(1, substeps + 1):
        after = (t + (until - t) / (substeps - i + 1)).round().long()
        x0 = teacher_x0(teacher, x_t, t, after, text, empty_text, guidance, 1)
        x_t, t = VIDEO.diffuse(x0, VIDEO.eps_from_x0(x_t, x0, t), after), after
    return x_t


def consistent_x0(predict: Predictor, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """The consistency function of a network at t (B,): x_t itself at 0, its x0 from soon after on (LCM, arXiv 2310.04378, equation 9)."""
    x0 = VIDEO.x0_from_eps(x_t, predict(x_t, t, text), t)
    c_skip, c_out = (c.to(x0).reshape(-1, 1, 1, 1, 1) for c in boundary_scaling(t.double()))
    return c_skip * x_t + c_out * x0


def peer_losses(kind: str, made: Made, clips: Tensor, matching: bool) -> dict[str, Tensor]:
    """What the student regresses to, by name. In progressive distillation that is the warm-up's alone."""
    if kind == "progressive":
        return {} if matching else {"guidance": guidance_loss(clips, made.real)}
    if kind == "consistency":
        return {"consistency": pseudo_huber(clips, made.target)}
    return {"consistency": pseudo_huber(clips.diff(dim=2), made.target.diff(dim=2))}
