"""Motion modules in a native MODEL: AnimateDiff's temporal transformers (arXiv 2307.04725) between the layers of core's own UNet.

Nothing of it stays in the network, which other MODELs share: a wrapper around each evaluation puts, for this one call, into each block
a sequence of its own layers with the motion module among them, and takes it out again. Core loads, sizes, offloads and clones the modules
with the MODEL, whose additional model they are. The arithmetic is diffusers' (`AnimateDiffTransformer3D`), in core's layers: one group
normalisation over all frames of a clip, as the teacher and its students are trained.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.cli_args import args
from comfy.ldm.modules.attention import attention_pytorch, attention_sub_quad
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential, Upsample
from comfy.patcher_extension import WrappersMP
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import SentenceError

KEY = "avdm2"  # of our additional model, attachment, wrappers and transformer options

_PLACE = re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.motion_modules\.(\d+)\.(.+)")


class MotionError(SentenceError, ValueError):
    """A clip or a MODEL that the motion modules cannot serve; the message is one sentence."""


@dataclass(frozen=True)
class MotionWeights:
    """Motion modules as files hold them: tensors by diffusers' names, and what their shapes do not say."""

    tensors: Mapping[str, Tensor] = field(repr=False)  # position encodings among them
    heads: int | Sequence[int]  # of each level of the encoder, where they differ
    groups: int

    @property
    def frames(self) -> int:
        """The most frames that a clip may have: the positions that were encoded."""
        return min(tensor.shape[1] for name, tensor in self.tensors.items() if name.endswith(".pe"))

    def heads_of(self, block: str) -> int:
        if isinstance(self.heads, int):
            return self.heads
        kind, _, level = block.partition(".")
        return self.heads[{"down_blocks": int(level or 0), "up_blocks": -1 - int(level or 0), "mid_block": -1}[kind]]


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, ops, **like):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (ops.Linear(width, width, bias=False, **like) for _ in range(3))
        self.to_out = nn.ModuleList([ops.Linear(width, width, **like)])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](attention_pytorch(self.to_q(x), self.to_k(x), self.to_v(x), self.heads))


class _GEGLU(nn.Module):
    def __init__(self, width: int, inner: int, ops, **like):
        super().__init__()
        self.proj = ops.Linear(width, 2 * inner, **like)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class _Feed(nn.Module):
    def __init__(self, width: int, ops, **like):
        super().__init__()
        inner = 4 * width
        self.net = nn.ModuleList([_GEGLU(width, inner, ops, **like), nn.Identity(), ops.Linear(inner, width, **like)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class _Positions(nn.Module):
    """Position encodings: a parameter, for a partial load moves no buffers."""

    def __init__(self, width: int, frames: int, dtype, device):
        super().__init__()
        self.pe = nn.Parameter(torch.empty(1, frames, width, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe[:, : x.shape[1]].to(x.device, x.dtype)


class _Block(nn.Module):
    """Self-attentions over time and a feed-forward layer, with the frames' positions before each attention: two, SparseCtrl's one."""

    def __init__(self, width: int, heads: int, frames: int, attentions: int, ops, **like):
        super().__init__()
        self.pos_embed = _Positions(width, frames, **like)
        self.norm1, self.norm3 = (ops.LayerNorm(width, **like) for _ in range(2))
        self.attn1 = _Attention(width, heads, ops, **like)
        self.norm2 = ops.LayerNorm(width, **like) if attentions == 2 else None
        self.attn2 = _Attention(width, heads, ops, **like) if attentions == 2 else None
        self.ff = _Feed(width, ops, **like)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn1(self.pos_embed(self.norm1(x)))
        if self.attn2 is not None:
            x = x + self.attn2(self.pos_embed(self.norm2(x)))
        return x + self.ff(self.norm3(x))


class TemporalTransformer(nn.Module):
    """One motion module. `frames` and `strength` are of the call in progress, see `Motion.during`."""

    def __init__(self, width: int, heads: int, groups: int, frames: int, blocks: int, attentions: int, ops, **like):
        super().__init__()
        self.frames, self.strength = 1, 1.0
        self.norm = ops.GroupNorm(groups, width, eps=1e-6, **like)
        self.proj_in, self.proj_out = (ops.Linear(width, width, **like) for _ in range(2))
        self.transformer_blocks = nn.ModuleList([_Block(width, heads, frames, attentions, ops, **like) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        """x ((b f), c, h, w) with what the frames of each clip b have to tell each other."""
        height, width = x.shape[2:]
        h = self.norm(rearrange(x, "(b f) c h w -> b c f h w", f=self.frames))
        h = self.proj_in(rearrange(h, "b c f h w -> (b h w) f c"))
        for block in self.transformer_blocks:
            h = block(h)
        h = rearrange(self.proj_out(h), "(b h w) f c -> (b f) c h w", h=height, w=width)
        return x + h if self.strength == 1.0 else x + self.strength * h


class Motion(nn.Module):
    """All motion modules of a video UNet, by the place where diffusers has them ("down_blocks.0", 1)."""

    def __init__(self, weights: MotionWeights, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.frames = weights.frames
        self.dtype = dtype
        places: dict[tuple[str, int], dict[str, Tensor]] = {}
        for name, tensor in weights.tensors.items():
            if found := _PLACE.fullmatch(name):
                block, number, rest = found.groups()
                places.setdefault((block, int(number)), {})[rest] = tensor
        # Layers that cast what they hold to what they are given: a MODEL may compute in another dtype than it is loaded in.
        # What they hold are the file's tensors themselves where these are of its dtype: they are kept anyway, and large.
        ops, like = comfy.ops.manual_cast, {"dtype": dtype, "device": "meta"}
        self.places = list(places)
        self.modules_at = nn.ModuleList()
        for (block, _), tensors in places.items():
            blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks."))
            width, attentions = len(tensors["proj_in.weight"]), 1 + ("transformer_blocks.0.attn2.to_q.weight" in tensors)
            module = TemporalTransformer(
                width, weights.heads_of(block), weights.groups, weights.frames, blocks, attentions, ops, **like
            )
            module.load_state_dict({name: tensor.to(device, dtype) for name, tensor in tensors.items()}, assign=True)
            self.modules_at.append(module)
        self._placed: dict[tuple, tuple[list, nn.Module]] = {}
        self.eval().requires_grad_(False)

    def get_dtype(self) -> torch.dtype:
        return self.dtype

    def memory_required(self, input_shape, *_, **__) -> float:
        """Nothing beside what core plans for the MODEL itself: the activations of both are not there at once."""
        return 0

    def blocks_of(self, unet: nn.Module) -> list[tuple[nn.ModuleList | nn.Module, int | str, int]]:
        """Where each module belongs in core's UNet: (the holder of the block, its index or name there)."""
        per_level = unet.num_res_blocks[0]
        found = []
        for block, number in self.places:
            kind, _, level = block.partition(".")
            if kind == "mid_block":
                found.append((unet, "middle_block"))
            elif kind == "down_blocks":
                found.append((unet.input_blocks, 1 + int(level) * (per_level + 1) + number))
            else:
                found.append((unet.output_blocks, int(level) * (per_level + 1) + number))
        return found

    def require(self, unet: nn.Module) -> None:
        """MotionError unless these modules fit this UNet in number and width."""
        widths = [module.norm.num_channels for module in self.modules_at]
        theirs = [unet.model_channels * m for m in unet.channel_mult]
        layers, expected = unet.num_res_blocks[0], []
        for block, number in self.places:
            kind, _, level = block.partition(".")
            index = len(theirs) - 1 if kind == "mid_block" else int(level)
            fits = index < len(theirs) and number < layers + (kind == "up_blocks")
            expected.append(int(theirs[-1 - index if kind == "up_blocks" else index]) if fits else None)
        if expected != widths:
            raise MotionError(
                f"Expected a motion module for a base of widths {[int(w) for w in theirs]}, found one of widths "
                f"{sorted(set(widths))}; use a module and a checkpoint of the same family (SD1.5)."
            )

    def placed(self, unet: nn.Module) -> list[tuple[nn.Module, int | str, nn.Module]]:
        """(holder, index, the block with its motion module in it): made once for the layers that a block has."""
        ready = []
        for (holder, index), module in zip(self.blocks_of(unet), self.modules_at, strict=True):
            block = getattr(holder, index) if isinstance(index, str) else holder[index]
            layers, key = list(block), (id(block), index)
            known = self._placed.get(key)
            if known is None or len(known[0]) != len(layers) or any(a is not b for a, b in zip(known[0], layers, strict=True)):
                at = 2 if index == "middle_block" else len(layers) - isinstance(layers[-1], Upsample)
                known = layers, TimestepEmbedSequential(*layers[:at], module, *layers[at:])
                self._placed[key] = known
            ready.append((holder, index, known[1]))
        return ready


def motion_patcher(
    weights: MotionWeights, dtype: torch.dtype, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """The modules under core's memory management."""
    device, offload = management.get_torch_device(), management.unet_offload_device()
    patcher = core_patcher(disable_dynamic)(Motion(weights, dtype, offload), load_device=device, offload_device=offload)
    patcher.cached_patcher_init = (motion_patcher, (weights, dtype))  # core makes a second one of it for another GPU
    return patcher


def core_patcher(disable_dynamic: bool = False) -> type[comfy.model_patcher.ModelPatcher]:
    """The patcher that core's own loaders use, or the plain one; 0.8 has one kind only."""
    plain = comfy.model_patcher.ModelPatcher
    return plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)


def with_motion(model, weights: MotionWeights, strength: float = 1.0, clips: int = 1):
    """A clone of a MODEL with these motion modules in place of any that it had; its own network stays as it is.

    `strength` scales what they add; `clips` is how many clips the latent's batch holds, one after the other. MotionError where the
    modules do not fit.
    """
    model = model.clone()
    patcher = motion_patcher(weights, computed_in(model.model))
    patcher.model.require(network_of(model.model))
    model.set_additional_models(KEY, [patcher])
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, evaluate_with_motion)
    model.model_options["transformer_options"] = model.model_options["transformer_options"] | {
        KEY: {"strength": float(strength), "clips": int(clips)}
    }
    return model


def motion_of(model) -> Motion | None:
    """The motion modules of a MODEL, None where it has none."""
    found = model.get_additional_models_with_key(KEY)
    return found[0].model if found else None


def network_of(base: nn.Module) -> nn.Module:
    """A MODEL's UNet, where torch.compile has wrapped it the one inside."""
    network = base.diffusion_model
    return getattr(network, "_orig_mod", network)


def computed_in(base: nn.Module) -> torch.dtype:
    """The dtype that a MODEL is computed in."""
    return base.manual_cast_dtype if base.manual_cast_dtype is not None else base.get_dtype()


def evaluate_with_motion(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """Core's wrapper around one evaluation of the network on x ((copies b f), c, h, w): the motion modules act within it alone."""
    base, options = executor.class_obj, transformer_options or {}
    motion, unet, ours = motion_of(base.current_patcher), network_of(base), options.get(KEY, {})
    frames = frames_of(x, len(options.get("cond_or_uncond", [0])), ours.get("clips", 1), motion.frames)
    for module in motion.modules_at:
        module.frames, module.strength = frames, ours.get("strength", 1.0)
    replaced = []
    try:
        for holder, index, block in motion.placed(unet):
            replaced.append((holder, index, _swap(holder, index, block)))
        return executor(x, t, c_concat, c_crossattn, control, attention_options(options, x.device), **kwargs)
    finally:
        for holder, index, block in replaced:
            _swap(holder, index, block)


def attention_options(options: Mapping, device: torch.device) -> dict:
    """An evaluation's options with torch's attention where core would take its sub-quadratic one, which on a CPU is slower."""
    plain = device.type == "cpu" and not args.use_quad_cross_attention
    if plain and "optimized_attention_override" not in options:
        return {**options, "optimized_attention_override": _torch_attention}
    return dict(options)


def _torch_attention(default, *arguments, **options):
    slow = default is attention_sub_quad.__wrapped__  # core hands on the function without its decorator
    return (attention_pytorch if slow else default)(*arguments, **options)


def _swap(holder: nn.Module, index: int | str, block: nn.Module) -> nn.Module:
    """Puts a block into its place; the one that was there."""
    if isinstance(index, str):
        before = getattr(holder, index)
        setattr(holder, index, block)
    else:
        before = holder[index]
        holder[index] = block
    return before


def frames_of(x: Tensor, copies: int, clips: int, positions: int) -> int:
    """Frames of each clip in a batch of `copies` (prompts) times `clips`. MotionError for a batch that cannot be cut so, or too long."""
    frames, rest = divmod(len(x), copies * clips)
    if rest:
        raise MotionError(
            f"Expected a latent whose batch is {clips} clips of the same number of frames, found {len(x) // copies} frames; "
            "change the batch or the number of clips."
        )
    if frames > positions:
        raise MotionError(
            f"Expected at most {positions} frames at once with this motion module, found {frames}; add Context Windows (Manual) "
            "with a shorter context_length after it."
        )
    return frames
