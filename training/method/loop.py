"""The training loop of a distillation: student, fake score and discriminator heads, each on its own turn."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from avdm2_nodes.diffusion.samplers import backward_simulation, draw_noise, teacher_x0, to_device
from avdm2_nodes.diffusion.schedules import IMAGE, VIDEO, Schedule
from avdm2_nodes.diffusion.sdm import score_pair, sdm_gradient
from training.data.latents import LatentClips
from training.data.order import indices, rank_places
from training.method.discriminator import DiscriminatorHeads, judge_as_they_stand
from training.method.ema import EMA
from training.method.learner import Learner, new_optimiser
from training.method.losses import (
    adm_discriminator_loss,
    adm_student_loss,
    approximate_r1,
    denoising_loss,
    guidance_loss,
    scale_gradient,
    sdm_loss,
)
from training.method.masters import Weights
from training.method.roles import Roles
from training.run.checkpoint import Checkpoints
from training.run.config import DistillConfig
from training.run.folder import RunFolder, RunFolderError
from training.run.meter import Meter
from training.run.parent import Stop, StoppedError, never
from training.run.precision import uses_bf16
from training.run.processes import Processes
from training.run.randomness import chain_steps, draw_frames, draw_timesteps, sample_generators

logger = logging.getLogger(__name__)


def kinds_judged(config: DistillConfig) -> int:
    """How many kinds of clips the heads learn from: the student's, real ones, and with R1 real ones that are perturbed."""
    return 2 + (config.adm.r1_weight > 0)


def looks(part: int, kinds: int) -> int:
    """Turns of parts of so many clips that the critics' encoder looks at in one batch: eight clips, or one turn that has more.

    It keeps no activations for a gradient, so they may be more than the student learns from at once.
    """
    return max(1, 8 // (part * kinds))


@dataclass
class Made:
    """Clips that the student made for one part of a batch: they serve its own update and, detached, the critics'."""

    samples: Sequence[int]  # global sample numbers, which key all randomness
    text: Tensor  # (B, L, D)
    real: Tensor  # (B, C, F, h, w), clips of the data with the same captions
    x_t: Tensor  # (B, C, F, h, w), states of the student's chain at t
    t: Tensor  # (B,)
    next_t: Tensor  # (B,) timesteps that the chain goes on at, 0 at its end; on the CPU
    fake: Tensor  # (B, C, F, h, w), the x0 that it made of x_t, detached
    seen: dict[int, list[Tensor] | None] = field(default_factory=dict)  # by the critics' turn: what `look` left for its loss

    def __getitem__(self, chosen: list[int]) -> "Made":
        """The clips of these places in the batch only."""
        if len(chosen) == len(self.samples):
            return self
        tensors = (self.text, self.real, self.x_t, self.t, self.next_t, self.fake)
        return Made([self.samples[i] for i in chosen], *(tensor[chosen] for tensor in tensors))


class Phase(NamedTuple):
    """What updates of the same work have in common."""

    matching: bool  # by distribution matching; before, the warm-up
    critics: bool  # fake score and heads learn
    adm: bool  # the student learns by ADM too


def phase_of(config: DistillConfig, step: int) -> Phase:
    """The phase of a run's update, counted from 0."""
    matching = step - config.warmup.updates
    critics_from = min(config.warmup.critics_from, config.warmup.updates)
    return Phase(matching >= 0, step >= critics_from, matching >= config.adm.start_update and config.adm.weight > 0)


class Distillation:
    """One run's state and its three kinds of update."""

    def __init__(
        self,
        config: DistillConfig,
        roles: Roles,
        heads: DiscriminatorHeads,
        empty_text: Tensor,
        device: torch.device,
        processes: Processes | None = None,
    ):
        self.config, self.roles, self.heads, self.empty_text, self.device = config, roles, heads, empty_text, device
        self.processes = processes or Processes("cpu")
        student, sdm, adm, kind = config.student, config.sdm, config.adm, config.run.optimiser

        def learner(name: str, weights: Weights, lr: float, betas: tuple, decay: float = 0.0, copies=None) -> Learner:
            return Learner(name, weights, new_optimiser(kind, weights, lr, betas, decay), student.clip, self.processes, copies)

        self.student = learner(
            "student", roles.student_weights, student.lr, student.betas, student.weight_decay, roles.student_copies
        )
        self.fake = learner("fake score", roles.fake_weights, sdm.lr, sdm.betas, copies=roles.fake_copies)
        self.critic = learner("discriminator", dict(heads.named_parameters()), adm.lr, adm.betas)
        self.ema = EMA(roles.student_weights, student.ema)

        self.kinds = kinds_judged(config)

    def state_dict(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in ("student", "fake", "critic", "ema")}

    def load_state_dict(self, state: dict) -> None:
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)

    def swap(self) -> None:
        """Exchanges the student's averaged and live weights; called twice it changes nothing."""
        self.ema.swap()
        self.student.refresh()

    def make_clips(self, real: Tensor, text: Tensor, samples: range) -> tuple[Made, Tensor]:
        """The student's clips, each at a step of its own chain, and the same x0 (B, C, F, h, w) with its gradient."""
        config = self.config
        timesteps = torch.as_tensor(config.student.steps)
        steps = chain_steps(samples, len(timesteps), config.run.seed)
        generators = sample_generators(samples, config.run.seed, "student")
        noise = draw_noise(real.shape, generators, self.device)
        x_t, x0 = backward_simulation(self.roles.student, noise, text, config.student.steps, steps, generators)
        # x0 = (x_t - sigma eps) / alpha magnifies an error of eps up to 25 times, and its gradient with it.
        t = to_device(timesteps[steps], self.device)
        alpha, sigma = VIDEO.alpha_sigma(t, x0)
        next_t = torch.cat([timesteps[1:], torch.zeros(1, dtype=torch.long)])[steps]
        return Made(samples, text, real, x_t, t, next_t, x0.detach()), scale_gradient(x0, (alpha / sigma).clamp(max=1.0))

    def judged_from(self, made: Made, schedule: Schedule) -> Tensor:
        """(B,) timesteps of a schedule at and above which the clips are judged.

        An x0 in the middle of the chain is diffused to the next step, so its law matters at that much noise and more only; judged
        at less, each step would have to be a one-step generator (Phased DMD, arXiv 2510.27684).
        """
        if not self.config.student.phased:
            return torch.zeros_like(made.next_t)
        return schedule.timestep_of(VIDEO.alphas_cumprod[made.next_t])

    def judged(self, made: Made, schedule: Schedule, t_max: int) -> list[int]:
        """The places of the clips that a loss judges: those whose lowest timestep to be judged at lies within its range."""
        return (self.judged_from(made, schedule) < t_max).nonzero().flatten().tolist()

    def draw_frames(self, made: Made, clips: Tensor, generators) -> tuple[Tensor, ...]:
        """K random frames of each clip (B * K, C, h, w), and noise, timesteps (B * K,) and text (B * K, L, D) for them."""
        config, count = self.config.sdm, self.config.sdm.frames
        draws = 1 if config.shared_noise else count
        chosen = draw_frames(generators, clips.shape[2], count).to(self.device)
        frames = clips.transpose(1, 2)[torch.arange(len(clips), device=self.device)[:, None], chosen]
        low = self.judged_from(made, IMAGE).clamp(min=config.t_min)
        t = torch.stack([draw_timesteps(generators, low, config.t_max) for _ in range(draws)], 1).to(self.device)
        noise = draw_noise((len(clips), draws, *frames.shape[2:]), generators, self.device)
        t, noise = t.expand(-1, count), noise.expand(-1, count, -1, -1, -1)
        return frames.flatten(0, 1), noise.flatten(0, 1), t.flatten(), made.text.repeat_interleave(count, 0)

    def diffuse(self, made: Made, clips: Tensor, generators) -> tuple[Tensor, Tensor]:
        """(x_t, t): clips diffused to random timesteps of ADM's range."""
        config = self.config.adm
        t = draw_timesteps(generators, self.judged_from(made, VIDEO).clamp(min=config.t_min), config.t_max)
        t = to_device(t, self.device)
        return VIDEO.diffuse(clips, draw_noise(clips.shape, generators, self.device), t), t

    def guidance(self, made: Made, clips: Tensor) -> Tensor:
        """The loss that teaches the student what its guide, with CFG, makes of its states, on the way to the next step."""
        warmup = self.config.warmup
        guided_x0 = teacher_x0(
            self.roles.guide, made.x_t, made.t, to_device(made.next_t, self.device), made.text, self.empty_text,
            warmup.guidance, warmup.substeps,
        )  # fmt: skip
        return guidance_loss(clips, guided_x0)

    def sdm(self, made: Made, clips: Tensor) -> Tensor:
        """The student's SDM loss on its clips, one that is not judged counting as 0."""
        config, roles = self.config.sdm, self.roles
        judged = self.judged(made, IMAGE, config.t_max)
        if not judged:
            return 0 * clips.sum()
        share, made, clips = len(judged) / len(clips), made[judged], clips[judged]
        generators = sample_generators(made.samples, self.config.run.seed, "sdm")
        frames, noise, t, text = self.draw_frames(made, clips, generators)
        fake_x0, real_x0 = score_pair(
            frames.detach(), noise, t, text, self.empty_text, roles.real_score, roles.fake_score, config.guidance
        )
        return share * sdm_loss(frames, sdm_gradient(frames.detach(), fake_x0, real_x0))

    def adm(self, made: Made, clips: Tensor) -> Tensor:
        """The student's ADM loss, likewise; the gradient flows through the frozen encoder, and through the heads as they stand."""
        judged = self.judged(made, VIDEO, self.config.adm.t_max)
        if not judged:
            return 0 * clips.sum()
        share, made, clips = len(judged) / len(clips), made[judged], clips[judged]
        generators = sample_generators(made.samples, self.config.run.seed, "adm")
        x_t, t = self.diffuse(made, clips, generators)
        return share * adm_student_loss(judge_as_they_stand(self.heads, self.roles.encoder(x_t, t, made.text)))

    def fake_loss(self, made: Made, turn: int) -> Tensor:
        """The fake score's denoising loss on frames of the student's clips, at the noise that SDM asks it about."""
        judged = self.judged(made, IMAGE, self.config.sdm.t_max)
        if not judged:
            return torch.zeros((), device=self.device)
        share, made = len(judged) / len(made.t), made[judged]
        generators = sample_generators(made.samples, self.config.run.seed, "fake", turn)
        frames, noise, t, text = self.draw_frames(made, made.fake, generators)
        return share * denoising_loss(self.roles.fake_score(IMAGE.diffuse(frames, noise, t), t, text), noise)

    def critic_loss(self, made: Made, turn: int) -> Tensor:
        """The discriminator's loss; real and student clips have the same captions, and noise and t of their own."""
        config = self.config.adm
        if turn not in made.seen:
            self.look([(made, turn)])
        features = made.seen.pop(turn)
        if features is None:
            return torch.zeros((), device=self.device)
        fake_logits, real_logits, *near_logits = self.heads(features).chunk(self.kinds)
        loss = adm_discriminator_loss(fake_logits, real_logits)
        if near_logits:
            loss = loss + config.r1_weight * approximate_r1(real_logits, near_logits[0], config.r1_sigma)
        return len(fake_logits) / len(made.t) * loss

    @torch.no_grad()
    def look(self, asked: Iterable[tuple[Made, int]]) -> None:
        """The frozen encoder's features of all that the heads will judge of some parts at some turns, by one evaluation.

        Left in each part's `seen`: those of its judged clips, as the student made them, then the real ones, then for R1 the real ones
        again, perturbed; None where no clip is judged.
        """
        inputs, owners = [], []
        for made, turn in asked:
            made.seen[turn] = None
            if judged := self.judged(made, VIDEO, self.config.adm.t_max):
                inputs.append(self.critic_inputs(made[judged], turn))
                owners.append((made, turn))
        if not inputs:
            return
        x_t, t, text = (torch.cat(tensors) for tensors in zip(*inputs, strict=True))
        features = self.roles.encoder(x_t, t, text)
        sizes = [len(x_t) for x_t, _, _ in inputs]
        for (made, turn), *own in zip(owners, *(feature.split(sizes) for feature in features), strict=True):
            made.seen[turn] = own

    def critic_inputs(self, made: Made, turn: int) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, t, text) of what the heads judge of clips, each kind of clip after the other."""
        config, seed, kinds = self.config.adm, self.config.run.seed, []
        fake, real = (sample_generators(made.samples, seed, kind, turn) for kind in ("critic fake", "critic real"))
        kinds.append(self.diffuse(made, made.fake, fake))
        x_t, t = self.diffuse(made, made.real, real)
        kinds.append((x_t, t))
        if config.r1_weight > 0:
            kinds.append((x_t + config.r1_sigma * draw_noise(x_t.shape, real, self.device), t))
        x_t, t = (torch.cat(tensors) for tensors in zip(*kinds, strict=True))
        return x_t, t, made.text.repeat(len(kinds), 1, 1)

    def student_losses(self, step: int, made: Made, clips: Tensor) -> dict[str, Tensor]:
        """The student's weighted losses at a step: of guidance in the warm-up, then of distribution matching."""
        config = self.config
        phase = phase_of(config, step)
        if not phase.matching:
            return {"guidance": self.guidance(made, clips)}
        losses = {}
        if config.sdm.weight > 0:
            losses["sdm"] = config.sdm.weight * self.sdm(made, clips)
        if phase.adm:
            losses["adm"] = config.adm.weight * self.adm(made, clips)
        return losses

    def student_lr(self, step: int) -> float:
        """Its learning rate at a step; each of the two phases begins with a ramp."""
        student, warmup = self.config.student, self.config.warmup
        first, lr = (0, warmup.lr) if step < warmup.updates else (warmup.updates, student.lr)
        return lr * min(1.0, (step - first + 1) / max(1, student.warmup))

    def update(self, step: int, data: LatentClips) -> dict[str, float]:
        """One step: the student's update with the critics as they stand, then theirs on the clips that it made.

        The clips are made once and serve both. After the warm-up the averaged weights go on in place of the live ones: at its
        learning rate those are noisy, and distribution matching, at a much lower one, would take long to calm them. Returns the
        losses and gradient norms.
        """
        config = self.config
        if step == config.warmup.updates:
            self.ema.settle()
            self.student.refresh()
        batch = config.run.batch
        places = rank_places(step * batch, batch, self.processes.rank, self.processes.count)
        part = len(places) // config.run.accumulate
        trains_student = step >= config.warmup.updates or config.warmup.guidance != 1
        figures: dict[str, float] = {}
        terms: dict[str, Tensor] = {}
        made_parts = []
        for start in range(places.start, places.stop, part):
            real, text = data.batch(indices(start, part, len(data), config.run.seed))
            with torch.set_grad_enabled(trains_student):
                made, clips = self.make_clips(real, text, range(start, start + part))
            made_parts.append(made)
            if trains_student:
                losses = self.student_losses(step, made, clips)
                self.student.backward(sum(losses.values()) / config.run.accumulate)
                _add(terms, losses, config.run.accumulate)
        if trains_student:
            figures, norm = self.student.step(terms, self.student_lr(step))
            figures["student_norm"] = norm
            self.ema.update()
        if not phase_of(config, step).critics:
            return figures
        if config.sdm.weight > 0:
            for turn in range(config.sdm.updates_per_student):
                figures |= self._critic_update(self.fake, "fake", self.fake_loss, made_parts, turn)
        if config.adm.weight > 0:
            asked = [(made, turn) for turn in range(config.adm.updates_per_student) for made in made_parts]
            for turn in range(config.adm.updates_per_student):
                figures |= self._critic_update(self.critic, "critic", partial(self._seen_loss, asked), made_parts, turn)
        return figures

    def _seen_loss(self, asked: list[tuple[Made, int]], made: Made, turn: int) -> Tensor:
        """`critic_loss`, the encoder looking at several at a time of those that are asked for and not seen yet."""
        if turn not in made.seen:
            count = looks(len(made.samples), self.kinds)
            self.look(asked[:count])
            del asked[:count]
        return self.critic_loss(made, turn)

    def _critic_update(self, learner: Learner, name: str, loss_of: Callable, parts: list[Made], turn: int) -> dict[str, float]:
        terms: dict[str, Tensor] = {}
        for made in parts:
            loss = loss_of(made, turn)
            if loss.requires_grad:  # else none of the part's clips is judged
                learner.backward(loss / len(parts))
            _add(terms, {name: loss}, len(parts))
        figures, norm = learner.step(terms)
        return figures | {f"{name}_norm": norm}


def _add(terms: dict[str, Tensor], losses: dict[str, Tensor], parts: int) -> None:
    for name, loss in losses.items():
        term = loss.detach().double() / parts
        terms[name] = terms[name] + term if name in terms else term


def train(
    distillation: Distillation,
    data: LatentClips,
    run: RunFolder,
    log: Callable[[int, dict], None],
    show: Callable[[int], None],
    stop: Stop = never,
) -> int:
    """Trains until the configured number of student updates; returns the steps done, critic warm-up included.

    Goes on from the newest checkpoint in the run folder. `log` takes each step's figures, `show` is called every `sample_every`
    steps with the averaged weights in the student. After it returns the averaged weights are in the student. StoppedError, with a
    checkpoint, after the first step at whose end `stop` says so. All processes of a run call this together; the first one alone writes,
    logs and shows, while the others wait for it with their next update.
    """
    config, processes = distillation.config, distillation.processes
    checkpoints = Checkpoints(run.path / "checkpoints", config.run.keep)
    start, seconds = 0, 0.0
    found = checkpoints.latest(("student", "fake", "critic", "ema", "seconds"))
    if found:
        start, state = found
        seconds = state.pop("seconds")
    total = config.warmup.updates + config.run.updates
    if start > total:
        raise RunFolderError(
            f"Expected at most {config.run.updates} updates in {run.path}, found {start - config.warmup.updates}; "
            "raise --run.updates, or name another folder with --run.folder."
        )
    if processes.main:
        run.start(config, start)  # refuses settings that the checkpoint does not fit
    processes.require_same("checkpoint to go on from", start)
    if found:
        distillation.load_state_dict(state)
    dtype = torch.bfloat16 if uses_bf16(distillation.device, config.run.precision) else torch.float32
    meter = Meter(data, distillation.device, dtype)
    began = time.monotonic() - seconds
    stop()  # from now on it is asked, and no update is broken off
    with tqdm(total=total, initial=start, desc="distilling", unit="update", disable=not processes.main) as bar:
        for step in range(start, total):
            figures = meter.update(phase_of(config, step), lambda clips, step=step: distillation.update(step, clips))
            done = step + 1
            skipped = {
                f"{x.name} skipped": x.skipped
                for x in (distillation.student, distillation.fake, distillation.critic)
                if x.skipped
            }
            figures |= skipped | {"seconds": round(time.monotonic() - began, 3)}
            if processes.main:
                run.write_stats(done, figures)
                log(done, figures)
                bar.update()
                bar.set_postfix(
                    {k: f"{figures[k]:.3f}" for k in ("guidance", "sdm", "adm", "fake", "critic") if k in figures} | skipped
                )
            stopping = done < total and processes.any(stop())
            if processes.main and (done % config.run.save_every == 0 or done == total or stopping):
                checkpoints.save(done, distillation.state_dict() | {"seconds": time.monotonic() - began})
            if stopping:
                processes.wait()  # where one of them ends, the launcher ends all
                raise StoppedError(f"Stopped after update {done} of {total}; the same command goes on from there.")
            if processes.main and done % config.run.sample_every == 0 and done < total:
                distillation.swap()
                show(done)
                distillation.swap()
    distillation.swap()
    return total
