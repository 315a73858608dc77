"""SparseCtrl (arXiv 2311.16933) as a ControlNet of core's: some frames of a clip are given, the others follow them.

Core's own network and conversions, with the motion modules of this pack behind its down blocks; its input is zero in place of the noisy
clip, and a channel of each hint says whether its frame is known.
"""

from collections.abc import Sequence
from pathlib import Path

import comfy.controlnet
import comfy.model_management as management
import comfy.ops
import comfy.utils
import torch
from comfy.cldm.cldm import ControlNet
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential
from torch import Tensor

from ..errors import SentenceError
from ..files.sparse_control import SparseControlFile, read_sparse_control
from .motion import Motion, MotionWeights
from .windows import window_frames


class SparseControlError(SentenceError, ValueError):
    """Hints that cannot be placed; the message is one sentence."""


def load_sparse_control(path: Path, frames: str = "0", heads: int = 8) -> "SparseControl":
    """A SparseCtrl file as a CONTROL_NET whose hints stand at `frames`, numbers with commas between them, from the end where negative.

    FileFormatError for any other file, SparseControlError for other frames.
    """
    places = parse_frames(frames)
    return SparseControl(read_sparse_control(path), places, heads)


def parse_frames(text: str) -> list[int]:
    """Whole numbers with commas between them. SparseControlError for anything else, none, or one twice."""
    try:
        frames = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise SparseControlError(f"Expected frames such as 0 or 0, 8, -1, found {text[:60]!r}; write their numbers.") from error
    if len(set(frames)) < len(frames):
        raise SparseControlError(f"Expected each frame once, found {text[:60]!r}; remove one.")
    return frames


class SparseControl(comfy.controlnet.ControlNet):
    """Core's ControlNet, with hints at some frames of a clip."""

    def __init__(self, file: SparseControlFile | None, frames: Sequence[int], heads: int = 8):
        device = management.get_torch_device()
        dtype = management.unet_dtype()
        network = None if file is None else sparse_network(file, heads, dtype)
        super().__init__(network, load_device=device, manual_cast_dtype=management.unet_manual_cast(dtype, device))
        self.frames = list(frames)
        self.latents = file is not None and file.latents
        self.format = None  # of the latents of the MODEL that is being sampled

    def copy(self) -> "SparseControl":
        made = SparseControl(None, self.frames)
        made.control_model, made.control_model_wrapped = self.control_model, self.control_model_wrapped
        made.latents, made.load_device, made.manual_cast_dtype = self.latents, self.load_device, self.manual_cast_dtype
        self.copy_to(made)
        return made

    def set_cond_hint(self, cond_hint, strength=1.0, timestep_percent_range=(0.0, 1.0), vae=None, extra_concat=()):
        """Core's. SparseControlError where the frames are more than the pictures, or a VAE is wanted and not there."""
        if len(self.frames) != len(cond_hint):
            raise SparseControlError(
                f"Expected a picture for each of the frames {', '.join(map(str, self.frames))}, found {len(cond_hint)}; "
                "change the pictures or the frames of the SparseCtrl loader."
            )
        if self.latents and vae is None:
            raise SparseControlError(
                "Expected a VAE for this SparseCtrl, which reads latents, found none; wire one to Apply ControlNet."
            )
        super().set_cond_hint(cond_hint, strength, timestep_percent_range, vae, list(extra_concat))
        self.vae = vae if self.latents else None
        return self

    def pre_run(self, model, percent_to_timestep_function):
        super().pre_run(model, percent_to_timestep_function)
        self.format = model.latent_format

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options=None):
        """The residuals of core's UNet for x_noisy ((copies f), c, h, w), as core asks for them at each evaluation."""
        options = transformer_options or {}
        before = None
        if self.previous_controlnet is not None:
            before = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, options)
        if self.timestep_range is not None and (t[0] > self.timestep_range[0] or t[0] < self.timestep_range[1]):
            return before
        dtype = self.manual_cast_dtype or self.control_model.dtype
        count = len(x_noisy) // batched_number
        window = options.get("context_window")
        shown = window_frames(window) if window is not None else list(range(count))
        total = (getattr(window, "total_frames", 0) or 1 + max(shown)) if window is not None else count
        hint = self._hints(shown, total, x_noisy).to(x_noisy.device, dtype).repeat(batched_number, 1, 1, 1)
        for module in self.control_model.motion:
            module.frames = count
        context = management.cast_to_device(cond.get("crossattn_controlnet", cond["c_crossattn"]), x_noisy.device, dtype)
        timestep = self.model_sampling_current.timestep(t)
        made = self.control_model(
            x=torch.zeros_like(x_noisy, dtype=dtype), hint=hint, timesteps=timestep.to(dtype), context=context
        )
        return self.control_merge(made, before, output_dtype=None)

    def _hints(self, shown: Sequence[int], total: int, x_noisy: Tensor) -> Tensor:
        """(frames, channels and mask, h, w) of the frames `shown` of a clip of `total`: zero where a frame is not known."""
        outside = [place for place in self.frames if not -total <= place < total]
        if outside:
            raise SparseControlError(
                f"Expected hints at frames of the clip, which has {total}, found one at {outside[0]}; change the frames of the "
                "SparseCtrl loader."
            )
        pictures = self._pictures(x_noisy)
        known = {place % total: picture for place, picture in zip(self.frames, pictures, strict=True)}
        hints = torch.zeros(len(shown), pictures.shape[1] + 1, *pictures.shape[2:])
        for row, frame in enumerate(shown):
            if frame in known:
                hints[row, :-1], hints[row, -1] = known[frame], 1.0
        return hints

    def _pictures(self, x_noisy: Tensor) -> Tensor:
        """The hints in the size that the network takes, (n, c, h, w) on the CPU, made once for a size."""
        height, width = (8 * side for side in x_noisy.shape[2:])
        if self.cond_hint is None or getattr(self, "_size", None) != (height, width):
            pictures = comfy.utils.common_upscale(self.cond_hint_original, width, height, "bicubic", "center").clamp(0, 1)
            if self.latents:
                loaded = management.loaded_models(only_currently_used=True)
                pictures = self.format.process_in(self.vae.encode(pictures.movedim(1, -1)))
                management.load_models_gpu(loaded)
            self.cond_hint, self._size = pictures.float().cpu(), (height, width)
        return self.cond_hint


def sparse_network(file: SparseControlFile, heads: int, dtype: torch.dtype) -> ControlNet:
    """Core's ControlNet network of a SparseCtrl file, its motion modules behind the layers of the down blocks."""
    tensors, ops = file.tensors, comfy.ops.manual_cast
    config = _config(file, heads)
    network = ControlNet(**config, hint_channels=file.hint_channels, dtype=dtype, operations=ops)
    if file.latents:
        network.input_hint_block = TimestepEmbedSequential(
            ops.Conv2d(file.hint_channels, config["model_channels"], 3, padding=1, dtype=dtype)
        )
    names = _names(file, config)
    network.load_state_dict({names[key]: tensor.to(dtype) for key, tensor in tensors.items() if key in names})
    motion = Motion(MotionWeights(file.motion, heads, 32), dtype, torch.device("cpu"))
    for (holder, index), module in zip(motion.blocks_of(network), motion.modules_at, strict=True):
        holder[index] = TimestepEmbedSequential(*holder[index], module)
    network.motion = motion.modules_at
    return network.eval().requires_grad_(False)


def _config(file: SparseControlFile, heads: int) -> dict:
    """What builds core's network, from the shapes of the tensors."""
    tensors = file.tensors
    levels = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("down_blocks."))
    layers = 1 + max(int(name.split(".")[3]) for name in tensors if name.startswith("down_blocks.0.resnets."))
    width = len(tensors["conv_in.weight"])
    widths = [len(tensors[f"down_blocks.{i}.resnets.0.conv1.weight"]) for i in range(levels)]
    attends = [int(f"down_blocks.{i}.attentions.0.norm.weight" in tensors) for i in range(levels)]
    return {
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "in_channels": tensors["conv_in.weight"].shape[1],
        "model_channels": width,
        "channel_mult": [wide // width for wide in widths],
        "num_res_blocks": [layers] * levels,
        "transformer_depth": [here for here in attends for _ in range(layers)],
        "transformer_depth_middle": 1,
        "context_dim": tensors["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "num_heads": heads,
        "use_linear_in_transformer": tensors["mid_block.attentions.0.proj_in.weight"].ndim == 2,
    }


def _names(file: SparseControlFile, config: dict) -> dict[str, str]:
    """diffusers' names of the network without its motion modules -> core's."""
    count = sum(name.startswith("controlnet_down_blocks.") and name.endswith(".weight") for name in file.tensors)
    # The map knows a whole UNet; it takes the number of its levels from the same configuration.
    names = comfy.utils.unet_to_diffusers(config | {"transformer_depth_output": [0] * 99})
    for kind in ("weight", "bias"):
        names[f"controlnet_mid_block.{kind}"] = f"middle_block_out.0.{kind}"
        names |= {f"controlnet_down_blocks.{i}.{kind}": f"zero_convs.{i}.0.{kind}" for i in range(count)}
        if file.latents:
            names[f"controlnet_cond_embedding.{kind}"] = f"input_hint_block.0.{kind}"
            continue
        blocks = sum(name.startswith("controlnet_cond_embedding.blocks.") and name.endswith(kind) for name in file.tensors)
        places = ["conv_in", *(f"blocks.{i}" for i in range(blocks)), "conv_out"]
        names |= {
            f"controlnet_cond_embedding.{place}.{kind}": f"input_hint_block.{2 * i}.{kind}" for i, place in enumerate(places)
        }
    return names
