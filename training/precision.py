"""Which arithmetic a run uses, decided in one place."""

import contextlib

import torch

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


def uses_bf16(device: torch.device, precision: str = "auto") -> bool:
    """Whether forward passes on a device are bf16 autocast (`auto` picks by `has_bf16`)."""
    return precision == "bf16" or (precision == "auto" and has_bf16(device))


def autocast(device: torch.device, precision: str = "auto", cache: bool = True):
    """A context for forward passes: bf16 autocast over float32 weights, or plain float32, as `uses_bf16` says.

    Without `cache` weights are cast at each use: needed where passes with and without gradient stand in one context, since some
    versions of torch hand the one the weights that were cast, without gradient, for the other.
    """
    if uses_bf16(device, precision):
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=cache)
    return contextlib.nullcontext()
