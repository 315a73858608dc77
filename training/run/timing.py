"""Times of things that run in turns, the speed of matrix products, and memory."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition: by the clock, and of this process's CPU time over all its threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)


def interleaved(subjects: Mapping[str, Callable[[], object]], repetitions: int, device: torch.device) -> dict[str, Times]:
    """Times of each subject. All run once to warm up, then in turns, so that whatever slows the machine down meets them alike."""
    times = {name: Times() for name in subjects}
    for repetition in range(repetitions + 1):
        for name, run in subjects.items():
            wall, cpu = timed(run, device)
            if repetition:
                times[name].wall.append(wall)
                times[name].cpu.append(cpu)
    return times


def timed(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds by the clock and of CPU time that `run` takes, until the device has done it all."""
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    _wait(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_ceiling(device: torch.device, dtype: torch.dtype, repetitions: int = 5) -> dict[str, float]:
    """The most operations of a product of two square matrices, over some sizes, in a second by the clock and of CPU time.

    A multiplication and its addition are two.
    """
    best = {"wall": 0.0, "cpu": 0.0}
    for size in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        often = 10 if device.type == "cuda" else 1  # a GPU's clock is read too coarsely for one
        times = interleaved({"product": lambda a=a, b=b, often=often: [a @ b for _ in range(often)]}, repetitions, device)
        count = often * 2 * size**3
        best = {
            "wall": max(best["wall"], count / times["product"].median),
            "cpu": max(best["cpu"], count / times["product"].cpu_median),
        }
    return best


def resident_bytes() -> int | None:
    """Memory of this process now; None where the system does not tell."""
    return _status("VmRSS")


def peak_bytes(device: torch.device) -> int | None:
    """The most memory so far: what was allocated on a GPU, else what this process held; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")  # getrusage's also knows what the process held that began this one


def _status(key: str) -> int | None:
    """Bytes of an entry of Linux' own account of this process."""
    status = Path("/proc/self/status")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.is_file() else {}
    return int(lines[key].split()[0]) * 1024 if key in lines else None
