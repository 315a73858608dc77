"""The training loop of a distillation: student, fake score and discriminator heads, each on its own turn."""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from avdm2_nodes.diffusion.samplers import teacher_x0, to_device
from training.data.latents import LatentClips
from training.data.order import indices, rank_places
from training.method.adm import Adm
from training.method.discriminator import DiscriminatorHeads
from training.method.ema import EMA
from training.method.learner import Learner, new_optimiser
from training.method.losses import guidance_loss
from training.method.made import Made, make_clips
from training.method.masters import Weights
from training.method.peers import make_peer_clips, peer_losses
from training.method.roles import Roles
from training.method.sdm import Sdm
from training.run.checkpoint import Checkpoints
from training.run.config import DistillConfig
from training.run.folder import RunFolder, RunFolderError
from training.run.meter import Meter
from training.run.parent import Stop, StoppedError, never
from training.run.precision import uses_bf16
from training.run.processes import Processes

logger = logging.getLogger(__name__)


class Phase(NamedTuple):
    """What updates of the same work have in common."""

    matching: bool  # by distribution matching; before, the warm-up
    critics: bool  # fake score and heads learn
    adm: bool  # the student learns by ADM too


def phase_of(config: DistillConfig, step: int) -> Phase:
    """The phase of a run's update, counted from 0."""
    matching = step - config.warmup.updates
    critics_from = min(config.warmup.critics_from, config.warmup.updates)
    return Phase(matching >= 0, step >= critics_from, matching >= config.adm.start_update and config.has_heads)


def student_learns(config: DistillConfig, phase: Phase) -> bool:
    """Whether the student is updated in a phase, and not only its critics."""
    if config.method.kind in ("consistency", "motion-consistency"):
        return True
    return config.matches_frames or phase.adm if phase.matching else config.warmup.guidance != 1


def sees_clips(config: DistillConfig, phase: Phase) -> bool:
    """Whether the clips of the data are looked at in a phase, and not only their captions."""
    return config.method.kind != "avdm2" or (config.has_heads and phase.critics)


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

        self.sdm, self.adm = Sdm(config, roles, empty_text), Adm(config, roles, heads, self.processes)

    def state_dict(self) -> dict:
        parts = ("student", "fake", "critic", "ema", *(("adm",) if self.config.adm.pool else ()))
        return {name: getattr(self, name).state_dict() for name in parts}

    def load_state_dict(self, state: dict) -> None:
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)

    def swap(self) -> None:
        """Exchanges the student's averaged and live weights; called twice it changes nothing."""
        self.ema.swap()
        self.student.refresh()

    def make_clips(self, real: Tensor, text: Tensor, samples: range) -> tuple[Made, Tensor]:
        """The student's clips of a part of a batch, and the same with their gradient (B, C, F, h, w)."""
        if self.config.method.kind == "avdm2":
            return make_clips(self.roles.student, real, text, samples, self.config)
        roles = self.roles
        return make_peer_clips(roles.student, self.averaged, roles.guide, real, text, self.empty_text, samples, self.config)

    @torch.no_grad()
    def averaged(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """What the student with its averaged weights predicts."""
        self.swap()
        try:
            return self.roles.student(x_t, t, text)
        finally:
            self.swap()

    def guidance(self, made: Made, clips: Tensor) -> Tensor:
        """The loss that teaches the student what its guide, with CFG, makes of its states, on the way to the next step."""
        warmup = self.config.warmup
        guided_x0 = teacher_x0(
            self.roles.guide, made.x_t, made.t, to_device(made.next_t, self.device), made.text, self.empty_text,
            warmup.guidance, warmup.substeps,
        )  # fmt: skip
        return guidance_loss(clips, guided_x0)

    def student_losses(self, step: int, made: Made, clips: Tensor) -> dict[str, Tensor]:
        """The student's weighted losses at a step: of guidance in the warm-up, then of distribution matching; a peer's of its own."""
        config = self.config
        phase, kind = phase_of(config, step), config.method.kind
        if kind != "avdm2":
            losses = peer_losses(kind, made, clips, phase.matching)
        elif phase.matching:
            losses = {}
        else:
            losses = {"guidance": self.guidance(made, clips)}
        if not phase.matching:
            return losses
        if config.matches_frames:
            losses["sdm"] = config.sdm.weight * self.sdm.student_loss(made, clips)
        if phase.adm:
            losses["adm"] = config.adm.weight * self.adm.student_loss(made, clips)
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
        trains_student = student_learns(config, phase_of(config, step))
        figures: dict[str, float] = {}
        terms: dict[str, Tensor] = {}
        made_parts = []
        looks = sees_clips(config, phase_of(config, step))
        for start in range(places.start, places.stop, part):
            real, text = data.batch(indices(start, part, len(data), config.run.seed), looks)
            with torch.set_grad_enabled(trains_student):
                made, clips = self.make_clips(real, text, range(start, start + part))
            made_parts.append(made)
            if trains_student:
                _learn(self.student, self.student_losses(step, made, clips), terms, config.run.accumulate)
        if trains_student:
            figures, norm = self.student.step(terms, self.student_lr(step))
            figures["student_norm"] = norm
            self.ema.update()
        if not phase_of(config, step).critics:
            return figures
        if config.matches_frames:
            for turn in range(config.sdm.updates_per_student):
                figures |= self._fake_update(made_parts, turn)
        if config.has_heads:
            self.adm.begin(made_parts, data)
            for turn in range(config.adm.updates_per_student):
                figures |= self._heads_update(step, turn)
        return figures

    def _fake_update(self, parts: list[Made], turn: int) -> dict[str, float]:
        terms: dict[str, Tensor] = {}
        for made in parts:
            _learn(self.fake, {"fake": self.sdm.fake_loss(made, turn)}, terms, len(parts))
        figures, norm = self.fake.step(terms)
        return figures | {"fake_norm": norm}

    def _heads_update(self, step: int, turn: int) -> dict[str, float]:
        """A turn of the heads. In the first, all they are shown is new to them: `critic_auc` says what they know by then."""
        terms: dict[str, Tensor] = {}
        looks, told_apart = self.adm.turn(step, turn), []
        for look in looks:
            loss, count = self.adm.head_loss(look)
            _learn(self.critic, {"critic": loss}, terms, len(looks))
            told_apart.append(count)
        if turn == 0:
            terms["critic_auc"] = self.adm.win_rate(told_apart)
        figures, norm = self.critic.step(terms)
        return figures | {"critic_norm": norm}


def _learn(learner: Learner, losses: dict[str, Tensor], terms: dict[str, Tensor], parts: int) -> None:
    """Adds the gradient of a part of an update's loss, and its value to the terms."""
    loss = sum(losses.values())
    if loss.requires_grad:  # else none of the part's clips is judged
        learner.backward(loss / parts)
    _add(terms, losses, parts)


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
                    {
                        k: f"{figures[k]:.3f}"
                        for k in ("guidance", "consistency", "sdm", "adm", "fake", "critic")
                        if k in figures
                    }
                    | skipped
                )
            stopping = done < total and processes.any(stop())
            if done % config.run.save_every == 0 or done == total or stopping:
                state = distillation.state_dict()
                if processes.main:
                    checkpoints.save(done, state | {"seconds": time.monotonic() - began})
            if stopping:
                processes.wait()  # where one of them ends, the launcher ends all
                raise StoppedError(f"Stopped after update {done} of {total}; the same command goes on from there.")
            if processes.main and done % config.run.sample_every == 0 and done < total:
                distillation.swap()
                show(done)
                distillation.swap()
    distillation.swap()
    return total
