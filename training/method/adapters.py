"""LoRA adapters (arXiv 2106.09685) in the layers of one base, and gradient checkpointing that knows which of them acts."""

import contextlib
import re
from collections.abc import Callable, Iterator

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from training.run.randomness import keyed_generator

# Every spatial layer with a weight matrix but the first and last convolution, which the image and the video UNet hold apart.
_LORA_TARGETS = re.compile(
    r".*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|conv1|conv2|conv_shortcut|conv|time_emb_proj)"
)
_convolution_backward = torch.ops.aten.convolution_backward.default


class LoraLayer(nn.Module):
    """A frozen linear or convolution layer with adapters beside it: W x + b + B A x of the one that acts (alpha is the rank)."""

    def __init__(self, base_layer: nn.Linear | nn.Conv2d, acting: "Adapters"):
        super().__init__()
        self.base_layer, self.acting = base_layer, acting
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()

    def add(self, name: str, rank: int) -> None:
        """An adapter whose product is zero."""
        base, like = self.base_layer, {"bias": False, "device": self.base_layer.weight.device}
        if isinstance(base, nn.Linear):
            down, up = nn.Linear(base.in_features, rank, **like), nn.Linear(rank, base.out_features, **like)
        else:
            down = nn.Conv2d(base.in_channels, rank, base.kernel_size, base.stride, base.padding, **like)
            up = nn.Conv2d(rank, base.out_channels, 1, **like)
        self.lora_A[name], self.lora_B[name] = down, up
        nn.init.zeros_(up.weight)

    def forward(self, x: Tensor) -> Tensor:
        base, name = self.base_layer, self.acting.name
        if name not in self.lora_A:
            return base(x)
        tensors = x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)
        return (
            _Linear.apply(*tensors) if isinstance(base, nn.Linear) else _Convolution.apply(*tensors, base.stride, base.padding)
        )


class _Linear(torch.autograd.Function):
    """x (..., in), W (out, in), A (rank, in), B (out, rank); what is added is added in place."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ down.t()
        ctx.save_for_backward(rows, inner, weight, down, up)
        return F.linear(rows, weight, bias).addmm_(inner, up.t()).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        rows, inner, weight, down, up = ctx.saved_tensors
        to_y = gradient.reshape(-1, gradient.shape[-1])
        to_inner = to_y @ up
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (to_y @ weight).addmm_(to_inner, down).view(*gradient.shape[:-1], -1)
        return to_x, None, None, to_inner.t() @ rows, to_y.t() @ inner


class _Convolution(torch.autograd.Function):
    """x (N, in, h, w), W (out, in, k, k), A (rank, in, k, k), B (out, rank, 1, 1)."""

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, stride, padding) -> Tensor:
        y, inner = (F.conv2d(x, w, b, stride, padding) for w, b in ((weight, bias), (down, None)))
        ctx.save_for_backward(x, inner, weight, down, up)
        ctx.geometry = stride, padding, (1, 1), False, (0, 0), 1
        if y.is_contiguous():
            y.flatten(2).baddbmm_(up.flatten(1).expand(len(y), -1, -1), inner.flatten(2))
            return y
        return y.add_(F.conv2d(inner, up))  # in channels_last

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, inner, weight, down, up = ctx.saved_tensors
        wants, geometry = ctx.needs_input_grad[0], ctx.geometry
        point = (1, 1), (0, 0), *geometry[2:]
        to_inner, to_up, _ = _convolution_backward(gradient, inner, up, None, *point, (True, True, False))
        to_x, to_down, _ = _convolution_backward(to_inner, x, down, None, *geometry, (wants, True, False))
        if wants:
            to_x.add_(_convolution_backward(gradient, x, weight, None, *geometry, (True, False, False))[0])
        return to_x, None, None, to_down, to_up, None, None


class Adapters:
    """The adapters of one base; `name` is that of the one that acts now, None for none, and `active` alone sets it."""

    def __init__(self):
        self.name: str | None = None

    def add(self, unet: UNet2DConditionModel, name: str, rank: int, seed: int) -> dict[str, nn.Parameter]:
        """Puts adapter `name` into the layers of an image UNet (and of whichever UNet shares them); its weights by name."""
        targets = {path: layer for path, layer in unet.named_modules() if _LORA_TARGETS.fullmatch(path)}
        generator, weights = keyed_generator(seed, "lora", name), {}
        for path, layer in targets.items():
            if not isinstance(layer, LoraLayer):
                parent, _, child = path.rpartition(".")
                layer = LoraLayer(layer, self)
                setattr(unet.get_submodule(parent), child, layer)
            layer.add(name, rank)
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            bound = down[0].numel() ** -0.5
            drawn = torch.empty_like(down, device="meta" if down.is_meta else "cpu")  # the same on every device
            down.data.copy_(drawn.uniform_(-bound, bound, generator=generator))
            weights |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
        return weights

    @contextlib.contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Within the context adapter `name` acts, or with None the bare base."""
        before, self.name = self.name, name
        try:
            yield
        finally:
            self.name = before

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
    adapters = list({id(a): a for a in adapters}.values())
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

        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return wrapped
