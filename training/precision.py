"""Which arithmetic a run uses, decided in one place."""

import contextlib

import torch


def pick_device(name: str = "auto") -> torch.device:
    """The named device; `auto` is CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """True where bfloat16 matrix products run on instructions of their own, not emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: str = "auto"):
    """A context for forward passes: bf16 autocast over float32 weights, or plain float32 (`auto` picks by `has_bf16`)."""
    if precision == "bf16" or (precision == "auto" and has_bf16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
