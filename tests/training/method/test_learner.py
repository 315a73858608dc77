import sys
import types

import pytest
import torch

from training.method.learner import MAX_BAD_STEPS, DivergedError, Learner, OptimiserError, new_optimiser


def weights(*values):
    return {str(i): torch.nn.Parameter(torch.tensor([value])) for i, value in enumerate(values)}


def test_the_optimiser_of_few_bits_is_that_of_bitsandbytes(monkeypatch):
    made = []
    optim = types.ModuleType("bitsandbytes.optim")
    for name in ("AdamW8bit", "PagedAdamW8bit"):
        setattr(optim, name, lambda params, name=name, **settings: made.append((name, len(list(params)), settings)))
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    monkeypatch.setattr(sys.modules["bitsandbytes"], "optim", optim, raising=False)
    new_optimiser("adamw8bit", weights(1.0), 1e-3, (0.0, 0.99))
    new_optimiser("paged_adamw8bit", weights(1.0, 2.0), 1e-4, (0.9, 0.999), 0.1)
    assert made == [
        ("AdamW8bit", 1, {"lr": 1e-3, "betas": (0.0, 0.99), "weight_decay": 0.0}),
        ("PagedAdamW8bit", 2, {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.1}),
    ]


def test_without_bitsandbytes_it_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(OptimiserError, match=r"^Expected bitsandbytes for run.optimiser adamw8bit, found none; [^\n]*\.$"):
        new_optimiser("adamw8bit", weights(1.0), 1e-3, (0.9, 0.999))


def test_a_step_returns_its_losses_and_the_norm_before_clipping():
    values = weights(3.0, 4.0)
    learner = Learner("student", values, torch.optim.SGD(values.values(), lr=1.0), clip=1.0)
    loss = sum(w.square().sum() / 2 for w in values.values())
    loss.backward()
    figures, norm = learner.step({"loss": loss.detach(), "other": torch.tensor(2.0)}, lr=0.5)
    assert figures == {"loss": 12.5, "other": 2.0} and norm == pytest.approx(5.0)
    assert [w.item() for w in values.values()] == pytest.approx([3 - 0.5 * 0.6, 4 - 0.5 * 0.8])
    assert all(w.grad is None for w in values.values())


def test_updates_that_have_nothing_to_judge_do_not_hide_that_the_others_are_bad():
    values = weights(1.0)
    learner = Learner("fake score", values, torch.optim.SGD(values.values(), lr=1.0), clip=1.0)
    for _ in range(MAX_BAD_STEPS - 1):
        (values["0"].sum() * torch.nan).backward()
        learner.step({"fake": torch.tensor(torch.nan)})
        learner.step({"fake": torch.tensor(0.0)})  # no clip of its batch is judged
    with pytest.raises(DivergedError, match="fake score in a row"):
        (values["0"].sum() * torch.nan).backward()
        learner.step({"fake": torch.tensor(torch.nan)})


def test_a_good_update_clears_the_count():
    values = weights(1.0)
    learner = Learner("fake score", values, torch.optim.SGD(values.values(), lr=1.0), clip=1.0)
    for _ in range(2 * MAX_BAD_STEPS):
        (values["0"].sum() * torch.nan).backward()
        learner.step({"fake": torch.tensor(torch.nan)})
        values["0"].sum().backward()
        learner.step({"fake": torch.tensor(1.0)})
    assert learner.skipped == learner.steps == 2 * MAX_BAD_STEPS
