"""LoRA adapters (arXiv 2106.09685, by peft) in the layers of one base, and gradient checkpointing that knows which of them acts."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from training.run.packages import needs
from training.run.randomness import keyed_generator

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

# Every spatial layer with a weight matrix but the first and last convolution, which the image and the video UNet hold apart.
_LORA_TARGETS = (
    r".*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|conv1|conv2|conv_shortcut|conv|time_emb_proj)"
)


class Adapters:
    """The LoRA layers of one base and which of its adapters acts now; none acts unless `active` says so."""

    def __init__(self):
        self.layers: list[LoraLayer] = []
        self.name: str | None = None

    def add(self, unet: UNet2DConditionModel, name: str, rank: int, seed: int) -> dict[str, nn.Parameter]:
        """Injects adapter `name` into the layers of an image UNet (and of whichever UNet shares them); its weights by name."""
        peft = needs("peft", "to train LoRA")
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=_LORA_TARGETS)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is what is wanted
            peft.inject_adapter_in_model(config, unet, adapter_name=name)
        self.layers = [module for module in unet.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
        marker, generator = f".{name}.weight", keyed_generator(seed, "lora", name)
        weights = {key.replace(marker, ".weight"): p for key, p in unet.named_parameters() if key.endswith(marker)}
        for key, weight in weights.items():
            if ".lora_A." in key:  # lora_B is zero, so that the adapter adds nothing yet
                bound = weight[0].numel() ** -0.5
                weight.data.uniform_(-bound, bound, generator=generator)
        self._set(None)
        return weights

    @contextlib.contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Within the context adapter `name` acts, or with None the bare base."""
        before = self.name
        self._set(name)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, name: str | None) -> None:
        self.name = name
        for layer in self.layers:
            # peft's own setter also switches requires_grad, under the feet of a graph that still has to run backward.
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]

    def bind(self, name: str | None, function: Callable) -> Callable:
        """`function`, with adapter `name` active while it runs."""

        def bound(*args):
            with self.active(name):
                return function(*args)

        return bound


def checkpoint_layers(unets: list[nn.Module], adapters: list[Adapters]) -> None:
    """Gradient checkpointing (Chen et al., arXiv 1604.06174) of every residual, attention and motion layer of some UNets.

    diffusers' own leaves the attention and motion modules of the video UNet's down blocks out. A layer is computed again during
    the backward pass, when another role may be active: the adapters of its first pass are put back for it.
    """
    layers = {
        id(layer): layer
        for unet in unets
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
        for kind in ("resnets", "attentions", "motion_modules")
        for layer in (getattr(block, kind, None) or ())
    }
    for layer in layers.values():
        layer.forward = _checkpointed(layer.forward, adapters)


def _checkpointed(forward: Callable, adapters: list[Adapters]) -> Callable:
    def wrapped(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        names = [a.name for a in adapters]

        def again(*args, **kwargs):
            with contextlib.ExitStack() as actives:
                for adapter, name in zip(adapters, names, strict=True):
                    actives.enter_context(adapter.active(name))
                return forward(*args, **kwargs)

        return checkpoint(again, *args, use_reentrant=False, **kwargs)

    return wrapped
