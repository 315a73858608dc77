"""ADM in a run (AVDM2, arXiv 2412.05899): whole clips, judged by heads on the frozen teacher's encoder.

The heads are small and the encoder is not. So what it saw of clips may be kept and shown to the heads again and again: its features of a
clip at one noise never change.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from avdm2_nodes.diffusion.samplers import draw_noise, to_device
from avdm2_nodes.diffusion.schedules import VIDEO
from training.data.order import indices, rank_places
from training.method.discriminator import DiscriminatorHeads, frame_by_frame, judge_as_they_stand
from training.method.losses import adm_discriminator_loss, adm_student_loss, approximate_r1, with_gradient
from training.method.made import Made, chain_places
from training.method.roles import Roles
from training.run.config import DistillConfig
from training.run.meter import Clips
from training.run.processes import Processes
from training.run.randomness import draw_timesteps, keyed_generator, sample_generators


def kinds_judged(config: DistillConfig) -> int:
    """How many kinds of clips the heads learn from: the student's and real ones, and those again, perturbed, whose R1 or R2 is asked."""
    return 2 + (config.adm.r1_weight > 0) + (config.adm.r2_weight > 0)


def looks(part: int, kinds: int) -> int:
    """Parts of so many clips that the critics' encoder looks at in one batch: eight clips, or one part that has more.

    It keeps no activations for a gradient, so they may be more than the student learns from at once.
    """
    return max(1, 8 // (part * kinds))


@dataclass
class Look:
    """A part's clips as the encoder sees them at one noise: the student's, real ones, and those that are perturbed, in one batch."""

    made: Made
    number: int  # of the looks at these clips
    judged: list[int]  # places of the clips that are judged
    features: list[Tensor] | None = field(default=None, repr=False)


@dataclass
class Seen:
    """This process's clips of an update in the pool. After a resume its looks are made again when they are asked for."""

    first: int  # the number of the first sample
    fake: Tensor  # (B, C, F, h, w)
    looks: list[Look] | None = field(default=None, repr=False)


class Adm:
    """The student's loss, and that of the heads, with the pool of what they learn from."""

    def __init__(self, config: DistillConfig, roles: Roles, heads: DiscriminatorHeads, processes: Processes):
        self.config, self.seed, self.roles, self.heads = config.adm, config.run.seed, roles, heads
        self.whole, self.processes = config, processes
        self.kind = config.method.kind
        self.kinds = kinds_judged(config)
        self.pool: deque[Seen] = deque(maxlen=config.adm.pool + 1)
        self._turns: list[list[Look]] = []  # of the newest update, where there is no pool
        self._waiting: list[Look] = []  # for the encoder, in the order in which they will be asked for

    # ---- the student ----

    def student_loss(self, made: Made, clips: Tensor) -> Tensor:
        """On clips (B, C, F, h, w), one that is not judged counting as 0.

        The gradient flows through the frozen encoder, and through the heads as they stand. With `adm.normalised` each clip's gradient is
        brought to a mean size of 1, as SDM's is to that of its difference from the real one: how sure the heads are says nothing
        of how far the clip is off.
        """
        judged = made.judged(VIDEO, self.config.t_max)
        if not judged:
            return 0 * clips.sum()
        share, made, clips = len(judged) / len(clips), made[judged], clips[judged]
        judging = clips.detach().requires_grad_() if self.config.normalised and clips.requires_grad else clips
        loss = self._student_loss(made, judging)
        if judging is not clips:
            (gradient,) = torch.autograd.grad(loss, judging)
            size = gradient.abs().mean(dim=tuple(range(1, gradient.ndim)), keepdim=True)
            loss = with_gradient(loss, clips, torch.nan_to_num(gradient / size, posinf=0.0, neginf=0.0) / clips.numel())
        return share * loss

    def _student_loss(self, made: Made, clips: Tensor) -> Tensor:
        generators = sample_generators(made.samples, self.seed, "adm")
        x_t, t = self.diffuse(made, clips, generators)
        logits = judge_as_they_stand(self.heads, self.encode(x_t, t, made.text))
        if not self.config.relativistic:
            return adm_student_loss(logits)
        with torch.no_grad():
            beside = self.heads(self.encode(self.diffused(made.real, t, generators), t, made.text))
        return adm_student_loss(logits.mean(1), beside.mean(1))

    def diffuse(self, made: Made, clips: Tensor, generators) -> tuple[Tensor, Tensor]:
        """(x_t, t): clips diffused to random timesteps of ADM's range. A peer's that are states of its chain stay what they are."""
        if self.kind == "progressive":
            return clips, to_device(made.next_t, clips.device)
        t = draw_timesteps(generators, made.judged_from(VIDEO).clamp(min=self.config.t_min), self.config.t_max)
        t = to_device(t, clips.device)
        return self.diffused(clips, t, generators), t

    def diffused(self, clips: Tensor, t: Tensor, generators) -> Tensor:
        """The same at given timesteps (B,)."""
        if self.kind == "progressive":
            return clips
        return VIDEO.diffuse(clips, draw_noise(clips.shape, generators, clips.device), t)

    def encode(self, x_t: Tensor, t: Tensor, text: Tensor) -> list[Tensor]:
        """The frozen encoder's features, with which the heads judge."""
        encoder = self.roles.encoder
        return (frame_by_frame(encoder) if self.kind == "motion-consistency" else encoder)(x_t, t, text)

    # ---- the heads ----

    def begin(self, parts: list[Made], data: Clips) -> None:
        """Takes an update's clips, from which the heads are to learn next; `data` gives the real ones of those that a resume left."""
        number = 1 if self.config.pool else self.config.updates_per_student
        self._turns = [[self._look(made, turn) for made in parts] for turn in range(number)]
        self._waiting = [look for turn in self._turns for look in turn]
        if self.config.pool:
            self.pool.append(Seen(parts[0].samples[0], torch.cat([made.fake for made in parts]), self._turns[0]))
        self._data = data
        batch, local = self.whole.run.batch, self.whole.run.batch // self.processes.count
        first = parts[0].samples[0] - self.processes.rank * local
        _, _, least_t = chain_places(range(first, first + batch), self.whole)
        self._pairs = int((least_t < self.config.t_max).sum())

    def turn(self, step: int, turn: int) -> list[Look]:
        """What the heads learn from at a turn of an update: the newest clips, and from the pool those of a random update of it."""
        if not self.config.pool:
            return self._turns[turn]
        age = 0
        if turn > 0:
            age = int(torch.randint(len(self.pool), (1,), generator=keyed_generator(self.seed, "pool", step, turn)))
        seen = self.pool[-1 - age]
        if seen.looks is None:
            size = len(self._turns[0][0].made.samples)
            seen.looks = [
                self._look(self._made_again(range(seen.first + i, seen.first + i + size), seen.fake[i : i + size]), 0)
                for i in range(0, len(seen.fake), size)
            ]
            self._waiting = [*seen.looks, *self._waiting]
        return seen.looks

    def head_loss(self, look: Look) -> tuple[Tensor, Tensor]:
        """(the heads' loss on a part's clips, how many of the judged pairs they already tell apart)."""
        if not look.judged:
            return look.made.fake.new_zeros(()), look.made.fake.new_zeros(())
        fake, real, *perturbed = self.heads(self._features(look)).chunk(self.kinds)
        pairs = fake.mean(1), real.mean(1)
        relativistic = self.config.relativistic
        loss = adm_discriminator_loss(*(pairs if relativistic else (fake, real)), relativistic)
        for weight, logits in ((self.config.r1_weight, real), (self.config.r2_weight, fake)):
            if weight > 0:
                loss = loss + weight * approximate_r1(logits, perturbed.pop(0), self.config.r1_sigma)
        return len(fake) / len(look.made.t) * loss, wins(*pairs)

    def win_rate(self, told_apart: list[Tensor]) -> Tensor:
        """Of all judged pairs of the newest update the share of those that the heads tell apart, from the counts of this process's parts.

        The mean over the processes is that of the whole update; 1/2 where none is judged.
        """
        total = torch.stack(told_apart).sum()
        return total * self.processes.count / self._pairs if self._pairs else torch.full_like(total, 0.5)

    def _look(self, made: Made, number: int) -> Look:
        return Look(made, number, made.judged(VIDEO, self.config.t_max))

    def _features(self, look: Look) -> list[Tensor]:
        """The encoder's features of a look; those of several are made by one evaluation. Without a pool each is asked for once."""
        if look.features is None:
            self._waiting = [other for other in self._waiting if other is not look]
            count = looks(len(look.made.samples), self.kinds)
            together = [look, *self._waiting[: count - 1]]
            del self._waiting[: count - 1]
            self._see([other for other in together if other.judged])
        features = look.features
        if not self.config.pool:
            look.features = None
        return features

    @torch.no_grad()
    def _see(self, asked: list[Look]) -> None:
        x_t, t, text = (
            torch.cat(x) for x in zip(*(self.inputs(look.made[look.judged], look.number) for look in asked), strict=True)
        )
        features = self.encode(x_t, t, text)
        sizes = [self.kinds * len(look.judged) for look in asked]
        for look, *own in zip(asked, *(feature.split(sizes) for feature in features), strict=True):
            look.features = [feature.clone() for feature in own] if self.config.pool else own

    def inputs(self, made: Made, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, t, text) of what the heads judge of clips, each kind of clip after the other.

        A clip of the student and the real one of its caption are at the same t, with noise of their own.
        """
        config, device = self.config, made.fake.device
        fake, real = (sample_generators(made.samples, self.seed, kind, number) for kind in ("critic fake", "critic real"))
        fake_t, t = self.diffuse(made, made.fake, fake)
        real_t = self.diffused(made.real, t, real)
        kinds = [fake_t, real_t]
        for weight, x_t, generators in ((config.r1_weight, real_t, real), (config.r2_weight, fake_t, fake)):
            if weight > 0:
                kinds.append(x_t + config.r1_sigma * draw_noise(x_t.shape, generators, device))
        return torch.cat(kinds), t.repeat(len(kinds)), made.text.repeat(len(kinds), 1, 1)

    # ---- resuming ----

    def state_dict(self) -> list[dict]:
        """The clips in the pool, of all processes, which call this together.

        What the encoder saw of them is made again, bit for bit: the same batches at the same noise.
        """
        local = self.whole.run.batch // self.processes.count
        return [
            {"first": seen.first - self.processes.rank * local, "fake": self.processes.gather(seen.fake)} for seen in self.pool
        ]

    def load_state_dict(self, state: list[dict]) -> None:
        self.pool.clear()
        for seen in state[-self.pool.maxlen :]:
            places = rank_places(0, len(seen["fake"]), self.processes.rank, self.processes.count)
            self.pool.append(Seen(seen["first"] + places.start, seen["fake"][places.start : places.stop]))

    def _made_again(self, samples: range, fake: Tensor) -> Made:
        real, text = self._data.batch(indices(samples.start, len(samples), len(self._data), self.seed))
        _, next_t, least_t = chain_places(samples, self.whole)
        fake = fake.to(real)
        return Made(samples, text, real, fake, next_t, next_t, least_t, fake)  # the states that they were made of are gone


def wins(fake: Tensor, real: Tensor) -> Tensor:
    """How many real clips have a larger logit (B,) than the student's of their caption at the same noise, an equal one counting half.

    Over the number of pairs it is the area under the ROC curve of pairs: 1 where the heads tell each apart, 1/2 where none.
    """
    return ((real > fake).float() + (real == fake).float() / 2).sum()
