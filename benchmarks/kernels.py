"""What a device is busy with while something runs: its kernels, their number and their time, by torch's profiler."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from training.run.timing import timed


@dataclass(frozen=True)
class Kernels:
    """Of one run: seconds that kernels took in sum, how many there were, and by name (seconds, number), the longest first."""

    seconds: float
    count: int
    by_name: dict[str, tuple[float, int]]

    def largest(self, most: int = 10) -> dict[str, tuple[float, int]]:
        return dict([*self.by_name.items()][:most])


def kernels_of(run: Callable[[], object], device: torch.device) -> Kernels:
    """Runs once and looks on; on a CPU the kernels are the operations that torch is asked for, not those that these ask for."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        timed(run, device)  # waits until the device has done it all
    # Not by `key_averages`, which takes minutes for the operations of an update.
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [event for event in seen.profiler.kineto_results.events() if event.device_type() == kind]
    found: dict[str, list[int]] = {}
    for event in events if cuda else _outermost(events):
        found.setdefault(event.name(), []).append(event.duration_ns())
    ordered = sorted(((name, sum(times) / 1e9, len(times)) for name, times in found.items()), key=lambda kernel: -kernel[1])
    by_name = {name: (seconds, count) for name, seconds, count in ordered}
    return Kernels(sum(s for s, _ in by_name.values()), sum(n for _, n in by_name.values()), by_name)


def _outermost(events: list) -> Iterator:
    """Operations that no other of their thread asked for."""
    ends: dict[int, int] = {}
    for event in sorted(events, key=lambda event: (event.start_ns(), -event.duration_ns())):
        thread = event.start_thread_id()
        if event.name().startswith("aten::") and event.start_ns() >= ends.get(thread, 0):
            ends[thread] = event.start_ns() + event.duration_ns()
            yield event
