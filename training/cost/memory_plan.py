"""How much memory a run's update takes, tensor by tensor, before any of it is allocated: counted on the meta device.

Weights, optimiser states and the averaged weights follow from the roles. Gradients and activations are those that stand at once in a
turn of the student, of the fake score and of the heads, for the clips of one part, by the roles' own functions and checkpointing, with
a GPU's attention, which keeps no matrix of queries by keys.
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
from training.method.adm import kinds_judged, looks
from training.method.discriminator import DiscriminatorHeads, judge_as_they_stand
from training.method.masters import gather
from training.method.roles import Roles
from training.run.config import DistillConfig

GIB = 2**30
LARGEST_PART = 4  # clips; with more a GPU has no less to be told of each
_USABLE = 0.9  # of free memory: libraries' workspaces, and what lies between tensors
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


def peak_bytes(function: Callable[[], object]) -> int:
    """Bytes that `function` adds at most."""
    with as_on_a_gpu(), PeakBytes() as peak:
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


def memory_plan(config: DistillConfig, unet: dict = SD15, motion: dict = V3, clips: int = 1) -> Plan:
    """The plan of a run's settings and so many clips a part, for networks of these configurations: SD1.5 with AnimateDiff's v3."""
    half = config.run.precision != "float32"
    roles, heads = meta_roles(config, unet, motion, half)
    return plan_of(config, roles, heads, meta_inputs(config, unet, clips=clips))


def fitted(
    config: DistillConfig, memory: int | None, processes: int = 1, unet: dict = SD15, motion: dict = V3
) -> DistillConfig:
    """The settings with `auto` decided for a GPU on which so many bytes are free (None, a CPU: what takes the least).

    As many clips a part as fit, up to `LARGEST_PART`, and then no gradient checkpointing where that fits too. Where nothing does it is
    what takes the least.
    """
    run, model, own = config.run, config.model, config.run.batch // processes
    open_parts, open_checkpointing = run.accumulate == "auto", model.gradient_checkpointing == "auto"
    if not (open_parts or open_checkpointing):
        return config
    largest_first = range(min(LARGEST_PART, own), 0, -1)
    sizes = [size for size in largest_first if own % size == 0] if open_parts else [own // run.accumulate]

    def chosen(size: int, checkpointing: bool) -> DistillConfig:
        changed = {
            "run": run.model_copy(update={"accumulate": own // size}),
            "model": model.model_copy(update={"gradient_checkpointing": checkpointing}),
        }
        return config.model_copy(update=changed)

    def fits(size: int, checkpointing: bool) -> bool:
        return memory_plan(chosen(size, checkpointing), unet, motion, size).total <= _USABLE * memory

    least = open_checkpointing or model.gradient_checkpointing
    for size in sizes if memory is not None else ():
        if fits(size, least):
            return chosen(size, least and not (open_checkpointing and fits(size, False)))
    return chosen(sizes[-1], least)


def plan_of(config: DistillConfig, roles: Roles, heads: DiscriminatorHeads, inputs: Inputs) -> Plan:
    """The plan for roles and heads, wherever these and the inputs are."""
    student, fake, judges = ([*w] for w in (roles.student_weights.values(), roles.fake_weights.values(), heads.parameters()))
    copies = [[*(weights or {}).values()] for weights in (roles.student_copies, roles.fake_copies)]
    trained = {id(weight) for weight in (*student, *fake, *judges, *copies[0], *copies[1])}
    frozen = [p for module in roles.modules for p in _tensors(module) if id(p) not in trained]
    state = STATE_BYTES[config.run.optimiser]
    standing = {
        "frozen weights": bytes_of(frozen),
        "student's weights": bytes_of(student + copies[0]),
        "fake score's weights": bytes_of(fake + copies[1]),
        "heads": bytes_of(judges),
        "student's optimiser": state * sum(w.numel() for w in student),
        "fake score's optimiser": state * sum(w.numel() for w in fake),
        "heads' optimiser": state * sum(w.numel() for w in judges),
        "averaged weights": bytes_of(student),
    }
    if config.adm.pool:
        standing["clips that the heads go on learning from"] = _pool_bytes(config, roles, inputs)
    turns = {name: peak_bytes(turn) for name, turn in _turns(config, roles, heads, inputs).items()}
    _forget((*student, *fake, *judges))
    return Plan(standing, {f"turn of the {name}: gradients and activations": size for name, size in turns.items()})


def _pool_bytes(config: DistillConfig, roles: Roles, inputs: Inputs) -> int:
    """Of the features in the pool, for one process."""
    features = bytes_of(roles.encoder(inputs.x, inputs.t, inputs.text)) / len(inputs.x)
    return round((config.adm.pool + 1) * config.run.batch * kinds_judged(config) * features)


def _turns(config: DistillConfig, roles: Roles, heads: DiscriminatorHeads, inputs: Inputs) -> dict[str, Callable]:
    """Each learner's turn; where a batch is cut into parts a later part's, beside the gradients of those before it."""
    x, t, text, frames = inputs.x, inputs.t, inputs.text, config.sdm.frames
    parts, kinds = 1 if config.run.accumulate == 1 else 2, kinds_judged(config)
    judged = looks(len(x), kinds) if parts > 1 else min(looks(len(x), kinds), config.adm.updates_per_student)

    def begin(weights: Iterable[nn.Parameter]) -> None:
        for weight in weights if parts > 1 else ():
            weight.grad = torch.zeros_like(weight)

    def student() -> None:
        begin(roles.student_weights.values())
        x0 = x - roles.student(x, t, text)
        loss = F.softplus(-judge_as_they_stand(heads, roles.encoder(x0, t, text))).mean() if config.has_heads else 0
        with torch.no_grad():
            y, times, words = inputs.frames(frames)
            both = [torch.cat([tensor, tensor]) for tensor in (y, times, words)]
            target = x - x  # what SDM's gradient takes
            roles.fake_score(y, times, words), roles.real_score(*both)
        (loss + F.mse_loss(x0, target)).backward()
        gather(roles.student_weights, roles.student_copies)

    def fake() -> None:
        _forget(roles.student_weights.values())
        begin(roles.fake_weights.values())
        y, times, words = inputs.frames(frames)
        F.mse_loss(roles.fake_score(y, times, words), y).backward()
        gather(roles.fake_weights, roles.fake_copies)

    def judge() -> None:
        _forget(roles.fake_weights.values())
        with torch.no_grad():
            features = roles.encoder(*(torch.cat([tensor] * judged * kinds) for tensor in (x, t, text)))
        for part in zip(*(feature.chunk(judged) for feature in features), strict=True):
            F.softplus(heads(part)).mean().backward()

    return {"student": student, "fake score": fake, "heads": judge}


def _forget(weights: Iterable[nn.Parameter]) -> None:
    for weight in weights:
        weight.grad = None


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def in_words(plan: Plan) -> str:
    """A table of the plan, in GiB."""
    return "\n".join(f"{size / GIB:8.2f} GiB  {name}" for name, size in plan.rows.items())
