import pytest
import torch
from torch import nn

from training.method.ema import EMA


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return {"a": nn.Parameter(torch.randn(3, 4)), "b": nn.Parameter(torch.randn(5))}


def move(weights, n):
    with torch.no_grad():
        for p in weights.values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n)))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.97])
def test_the_average_is_that_of_a_plain_loop(weights, decay):
    ema = EMA(weights, decay)
    expected = {name: p.detach().double().clone() for name, p in weights.items()}
    for n in range(1, 20):
        move(weights, n)
        ema.update()
        keep = min(decay, (1 + n) / (10 + n))
        expected = {name: keep * expected[name] + (1 - keep) * p.detach().double() for name, p in weights.items()}
    for name, shadow in ema.shadow.items():
        torch.testing.assert_close(shadow.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_swapping_exchanges_and_swapping_twice_changes_nothing(weights):
    ema = EMA(weights, 0.9)
    move(weights, 1)
    ema.update()
    live = {name: p.detach().clone() for name, p in weights.items()}
    shadow = {name: t.clone() for name, t in ema.shadow.items()}
    ema.swap()
    assert all(torch.equal(weights[name], shadow[name]) and torch.equal(ema.shadow[name], live[name]) for name in live)
    ema.swap()
    assert all(torch.equal(weights[name], live[name]) and torch.equal(ema.shadow[name], shadow[name]) for name in live)


def test_settling_makes_the_live_weights_the_averaged_ones(weights):
    ema = EMA(weights, 0.9)
    move(weights, 1)
    ema.update()
    shadow = {name: t.clone() for name, t in ema.shadow.items()}
    ema.settle()
    assert all(torch.equal(weights[name], shadow[name]) and torch.equal(ema.shadow[name], shadow[name]) for name in shadow)
    move(weights, 2)
    assert all(torch.equal(ema.shadow[name], shadow[name]) for name in shadow)  # two tensors still


def test_its_state_goes_on_where_it_was(weights):
    ema = EMA(weights, 0.9)
    for n in range(3):
        move(weights, n)
        ema.update()
    state = {"updates": ema.state_dict()["updates"], "shadow": {k: v.clone() for k, v in ema.state_dict()["shadow"].items()}}
    other = EMA(weights, 0.9)
    other.load_state_dict(state)
    move(weights, 4)
    ema.update()
    other.update()
    assert all(torch.equal(ema.shadow[name], other.shadow[name]) for name in weights)
