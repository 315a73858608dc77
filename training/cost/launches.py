"""How much work an update hands to a GPU: the operations that it launches, counted on a CPU at full depth and tiny width.

At small batches the CPU that launches kernels is the bound of an update, not the GPU, so their number is what decides; it hangs on the
depth of the networks and on the settings, not on widths and sizes.
"""

import math
from collections import Counter
from functools import cache

import torch
from diffusers import MotionAdapter, UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from avdm2_nodes.files.stack import Stack
from training.cost.operations import SD15, V3
from training.method.discriminator import heads_for
from training.method.loop import Distillation
from training.method.roles import build_roles
from training.run.config import DistillConfig

NARROW = {"block_out_channels": (32, 64, 64, 64)}  # of both, for SD1.5's depth at a width that a CPU runs in seconds
TEXT_WIDTH, TOKENS, SIDE = 32, 8, 8
_FREE = frozenset(
    {"_unsafe_view", "detach", "lift_fresh", "is_pinned", "_pin_memory", "set_", "resize_", "_local_scalar_dense"}
)
_aten = torch.ops.aten
_PRODUCTS = frozenset(
    {_aten.convolution.default, _aten.convolution_backward.default, _aten.mm.default, _aten.addmm.default, _aten.bmm.default}
)


def casts(counts: Counter[str]) -> float:
    """Those of a count that only change the numbers' format."""
    return sum(count for name, count in counts.items() if name.startswith("cast to "))


class Launches(TorchDispatchMode):
    """Counts the operations of a block by name, those that only view or allocate left out; one on a list of tensors counts once.

    Casts are counted as "cast to bfloat16" and so on, whatever operation makes them.
    """

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in _PRODUCTS and args[0].dtype == torch.bfloat16 and args[0].is_cpu:
            made = _in_float32(function, args)
        else:
            made = function(*args, **(kwargs or {}))
        if name := launched(function):
            self.counts[_cast(name, args, made) or name] += 1
        return made


def _in_float32(function: torch._ops.OpOverload, args: tuple):
    """A product of bf16, on CPUs without instructions for it ten times as fast."""
    made = function(*(arg.float() if isinstance(arg, Tensor) else arg for arg in args))
    return tree_map(lambda x: None if x is None else x.bfloat16(), made)


@cache
def launched(function: torch._ops.OpOverload) -> str | None:
    """The name of an operation that gives a device something to do; None of any other."""
    name = function._schema.name.removeprefix("aten::")
    if name in _FREE or name.startswith(("empty", "new_empty", "sym_")):
        return None
    views = any(value.alias_info is not None and not value.alias_info.is_write for value in function._schema.returns)
    return None if views else name


def _cast(name: str, args: tuple, made) -> str | None:
    source = {"_to_copy": 0, "copy_": 1}.get(name)
    if source is None or made.dtype == args[source].dtype:
        return None
    return f"cast to {str(made.dtype).removeprefix('torch.')}"


class Noise:
    """Stands for LatentClips: clips and texts of noise."""

    def __init__(self, frames: int):
        self.frames = frames

    def __len__(self) -> int:
        return 1024

    def batch(self, indices: list[int], clips: bool = True) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(indices[0])
        clips = torch.randn(len(indices), 4, self.frames, SIDE, SIDE, generator=generator)
        return clips, torch.randn(len(indices), TOKENS, TEXT_WIDTH, generator=generator)


def narrow_stack(unet: dict = SD15, motion: dict = V3) -> Stack:
    """Networks of these configurations' depth with few channels and random weights."""
    torch.manual_seed(0)
    image_unet = UNet2DConditionModel.from_config({**unet, **NARROW, "cross_attention_dim": TEXT_WIDTH, "sample_size": SIDE})
    return Stack(None, None, None, None, image_unet, MotionAdapter.from_config({**motion, **NARROW}))


def narrow_distillation(config: DistillConfig, stack: Stack | None = None) -> Distillation:
    """A run of these settings on a narrow stack, with optimisers that act on all weights at once, as they do on a GPU."""
    model, stack = config.model, stack or narrow_stack()
    roles = build_roles(
        stack,
        train=model.train,
        share_base=model.share_base,
        lora_rank=model.lora_rank,
        gradient_checkpointing=model.gradient_checkpointing,
        half=config.run.precision != "float32",
    )
    heads, empty = heads_for([*NARROW["block_out_channels"][-3:]], config), torch.zeros(1, TOKENS, TEXT_WIDTH)
    run = Distillation(config, roles, heads, empty, torch.device("cpu"))
    for learner in (run.student, run.fake, run.critic):
        learner.optimiser.param_groups[0]["foreach"] = True
        for weight in learner.weights.values():
            weight.grad = torch.zeros_like(weight)
        learner.optimiser.step()  # makes its states, which is a run's first update alone
        learner.optimiser.zero_grad()
    return run


def count_update(run: Distillation, data: Noise, step: int) -> Counter[str]:
    """What update `step` launches by name: the mean over as many from it on as give every step of the student's chain its turn."""
    chain = len(run.config.student.steps)
    updates = chain // math.gcd(chain, run.config.run.batch)
    with Launches() as launches:
        for later in range(updates):
            run.update(step + later, data)
    return Counter({name: count / updates for name, count in launches.counts.items()})
