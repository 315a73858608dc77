"""The processes of a run: one, or as many as `accelerate launch` starts, on one node or several.

Hugging Face's accelerate is the engine: it reads how it was launched, makes the process group and carries what is exchanged. Its
wrapper of modules (DistributedDataParallel) is not used, for what learns here are no modules: the student, the fake score and the heads
are sets of weights behind functions, adapters on one base that a forward pass takes through several times and switches between. Every
process runs backward on its own part of a batch, and the gradients of one learner at a time are averaged, in flat pieces, before its
optimiser's step. That is the same arithmetic; what is lost is the overlap with the backward pass, some tens of milliseconds of an
update of many seconds.
"""

import hashlib
import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta

import torch
from torch import Tensor, nn

from training.run.config import ConfigError
from training.run.packages import needs
from training.run.precision import DeviceError, pick_device
from training.run.sections import RunConfig

TIMEOUT = 1800  # seconds that processes wait for one another: sample clips and checkpoints are the first's alone
_PIECE = 2**24  # numbers that travel together


class LostProcessError(RuntimeError):
    """Another process of the run is gone, or does something else; the message is one sentence."""


class Processes:
    """This process among those of the run: `rank` of `count`, `main` the first, on `device`.

    `device` is a setting as `pick_device` takes it; with several processes each takes the CUDA device of its own number on its node.
    `timeout` is in seconds. DeviceError for a device that is not there, or one that several would share.
    """

    def __init__(self, device: str = "auto", timeout: float = TIMEOUT):
        self.device = pick_device(device)
        accelerate = needs("accelerate", "to hold the processes of a run together")
        self._utils = accelerate.utils
        group = self._utils.InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)).to_kwargs()
        try:
            self.state = accelerate.PartialState(cpu=self.device.type == "cpu", **group)
        except RuntimeError as error:  # of torch.distributed
            raise LostProcessError(
                f"Expected all processes of this run to come together, found: {_first_line(error)}."
            ) from error
        self.rank, self.count, self.main = self.state.process_index, self.state.num_processes, self.state.is_main_process
        if self.count == 1:
            return
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _told_to_end)  # what a launcher sends to those that are left
        if self.device.type == "cuda":
            if self.device.index is not None:
                raise DeviceError(
                    f"Expected run.device auto, cuda or cpu for {self.count} processes, found {device}, which they would share; "
                    "choose one of these."
                )
            self.device = self.state.device

    @torch.no_grad()
    def average(self, weights: Iterable[nn.Parameter], figures: Tensor) -> Tensor:
        """Gives the weights the mean of their gradients over all processes; returns the mean of `figures` (N,). Alone, nothing is done.

        A weight that no process has a gradient for has none afterwards; one that some have none for counts there as 0.
        LostProcessError where a process does not answer.
        """
        if self.count == 1:
            return figures
        weights = list(weights)
        got = figures.new_tensor([weight.grad is not None for weight in weights])
        figures, got = self._told(lambda: self._utils.reduce(torch.cat([figures, got]), "mean")).split(
            [len(figures), len(weights)]
        )
        learning = [weight for weight, share in zip(weights, got.tolist(), strict=True) if share > 0]
        for weight in learning:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        for piece in _pieces([weight.grad for weight in learning]):
            mean = self._told(lambda piece=piece: self._utils.reduce(torch.cat([g.flatten() for g in piece]), "mean"))
            for gradient, part in zip(piece, mean.split([g.numel() for g in piece]), strict=True):
                gradient.copy_(part.view_as(gradient))
        return figures

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors (N, …) of all processes, one after the other (count * N, …); all call it together."""
        return tensor if self.count == 1 else self._told(lambda: self._utils.gather(tensor))

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says so."""
        return flag if self.count == 1 else any(self._told(lambda: self._utils.gather_object([flag])))

    def require_same(self, what: str, value) -> None:
        """LostProcessError where another process has another `value` (plain JSON); all wait for one another here."""
        if self.count == 1:
            return
        digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()
        if len(set(self._told(lambda: self._utils.gather_object([digest])))) > 1:
            raise LostProcessError(
                f"Expected the same {what} in all {self.count} processes, found different ones; "
                "they must see the same files: put run.folder and data.folder on a disk that all nodes share."
            )

    def wait(self) -> None:
        """Until all processes are here."""
        self.require_same("place in the run", "here")

    def first_alone(self) -> AbstractContextManager:
        """A block that the first process runs before the others do."""
        return self.state.main_process_first()

    def end(self) -> None:
        """Leaves the group, when all is done."""
        if self.count > 1:
            self.state.destroy_process_group()

    def _told(self, exchange: Callable):
        try:
            return exchange()
        except RuntimeError as error:  # gloo's and NCCL's are of this kind
            raise LostProcessError(
                f"Expected an answer of all {self.count} processes of this run, found one lost ({_first_line(error)}); "
                "the same command goes on from the last checkpoint."
            ) from error


def require_equal_parts(run: RunConfig, processes: Processes) -> None:
    """ConfigError where a batch cannot be cut into equal parts for all processes, and those into `run.accumulate` each."""
    if run.accumulate == "auto" and run.batch % processes.count:
        raise ConfigError(
            f"run.batch: expected a multiple of {processes.count} processes, found {run.batch}; change one of the two."
        )
    if run.accumulate != "auto" and run.batch % (processes.count * run.accumulate):
        raise ConfigError(
            f"run.batch: expected a multiple of {processes.count} processes times run.accumulate ({run.accumulate}), "
            f"found {run.batch}; change one of the three."
        )


def _told_to_end(*_) -> None:
    raise LostProcessError(
        "This process was told to end, as launchers do when another process of the run is gone; "
        "the same command goes on from the last checkpoint."
    )


def _pieces(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in turn, in lists of about `_PIECE` numbers each."""
    piece: list[Tensor] = []
    for tensor in tensors:
        piece.append(tensor)
        if sum(t.numel() for t in piece) >= _PIECE:
            yield piece
            piece = []
    if piece:
        yield piece


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
