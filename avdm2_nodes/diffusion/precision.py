"""Which arithmetic a network is sampled in, decided in one place; schedules are always computed in float32 or wider."""

import torch


def has_bf16(device: torch.device) -> bool:
    """True where bfloat16 matrix products run on instructions of their own, not emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def sampling_dtype(device: torch.device) -> torch.dtype:
    """What a UNet's weights are cast to for sampling: float16 on a GPU, bfloat16 on a CPU that has instructions for it, else float32.

    At t = 999 an error of the prediction is multiplied by 25, so float16's finer steps are preferred where both are fast.
    """
    if device.type == "cpu":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return torch.float16


def decoding_dtype(device: torch.device) -> torch.dtype:
    """What a VAE's weights are cast to for decoding: bfloat16 where it has instructions of its own, else float32.

    As ComfyUI chooses on a GPU. The VAE of SD1.5 has activations that float16 does not always hold.
    """
    return torch.bfloat16 if has_bf16(device) else torch.float32
