import pytest
import torch
from torch import nn

from training.method import masters as room
from training.method.learner import Learner
from training.method.masters import gather, masters_of, refresh


@pytest.fixture
def copies():
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(3, 5, generator=generator)) for name in "abc"}


def test_masters_keep_what_bf16_drops(copies):
    before = {name: weight.detach().clone() for name, weight in copies.items()}
    masters = masters_of(copies)
    for name, value in before.items():
        assert masters[name].dtype == torch.float32 and torch.equal(masters[name], value)
        assert copies[name].dtype == torch.bfloat16 and torch.equal(copies[name], value.bfloat16())
        assert masters[name].requires_grad and copies[name].requires_grad


def test_refreshed_copies_are_the_masters_rounded(copies):
    masters = masters_of(copies)
    with torch.no_grad():
        for weight in masters.values():
            weight.add_(1)
    refresh(masters, copies)
    assert all(torch.equal(copies[name], masters[name].bfloat16()) for name in masters)


@pytest.mark.parametrize("piece", [1, 20, 2**26])
def test_gradients_are_added_in_float32(copies, monkeypatch, piece):
    """Where bf16 would lose a small one beside a large one; a weight without any keeps none."""
    monkeypatch.setattr(room, "_PIECE", piece)
    masters = masters_of(copies)
    parts = [torch.full((3, 5), value) for value in (256.0, 0.5, 0.25)]
    for part in parts:
        for name in "ab":
            copies[name].grad = part.bfloat16()
        gather(masters, copies)
        assert all(weight.grad is None for weight in copies.values())
    assert all(torch.equal(masters[name].grad, sum(parts)) for name in "ab") and masters["c"].grad is None
    assert sum(parts).bfloat16()[0, 0] != sum(parts)[0, 0]


def test_without_copies_nothing_is_done(copies):
    copies["a"].grad = torch.ones(3, 5)
    gather(copies, None), refresh(copies, None)
    assert torch.equal(copies["a"].grad, torch.ones(3, 5))


def test_steps_smaller_than_bf16_are_not_lost(copies):
    masters = masters_of(copies)
    learner = Learner("student", masters, torch.optim.SGD(masters.values(), lr=2**-12), clip=100.0, copies=copies)
    before = {name: weight.detach().clone() for name, weight in masters.items()}
    for _ in range(16):
        loss = sum(weight.float().sum() for weight in copies.values())
        learner.backward(loss)
        learner.step({"loss": loss.detach()})
    for name, value in before.items():
        torch.testing.assert_close(masters[name].detach(), value - 2**-8, rtol=0, atol=1e-6)
        assert torch.equal(copies[name], masters[name].bfloat16())


def test_a_state_holds_the_masters_and_loading_it_refreshes_the_copies(copies):
    masters = masters_of(copies)
    learner = Learner("student", masters, torch.optim.SGD(masters.values(), lr=1.0), clip=1.0, copies=copies)
    state = learner.state_dict() | {"weights": {name: weight + 1 for name, weight in masters.items()}}
    learner.load_state_dict(state)
    for name in masters:
        assert torch.equal(masters[name], state["weights"][name]) and torch.equal(copies[name], masters[name].bfloat16())
