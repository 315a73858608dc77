"""The plan against what is allocated: the same roles with real weights on the CPU."""

import pytest
import torch

from training.cost.memory_plan import PeakBytes, fitted, memory_plan, plan_of
from training.cost.operations import Inputs, meta_inputs, meta_roles
from training.method.discriminator import heads_for
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
    planned = plan_of(config, roles, heads, meta_inputs(config, unet, TOKENS))

    real = new_roles(config, stack, None, half=half)
    real_heads = heads_for([*unet["block_out_channels"][-3:-1], unet["block_out_channels"][-1]], config)
    inputs = Inputs(torch.randn(1, 4, 4, 8, 8), torch.randn(1, TOKENS, unet["cross_attention_dim"]))
    found = plan_of(config, real, real_heads, inputs)
    assert planned.standing == found.standing
    for name, size in planned.turns.items():
        assert found.turns[name] == pytest.approx(size, rel=0.1), name

    optimiser = new_optimiser("adamw", real.student_weights, 1e-3, (0.9, 0.999))
    for weight in real.student_weights.values():
        weight.grad = torch.ones_like(weight)
    optimiser.step()
    states = [value for state in optimiser.state.values() for value in state.values() if value.dim() > 0]
    assert sum(value.nbytes for value in states) == planned.standing["student's optimiser"]


def test_gradients_of_earlier_parts_stand_while_a_later_one_is_made(stack, make_config):
    unet, motion = dict(stack.image_unet.config), dict(stack.motion.config)
    whole, cut = (memory_plan(make_config(run={"accumulate": n}), unet, motion) for n in (1, 2))
    turn = "turn of the student: gradients and activations"
    assert whole.turns[turn] < cut.turns[turn] <= whole.turns[turn] + whole.standing["student's weights"]
    assert whole.standing == cut.standing


@pytest.fixture(scope="module")
def plans():
    return {}


@pytest.mark.parametrize("checkpointing", ["auto", True])
def test_auto_is_what_fits(stack, make_config, checkpointing, plans, monkeypatch):
    """Parts of as many clips as fit, and then no checkpointing where that fits as well."""
    unet, motion = dict(stack.image_unet.config), dict(stack.motion.config)
    config = make_config(run={"batch": 6, "accumulate": "auto"}, model={"gradient_checkpointing": checkpointing})

    def planned(settled, *networks):  # each plan takes seconds, and most are asked for several times
        key = settled.run.accumulate, settled.model.gradient_checkpointing, networks[-1]
        if key not in plans:
            plans[key] = memory_plan(settled, *networks)
        return plans[key]

    monkeypatch.setattr("training.cost.memory_plan.memory_plan", planned)

    def needed(clips, again):
        settled = make_config(run={"batch": 6, "accumulate": 6 // clips}, model={"gradient_checkpointing": again})
        return planned(settled, unet, motion, clips).total / 0.9

    def found(memory):
        settled = fitted(config, memory, 1, unet, motion)
        return settled.run.accumulate, settled.model.gradient_checkpointing

    assert needed(3, True) < needed(3, False) and needed(1, True) < needed(2, True)
    assert found(needed(3, False) + 1) == (2, checkpointing is True)
    assert found(needed(3, False) - 1) == found(needed(3, True) + 1) == (2, True)
    assert found(needed(3, True) - 1)[0] == 3
    assert found(needed(1, True) - 1) == found(None) == (6, True)


def test_what_was_decided_stays(make_config):
    config = make_config(run={"batch": 6, "accumulate": 3})
    assert fitted(config, 2**60) is config


def test_each_of_several_processes_cuts_its_own_part(make_config):
    config = make_config(run={"batch": 6, "accumulate": "auto"})
    assert fitted(config, None, processes=2).run.accumulate == 3
