import json

import pytest
import torch
from torch import nn

from training.method.stage import KernelMuon, adamw, run_stage, warmup_cosine


def net_and_optimisers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 3))
    kernels = [p for p in net.parameters() if p.ndim == 4]
    return net, [KernelMuon(kernels, lr=1e-2), adamw([p for p in net.parameters() if p.ndim != 4], lr=1e-2)]


def stage(folder, steps, stop_at=None):
    net, optimisers = net_and_optimisers()

    def losses(step, generator):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(4, 2, 8, 8, generator=generator)
        return {"loss": (net(x) - x[:, :, 2:-2, 2:-2]).square().mean(), "size": x.abs().mean()}

    run_stage("s", folder, net, losses, optimisers=optimisers, steps=steps, seed=1, ema_decay=0.9, save_every=5)
    return net


@pytest.mark.parametrize("stop_at", [3, 5, 13])
def test_a_stage_that_was_stopped_and_resumed_ends_bitwise_as_one_that_was_not(tmp_path, stop_at):
    straight = stage(tmp_path / "a", 16)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "b", 16, stop_at)
    resumed = stage(tmp_path / "b", 16)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_stage_learns_and_logs(tmp_path):
    stage(tmp_path, 100)
    lines = [json.loads(line) for line in (tmp_path / "s" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 100] and lines[1]["loss"] < lines[0]["loss"]
    assert {"loss", "size", "seconds"} < lines[0].keys()


def test_muon_on_kernels_is_muon_on_their_matrices():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(6, 2, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    mine = KernelMuon([kernel], lr=0.1)
    theirs = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for n in range(3):
        gradient = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(n))
        kernel.grad, matrix.grad = gradient, gradient.flatten(1).clone()
        mine.step()
        theirs.step()
    assert torch.equal(kernel.detach().flatten(1), matrix.detach())


def test_the_learning_rate_rises_then_falls_to_the_floor():
    rates = [warmup_cosine(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[99] == rates[100] == pytest.approx(1)
    assert rates[100:] == sorted(rates[100:], reverse=True) and rates[-1] == pytest.approx(0.02, abs=1e-3)
