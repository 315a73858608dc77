import pytest
import torch
from torch import nn

from training.cost.launches import Launches, Noise, casts, count_update, narrow_distillation
from training.run.command_line import load_config
from training.run.config import ROOT


def test_views_and_allocations_launch_nothing():
    x = torch.ones(4, 6)
    with Launches() as launches:
        x.view(6, 4).transpose(0, 1)[1:].expand(2, 3, 6).detach().squeeze().unflatten(0, (-1, 1))
        torch.empty(3), torch.empty_like(x), x.new_empty(2), x.flatten(), x.split(2), x.to(torch.float32)
    assert not launches.counts


def test_what_a_device_has_to_do_is_counted_by_name():
    x, layer = torch.ones(4, 6), nn.Linear(6, 5)
    with Launches() as launches:
        layer(x).sum().backward()
        torch._foreach_add_([x, x], 1)
        x.t().contiguous(), x.bfloat16().float(), x.copy_(x.double()), x.zero_()
    forward = {"addmm": 1, "sum": 1}
    backward = {"ones_like": 1, "mm": 1, "sum": 1}  # of the input none is wanted; the bias's gradient is a sum
    others = {"_foreach_add_": 1, "clone": 1, "cast to bfloat16": 1, "cast to float32": 2, "cast to float64": 1, "zero_": 1}
    expected = {name: sum(part.get(name, 0) for part in (forward, backward, others)) for name in forward | backward | others}
    assert launches.counts == expected and casts(launches.counts) == 4


@pytest.mark.parametrize(("clips", "most"), [(1, 22_000), (4, 6_500)])
def test_an_update_of_sd15_with_adapters_launches_no_more(clips, most):
    """Of SDM and ADM; under autocast, with adapters that cast and scale, it were 48,157 launches of one clip, 18,391 of them casts."""
    settings = {
        "run.batch": clips, "run.accumulate": 1, "run.precision": "bf16", "run.device": "cpu", "data.frames": 2,
        "data.height": 64, "data.width": 64, "model.lora_rank": 4,
    }  # fmt: skip
    file = ROOT / "training" / "configs" / "sd15_24gb.yaml"
    config = load_config(
        ["--config", str(file), *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]
    )
    counts = count_update(narrow_distillation(config), Noise(2), config.warmup.updates + config.adm.start_update)
    assert counts.total() / clips <= most and casts(counts) / clips <= 110
