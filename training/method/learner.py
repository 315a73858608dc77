"""What learns in a distillation: a set of weights with its optimiser, updated alike in all processes."""

import math

import torch
from torch import Tensor

from training.method.masters import Weights, gather, refresh
from training.run.processes import Processes

MAX_BAD_STEPS = 5


class DivergedError(RuntimeError):
    """Losses or gradients stayed NaN or infinite; the message says whose and what still stands."""


class OptimiserError(ValueError):
    """An optimiser that this machine does not have; the message is one sentence."""


def new_optimiser(kind: str, weights: Weights, lr: float, betas: tuple[float, float], decay: float = 0.0):
    """AdamW (arXiv 1711.05101) of the setting `run.optimiser`: torch's, or bitsandbytes' with states in 8 bits (arXiv 2110.02861).

    OptimiserError where bitsandbytes is not installed.
    """
    if kind == "adamw":
        on_gpu = all(weight.is_cuda for weight in weights.values())
        return torch.optim.AdamW(weights.values(), lr=lr, betas=betas, weight_decay=decay, fused=on_gpu or None)
    try:
        import bitsandbytes.optim
    except ImportError as error:
        raise OptimiserError(
            f"Expected bitsandbytes for run.optimiser {kind}, found none; pip install bitsandbytes, or set run.optimiser adamw."
        ) from error
    made = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}[kind]
    return made(weights.values(), lr=lr, betas=betas, weight_decay=decay)


class Learner:
    """Weights with their optimiser: gradients averaged over the processes and clipped by norm, bad steps skipped and counted.

    Where networks compute with bf16 `copies`, the weights are their masters.
    """

    def __init__(
        self,
        name: str,
        weights: Weights,
        optimiser: torch.optim.Optimizer,
        clip: float,
        processes: Processes | None = None,
        copies: Weights | None = None,
    ):
        self.name, self.weights, self.copies, self.optimiser, self.clip = name, weights, copies, optimiser, clip
        self.processes = processes or Processes("cpu")
        self.steps = self.skipped = self.skipped_in_a_row = 0

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a part of the update's loss."""
        loss.backward()
        gather(self.weights, self.copies)

    def refresh(self) -> None:
        """After the weights were set, and not by a step: what networks compute with follows."""
        refresh(self.weights, self.copies)

    def step(self, losses: dict[str, Tensor], lr: float | None = None) -> tuple[dict[str, float], float]:
        """One update from the gradients that were accumulated, at `lr` if given; returns the losses' means over all processes, and
        the norm of the gradient.

        `losses` are this process's, scalars on the device; here alone, once, the CPU waits for it: a step that is not finite is to
        be skipped. DivergedError after `MAX_BAD_STEPS` such steps in a row, in all processes alike.
        """
        figures = self.processes.average(self.weights.values(), torch.stack([loss.double() for loss in losses.values()]))
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), self.clip)
        *figures, norm = torch.cat([figures, norm.double().reshape(1)]).tolist()
        if math.isfinite(norm) and math.isfinite(sum(figures)):
            self.optimiser.param_groups[0]["lr"] = lr or self.optimiser.param_groups[0]["lr"]
            self.optimiser.step()
            self.refresh()
            self.steps += 1
            if norm > 0:  # an update that had nothing to judge says nothing about the ones before
                self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.optimiser.zero_grad(set_to_none=True)
        if self.skipped_in_a_row >= MAX_BAD_STEPS:
            raise DivergedError(
                f"Expected finite losses and gradients, found NaN or Inf in {MAX_BAD_STEPS} updates of the {self.name} in a row; "
                "the last checkpoint stands: lower the learning rates or the guidance and start anew in another folder."
            )
        return dict(zip(losses, figures, strict=True)), norm

    def state_dict(self) -> dict:
        counts = {"steps": self.steps, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        return counts | {"weights": self.weights, "optimiser": self.optimiser.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.steps, self.skipped, self.skipped_in_a_row = state["steps"], state["skipped"], state["skipped_in_a_row"]
        for name, weight in self.weights.items():
            weight.copy_(state["weights"][name])
        self.refresh()
        saved = state["optimiser"]
        for group, own in zip(saved["param_groups"], self.optimiser.param_groups, strict=True):
            group |= {key: own[key] for key in ("fused", "foreach") if key in own}  # how it runs is this device's matter
        self.optimiser.load_state_dict(saved)
