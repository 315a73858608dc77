import time

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from training.run.meter import MEASURED, Meter, Operations, TimedClips

torch.set_num_threads(1)


class Clips:
    def __init__(self, delay=0.0):
        self.delay = delay

    def __len__(self):
        return 3

    def batch(self, indices, clips=True):
        time.sleep(self.delay)
        return torch.tensor(indices), torch.tensor(indices)


def layers():
    """A product, a convolution and attention, forward and backward, the product computed again: operations known by hand."""
    weight, kernel = torch.randn(4, 5, requires_grad=True), torch.randn(2, 3, 3, 3, requires_grad=True)
    query = torch.randn(1, 2, 6, 8, requires_grad=True)
    x = torch.randn(7, 4, requires_grad=True)
    image = torch.randn(1, 3, 6, 6, requires_grad=True)
    loss = checkpoint(lambda: (x @ weight).tanh(), use_reentrant=False).sum() + F.conv2d(image, kernel).sum()
    (loss + F.scaled_dot_product_attention(query, query, query).sum()).backward()


def test_operations_are_those_by_hand_and_of_torch_s_own_counter():
    with Operations() as operations:
        layers()
    product, convolution = 2 * 7 * 4 * 5, 2 * 2 * 3 * 3 * 3 * 4 * 4
    attention = 2 * 2 * (2 * 6 * 6 * 8)  # two products of two heads; backward takes five, the one of the forward pass again
    assert operations.count == 4 * product + 3 * convolution + attention + attention // 2 * 5
    with FlopCounterMode(display=False) as counter:  # knows no attention on a CPU
        layers()
    assert operations.count - attention - attention // 2 * 5 == counter.get_total_flops()


def test_nothing_is_kept_alive_by_counting():
    with Operations():
        made = torch.randn(4, 4) @ torch.randn(4, 4)
        storage = torch.multiprocessing.reductions.StorageWeakRef(made.untyped_storage())
        assert not storage.expired()
        del made
        assert storage.expired()


def test_an_update_s_figures_come_with_what_it_took():
    meter = Meter(Clips(0.02), torch.device("cpu"), torch.float32)
    a, b = torch.randn(64, 64), torch.randn(64, 64)

    def update(clips):
        assert len(clips) == 3 and clips.batch([1, 2])[0].tolist() == [1, 2]
        time.sleep(0.02)
        return {"loss": (a @ b).sum().item()}

    first, second = meter.update("kind", update), meter.update("kind", update)
    for figures in (first, second):
        assert list(figures) == ["loss", *MEASURED]
        assert figures["update_seconds"] >= figures["data_seconds"] + 0.02 >= 0.04
        assert figures["tflops"] * figures["update_seconds"] == pytest.approx(2 * 64**3 / 1e12, rel=0.5, abs=1e-6)
        assert figures["memory_gib"] > 0
    assert meter._counted == {"kind": 2 * 64**3}
    assert second["data_seconds"] < 0.04  # of this update alone
    meter.update("another", lambda clips: {})
    assert meter._counted["another"] == 0


def test_clips_are_those_that_are_timed():
    clips = TimedClips(Clips())
    assert clips.batch([0])[1].tolist() == [0] and clips.seconds > 0
