"""Which device and arithmetic a run uses, decided in one place."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from avdm2_nodes.diffusion.precision import has_bf16


class DeviceError(ValueError):
    """A device that this machine does not have; the message is one sentence."""


def pick_device(name: str = "auto") -> torch.device:
    """The named device; `auto` is CUDA where there is one, else the CPU. DeviceError for one that is not there."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if found else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= found:
        raise DeviceError(f"Expected the device {name}, found {found} CUDA devices; choose another, or auto.")
    return device


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that nobody holds; None for a CPU, whose memory others share."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


@contextlib.contextmanager
def lent(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Modules on a device for the while, afterwards where they were: what is needed now and then takes no memory there in between."""
    homes = [next(module.parameters()).device for module in modules]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)


def uses_bf16(device: torch.device, precision: str = "auto") -> bool:
    """Whether networks on a device compute in bf16 (`auto` picks by `has_bf16`)."""
    return precision == "bf16" or (precision == "auto" and has_bf16(device))


def autocast(device: torch.device, precision: str = "auto"):
    """A context for forward passes: bf16 autocast over weights of any format, or plain float32, as `uses_bf16` says.

    An update of a distillation does without: its networks are in bf16 themselves.
    """
    if uses_bf16(device, precision):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
