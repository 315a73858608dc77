"""The plan against what is allocated: the same roles with real weights on the CPU."""

import pytest
import torch

from training.cost.memory_plan import PeakBytes, plan_of
from training.cost.operations import Inputs, meta_inputs, meta_roles
from training.method.discriminator import DiscriminatorHeads
from training.method.learner import new_optimiser
from training.method.setup import new_roles

TOKENS = 32


def test_the_peak_is_what_stood_at_once():
    with PeakBytes() as peak:
        a = torch.zeros(1000)
        b = a * 2
        del a
        c = b.view(10, 100)  # no memory of its own
        d = c + 1
    assert (peak.peak, peak.live) == (8000, 8000) and d is not None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("train", "share_base"), [("all", False), ("motion", True), ("motion+lora", True)])
def test_the_plan_is_what_is_allocated(stack, make_config, train, share_base, half, checkpointing):
    model = {"train": train, "share_base": share_base, "gradient_checkpointing": checkpointing}
    config = make_config(model=model, data={"frames": 4}, sdm={"guidance": 2.0})
    unet, motion = dict(stack.image_unet.config), dict(stack.motion.config)
    roles, heads = meta_roles(config, unet, motion, half)
    planned = plan_of(config, roles, heads, meta_inputs(config, unet, TOKENS), half)

    real = new_roles(config, stack, None, half=half)
    real_heads = DiscriminatorHeads([*unet["block_out_channels"][-3:-1], unet["block_out_channels"][-1]])
    inputs = Inputs(torch.randn(1, 4, 4, 8, 8), torch.randn(1, TOKENS, unet["cross_attention_dim"]))
    found = plan_of(config, real, real_heads, inputs, half)
    assert planned.standing == found.standing
    for name, size in planned.turns.items():
        assert found.turns[name] == pytest.approx(size, rel=0.1), name

    optimiser = new_optimiser("adamw", real.student_weights, 1e-3, (0.9, 0.999))
    for weight in real.student_weights.values():
        weight.grad = torch.ones_like(weight)
    optimiser.step()
    states = [value for state in optimiser.state.values() for value in state.values() if value.dim() > 0]
    assert sum(value.nbytes for value in states) == planned.standing["student's optimiser"]
