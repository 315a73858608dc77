"""How much memory a run's update takes, tensor by tensor, before any of it is allocated: counted on the meta device.

Weights, optimiser states and the averaged weights follow from the roles. Gradients and activations are those that stand at once in a
turn of the student, of the fake score and of the heads, for one clip, by the roles' own functions and checkpointing, in the arithmetic
of a GPU: products in bf16, normalisations in float32, attention without a matrix of queries by keys.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.cost.operations import SD15, V3, Inputs, as_on_a_gpu, meta_inputs, meta_roles
from training.method.discriminator import DiscriminatorHeads
from training.method.roles import Roles
from training.run.config import DistillConfig

GIB = 2**30
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "paged_adamw8bit": 0}  # a weight; the paged one's lie in the CPU's memory


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made within the block held at once; those that were there before do not count."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), given)
        return made

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in given:
            return
        size = storage.nbytes()
        self._known[key] = weakref.finalize(storage, self._free, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


def peak_bytes(function: Callable[[], object], half: bool) -> int:
    """Bytes that `function` adds at most, in bf16 products if `half`."""
    with as_on_a_gpu(half), PeakBytes() as peak:
        function()
    return peak.peak


@dataclass(frozen=True)
class Plan:
    """Bytes by name: what stands throughout, and what the three turns add to it one after another."""

    standing: dict[str, int]
    turns: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.standing.values()) + max(self.turns.values())

    @property
    def rows(self) -> dict[str, int]:
        """All of it by name, the total last."""
        return self.standing | self.turns | {"all at once": self.total}


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of different tensors, each counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())


def memory_plan(config: DistillConfig, unet: dict = SD15, motion: dict = V3) -> Plan:
    """The plan of a run's settings for networks of these configurations, by default SD1.5 with AnimateDiff's v3."""
    half = config.run.precision != "float32"
    roles, heads = meta_roles(config, unet, motion, half)
    return plan_of(config, roles, heads, meta_inputs(config, unet), half)


def plan_of(config: DistillConfig, roles: Roles, heads: DiscriminatorHeads, inputs: Inputs, half: bool) -> Plan:
    """The plan for roles and heads, wherever these and the inputs are."""
    student, fake, judges = ([*w] for w in (roles.student_weights.values(), roles.fake_weights.values(), heads.parameters()))
    trained = {id(weight) for weight in (*student, *fake, *judges)}
    frozen = [p for module in roles.modules for p in _tensors(module) if id(p) not in trained]
    state = STATE_BYTES[config.run.optimiser]
    standing = {
        "frozen weights": bytes_of(frozen),
        "student's weights": bytes_of(student),
        "fake score's weights": bytes_of(fake),
        "heads": bytes_of(judges),
        "student's optimiser": state * sum(w.numel() for w in student),
        "fake score's optimiser": state * sum(w.numel() for w in fake),
        "heads' optimiser": state * sum(w.numel() for w in judges),
        "averaged weights": bytes_of(student),
    }
    turns = {name: peak_bytes(turn, half) for name, turn in _turns(config, roles, heads, inputs).items()}
    for weight in (*student, *fake, *judges):
        weight.grad = None
    return Plan(standing, {f"turn of the {name}: gradients and activations": size for name, size in turns.items()})


def _turns(config: DistillConfig, roles: Roles, heads: DiscriminatorHeads, inputs: Inputs) -> dict[str, Callable]:
    x, t, text, frames = inputs.x, inputs.t, inputs.text, config.sdm.frames

    def student() -> None:
        x0 = x - roles.student(x, t, text)
        loss = F.softplus(-heads(roles.encoder(x0, t, text))).mean() if config.adm.weight > 0 else 0
        with torch.no_grad():
            y, times, words = inputs.frames(frames)
            both = [torch.cat([tensor, tensor]) for tensor in (y, times, words)]
            target = x - x  # what SDM's gradient takes
            roles.fake_score(y, times, words), roles.real_score(*both)
        (loss + F.mse_loss(x0, target)).backward()
        for weight in heads.parameters():
            weight.grad = None

    def fake() -> None:
        for weight in roles.student_weights.values():
            weight.grad = None
        y, times, words = inputs.frames(frames)
        F.mse_loss(roles.fake_score(y, times, words), y).backward()

    def judge() -> None:
        for weight in roles.fake_weights.values():
            weight.grad = None
        judgements = 2 + (config.adm.r1_weight > 0)
        loss = sum(F.softplus(heads(roles.encoder(x, t, text))).mean() for _ in range(judgements))
        loss.backward()

    return {"student": student, "fake score": fake, "heads": judge}


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def in_words(plan: Plan) -> str:
    """A table of the plan, in GiB."""
    return "\n".join(f"{size / GIB:8.2f} GiB  {name}" for name, size in plan.rows.items())
