"""An exponential moving average of trained parameters."""

import torch
from torch import Tensor, nn


class EMA:
    """Average of trained weights, by name.

    While it is young it forgets faster, min(decay, (1 + n) / (10 + n)), so that the first updates do not hang on the initial
    weights (as TensorFlow's ExponentialMovingAverage does with `num_updates`).
    """

    def __init__(self, weights: dict[str, nn.Parameter], decay: float):
        self.live, self.decay, self.updates = weights, decay, 0
        self.shadow = {name: p.detach().clone() for name, p in weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in self.live.values()], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the averaged and the live weights; called twice it changes nothing."""
        for name, parameter in self.live.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(kept)

    @torch.no_grad()
    def settle(self) -> None:
        """The live weights become the averaged ones."""
        for name, parameter in self.live.items():
            parameter.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Tensor | dict]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for name, tensor in self.shadow.items():
            tensor.copy_(state["shadow"][name])
