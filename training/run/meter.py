"""What an update takes, for the log of a run: seconds, the wait for data, operations a second, and memory."""

import time
from collections.abc import Callable, Hashable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from training.run.timing import matmul_ceiling, peak_bytes

MEASURED = ("update_seconds", "data_seconds", "tflops", "utilisation", "memory_gib")  # what `Meter.update` adds to the figures


_aten = torch.ops.aten
_COUNTED = flop_registry | {
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
    # attention, which torch's registry has for GPUs only
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda *args, out_val=None, **_: sdpa_flop_count(
        *(x.shape for x in args[:3])
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *args, out_val=None, **_: sdpa_backward_flop_count(
        *(x.shape for x in args[:4])
    ),
}


class Operations(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention within the block, in `count`; keeps no tensor alive.

    torch's own FlopCounterMode also says which module they belong to, for which it holds on to inputs.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        counted = _COUNTED.get(function._overloadpacket)
        if counted is not None:
            self.count += counted(*args, **kwargs, out_val=made)
        return made


class Clips(Protocol):
    """What a training loop asks of its data, as `data.latents.LatentClips` has it."""

    def __len__(self) -> int: ...

    def batch(self, indices: list[int], clips: bool = True) -> tuple[Tensor, Tensor]: ...


class TimedClips:
    """Clips whose `batch` also notes how long it took, in `seconds`."""

    def __init__(self, clips: Clips):
        self.clips, self.seconds = clips, 0.0

    def __len__(self) -> int:
        return len(self.clips)

    def batch(self, indices: list[int], clips: bool = True) -> tuple[Tensor, Tensor]:
        began = time.perf_counter()
        made = self.clips.batch(indices, clips)
        self.seconds += time.perf_counter() - began
        return made


class Meter:
    """Measures one process's updates on a device. `dtype` is that of its products, whose speed it first measures on plain ones."""

    def __init__(self, clips: Clips, device: torch.device, dtype: torch.dtype):
        self.clips, self.device = TimedClips(clips), device
        self.ceiling = _ceiling(device, dtype)
        self._counted: dict[Hashable, int] = {}

    def update(self, kind: Hashable, update: Callable[[TimedClips], dict[str, float]]) -> dict[str, float]:
        """The figures of `update`, which takes the clips and ends with the CPU waiting for the device; with those that `MEASURED` names.

        update_seconds, and data_seconds of them; tflops (operations in 10^12 a second) and utilisation (their share of the speed of
        plain matrix products), activations computed again among them; memory_gib, the most so far. Operations are counted in the first
        update of each `kind`, which takes longer for it.
        """
        waited, began = self.clips.seconds, time.perf_counter()
        if kind in self._counted:
            figures = update(self.clips)
        else:
            with Operations() as operations:
                figures = update(self.clips)
            self._counted[kind] = operations.count
        seconds = time.perf_counter() - began
        speed, peak = self._counted[kind] / seconds, peak_bytes(self.device)
        measured = (seconds, self.clips.seconds - waited, speed / 1e12, speed / self.ceiling, (peak or 0) / 2**30)
        return figures | {name: round(value, 6) for name, value in zip(MEASURED, measured, strict=True)}


@cache
def _ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of plain matrix products, measured once a process."""
    return matmul_ceiling(device, dtype)["wall"]
