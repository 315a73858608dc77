import pytest
import torch
from torch import nn

from training.run.precision import DeviceError, lent, pick_device


class Traveller(nn.Linear):
    """A layer that remembers where it was sent; this machine may have one device only."""

    def __init__(self):
        super().__init__(1, 1)
        self.places = []

    def to(self, place):
        self.places.append(str(place))
        return self


def test_a_lent_module_goes_home_even_after_an_error():
    one, other = Traveller(), Traveller()
    with pytest.raises(KeyError), lent(torch.device("cuda:1"), one, other):
        assert one.places == other.places == ["cuda:1"]
        raise KeyError
    assert one.places == other.places == ["cuda:1", "cpu"]


def test_a_lent_module_keeps_its_weights():
    layer = nn.Linear(2, 2)
    before = layer.weight.clone()
    with lent(torch.device("cpu"), layer):
        pass
    assert torch.equal(layer.weight, before)


def test_a_device_that_is_not_there():
    with pytest.raises(DeviceError, match="cuda:64"):
        pick_device("cuda:64")
