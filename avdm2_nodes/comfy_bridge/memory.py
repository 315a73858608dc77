"""Networks under ComfyUI's memory management: loaded, partly loaded, offloaded and freed by it."""

import ctypes
import gc
import sys
import weakref

import comfy.latent_formats
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import torch
from torch import nn

from ..diffusion.precision import sampling_dtype


class Holder(nn.Module):
    """What a ModelPatcher manages in place of a diffusers or transformers network, whose `device` cannot be set."""

    def __init__(self, network: nn.Module, latent_format=None):
        super().__init__()
        self.diffusion_model = _with_comfy_layers(network.eval().requires_grad_(False))
        self.latent_format = latent_format
        self.device = torch.device("cpu")
        weakref.finalize(self, _something_goes).atexit = False

    def get_dtype(self) -> torch.dtype:
        return next(self.diffusion_model.parameters()).dtype

    def memory_required(self, input_shape) -> float:
        """Bytes that one evaluation of a batch of latents (N, C, h, w) takes, by the rule that core has for its own SD1.5."""
        area = input_shape[0] * input_shape[2] * input_shape[3]
        return area * self.get_dtype().itemsize * 0.01 * 1024 * 1024


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
_goes = False  # a network has gone, or the float32 weights that one was cast from, since memory was last given back


def _something_goes() -> None:
    global _goes
    _goes = True


def _give_back(phase: str = "stop", info: dict | None = None) -> None:
    """Returns to the system what the C library keeps of networks that have gone: of full-size ones all their gigabytes.

    glibc gives back only what lies at the end of its heap. ComfyUI collects garbage after it has unloaded models: then, and before
    something is loaded, is the time.
    """
    global _goes
    if _goes and phase == "stop" and (info is None or info["generation"] == 2):
        _goes = False
        if _malloc_trim is not None:
            _malloc_trim(0)


gc.callbacks.append(_give_back)


def _with_comfy_layers(network: nn.Module) -> nn.Module:
    """Makes the leaves ComfyUI's own layers, which can be loaded one by one: same weights, same arithmetic."""
    for module in network.modules():
        if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding):
            module.__class__ = getattr(comfy.ops.disable_weight_init, type(module).__name__)
            if not hasattr(module, "bias"):
                module.bias = None  # which ComfyUI asks every layer for, embeddings too
    return network


def unet_dtype(device: torch.device, parameters: int) -> torch.dtype:
    """What a UNet is sampled in: on a CPU the fastest exact enough, else what ComfyUI and its flags choose."""
    if device.type == "cpu":
        return sampling_dtype(device)
    return management.unet_dtype(device, parameters, [torch.float16, torch.bfloat16, torch.float32])


def unet_patcher(unet: nn.Module, latent_format) -> comfy.model_patcher.ModelPatcher:
    """A patcher for a UNet, whose weights are cast to what they will be sampled in."""
    device = management.get_torch_device()
    dtype = unet_dtype(device, sum(p.numel() for p in unet.parameters()))
    nn.Module.to(unet, dtype)  # diffusers' own warns of parts that this UNet does not have
    _something_goes()
    return comfy.model_patcher.ModelPatcher(Holder(unet, latent_format), device, management.unet_offload_device())


def text_patcher(text_encoder: nn.Module) -> comfy.model_patcher.ModelPatcher:
    devices = management.text_encoder_device(), management.text_encoder_offload_device()
    return comfy.model_patcher.ModelPatcher(Holder(text_encoder), *devices)


def load(patchers: list[comfy.model_patcher.ModelPatcher], latents_shape=None) -> list[nn.Module]:
    """Has ComfyUI load the networks, with room for one evaluation of latents (N, C, h, w) by the hungriest; the networks."""
    _give_back()
    needed = max((p.model.memory_required(latents_shape) for p in patchers), default=0) if latents_shape else 0
    management.load_models_gpu(patchers, memory_required=needed)
    networks = []
    for patcher in patchers:
        networks.append(patcher.model.diffusion_model)
        for buffer in networks[-1].buffers():  # a partial load moves parameters only
            if buffer.device != patcher.load_device:
                buffer.data = buffer.data.to(patcher.load_device)
    return networks
