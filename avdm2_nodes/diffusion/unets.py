"""Video and image UNets of the AnimateDiff family, seen as functions that predict noise.

Everything outside this module calls a predictor `eps(x_t, t, text)`: noisy latents (B, C, F, h, w) of clips or (B, C, h, w) of
images, timesteps (B,) or (), text embeddings (B, L, D), and the predicted noise of x_t's shape in float32 comes back.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from .schedules import classifier_free_guidance

Predictor = Callable[[Tensor, Tensor, Tensor], Tensor]
Unet = TypeVar("Unet", UNetMotionModel, UNet2DConditionModel)


def zero_motion(motion: MotionAdapter) -> MotionAdapter:
    """Zeroes every `proj_out`, so that the modules add nothing yet: the video UNet starts as the image UNet, frame by frame."""
    for name, parameter in motion.named_parameters():
        if "proj_out" in name:
            nn.init.zeros_(parameter)
    return motion


def video_unet(image_unet: UNet2DConditionModel, motion: MotionAdapter) -> UNetMotionModel:
    """A video UNet of its own (weights copied) from an image UNet and a motion adapter; ValueError where they do not match."""
    require_matching_motion(image_unet, motion)
    with torch.device("meta"):  # its weights come below: none is drawn at random first
        unet = UNetMotionModel.from_unet2d(image_unet, motion, load_weights=False)
    weights, dtype = image_unet.state_dict() | motion.state_dict(), _dtype(image_unet)
    unet.load_state_dict({name: weight.to(dtype, copy=True) for name, weight in weights.items()}, assign=True)
    return without_waste(unet)


def require_matching_motion(image_unet: UNet2DConditionModel, motion: MotionAdapter) -> None:
    """ValueError where the motion adapter was made for an image UNet of other widths, or of other layers in a block."""
    unet_widths, motion_widths = tuple(image_unet.config.block_out_channels), tuple(motion.config.block_out_channels)
    if unet_widths != motion_widths:
        raise ValueError(
            f"Expected a motion module for an image UNet of widths {unet_widths}, found one for {motion_widths}; "
            "use a motion module that was made for this base model."
        )
    unet_layers, motion_layers = (
        list(layers) if isinstance(layers, (list, tuple)) else [layers] * len(unet_widths)
        for layers in (image_unet.config.layers_per_block, motion.config.motion_layers_per_block)
    )
    if unet_layers != motion_layers:
        raise ValueError(
            f"Expected a motion module for an image UNet of {unet_layers} layers a block, found one for {motion_layers}; "
            "use a motion module that was made for this base model."
        )


class OneTextAClip(AttnProcessor2_0):
    """Attention of SD1.5's layers, in which B * F frames may read B texts, and whose output is not divided by 1.

    In cross-attention a clip's frames are one long row of queries; keys and values are made once a clip.
    """

    def __call__(
        self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask=None, *args, **kwargs
    ) -> Tensor:
        if attention_mask is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        rows = attn.to_q(hidden_states), attn.to_k(read), attn.to_v(read)
        query, key, value = (x.view(len(read), -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2) for x in rows)
        made = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(rows[0].shape)
        return attn.to_out[1](attn.to_out[0](made))


class Residual(ResnetBlock2D):
    """A residual layer of SD1.5, whose output is not divided by 1."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args, **kwargs) -> Tensor:
        hidden = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        hidden = hidden + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        hidden = self.conv2(self.dropout(self.nonlinearity(self.norm2(hidden))))
        return (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)) + hidden


def without_waste(unet: Unet) -> Unet:
    """The same video or image UNet, made to do less for the same numbers.

    It reads B rows of text in place of B * F, divides nothing by 1 and multiplies motion modules' inputs as one matrix. As diffusers
    has it, `proj_in` of a motion module gets, of a single clip, a view that torch cannot see as one matrix; a frozen one then
    multiplies place by place with as many copies of its weight: on a CPU a fifth of an evaluation of SD1.5.
    """
    for module in unet.modules():
        if isinstance(module, AnimateDiffTransformer3D):
            module.proj_in.register_forward_pre_hook(_contiguous, with_kwargs=True)
        elif isinstance(module, Attention) and _is_plain_attention(module):
            module.set_processor(OneTextAClip())
        elif type(module) is ResnetBlock2D and _is_plain_residual(module):
            module.__class__ = Residual
    return unet


def _is_plain_attention(attn: Attention) -> bool:
    norms = attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k
    return not any(norms) and not attn.residual_connection and attn.rescale_output_factor == 1


def _is_plain_residual(layer: ResnetBlock2D) -> bool:
    others = layer.upsample, layer.downsample, layer.skip_time_act
    plain = layer.output_scale_factor == 1 and layer.time_embedding_norm == "default" and layer.time_emb_proj is not None
    return plain and not any(others)


def _contiguous(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A hook before a module's forward."""
    return tuple(x.contiguous() for x in args), {name: x.contiguous() for name, x in kwargs.items()}


def video_predictor(unet: UNetMotionModel, backend: str | Callable | None = None) -> Predictor:
    """eps(x_t (B, C, F, h, w), t, text (B, L, D)) by a video UNet `without_waste`; every frame reads the same text.

    With a `backend` of torch.compile it is compiled at its first evaluation, once for all prompts, seeds and numbers of frames from
    two; another batch or size is compiled anew.
    """
    network = unet if backend is None else torch.compile(unet, backend=backend)

    def eps(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        x_t, text = x_t.to(_dtype(unet)), text.to(_dtype(unet))
        if backend is not None:
            torch._dynamo.maybe_mark_dynamic(x_t, 2)
            torch._dynamo.maybe_mark_dynamic(text, 1)
        return network(x_t, t, text, return_dict=False)[0].float()

    return eps


def image_predictor(unet: UNet2DConditionModel) -> Predictor:
    """eps(x_t (B, C, h, w), t, text (B, L, D)) by an image UNet."""

    def eps(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return unet(x_t.to(_dtype(unet)), t, text.to(_dtype(unet)), return_dict=False)[0].float()

    return eps


def _dtype(unet: nn.Module) -> torch.dtype:
    """That of its weights; a UNet's own `dtype` looks at every one of them first, hundreds at each evaluation."""
    return next(unet.parameters()).dtype


def guided(predict: Predictor, empty_text: Tensor, guidance: float) -> Predictor:
    """`predict` with classifier-free guidance against `empty_text` (1, L, D), both halves in one batch; at 1 the bare predictor."""
    if guidance == 1.0:
        return predict

    def eps(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        both = predict(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([empty_text.expand_as(text), text]))
        return classifier_free_guidance(*both.chunk(2), guidance)

    return eps


def encoder_features(unet: UNetMotionModel, x_t: Tensor, t: Tensor, text: Tensor) -> list[Tensor]:
    """The encoder's features at its three coarsest spatial scales, finest first: (B, C_i, F, h_i, w_i) each.

    Time embedding, conv_in, down blocks and mid block are called in turn: the decoder never runs. Of every scale the last feature
    before its downsampling is taken, of the coarsest the mid block's.
    """
    frames = x_t.shape[2]
    t = torch.as_tensor(t, device=x_t.device).expand(x_t.shape[0])
    emb = repeat(unet.time_embedding(unet.time_proj(t).to(_dtype(unet))), "b d -> (b f) d", f=frames)
    hidden = unet.conv_in(rearrange(x_t, "b c f h w -> (b f) c h w").to(_dtype(unet)))
    text = text.to(_dtype(unet))
    features = []
    for block in unet.down_blocks:
        if getattr(block, "has_cross_attention", False):
            hidden, residuals = block(hidden, emb, encoder_hidden_states=text, num_frames=frames)
        else:
            hidden, residuals = block(hidden, emb, num_frames=frames)
        features.append(residuals[-2] if block.downsamplers else residuals[-1])
    motion = {"num_frames": frames} if hasattr(unet.mid_block, "motion_modules") else {}
    features[-1] = unet.mid_block(hidden, emb, encoder_hidden_states=text, **motion)
    return [rearrange(feature, "(b f) c h w -> b c f h w", f=frames) for feature in features[-3:]]


def share_spatial_layers(unet: UNetMotionModel, like: UNet2DConditionModel) -> UNet2DConditionModel:
    """An image UNet whose layers *are* the video UNet's spatial layers: no weight is copied, motion modules are left out.

    `like` gives the configuration only. An adapter injected into one of the two is thereby in both.
    """
    with torch.device("meta"):
        shell = UNet2DConditionModel.from_config(like.config)
    _adopt(shell, unet)
    return shell


def with_own_motion(unet: UNetMotionModel, motion: MotionAdapter) -> UNetMotionModel:
    """A video UNet whose spatial layers *are* those of `unet` and whose motion modules are copies of `motion`'s weights."""
    with torch.device("meta"):
        shell = without_waste(UNetMotionModel.from_config(unet.config))
    for mine, theirs in _matching_blocks(shell, motion):
        mine.motion_modules = nn.ModuleList(mine.motion_modules).to_empty(device=unet.device)
        mine.motion_modules.load_state_dict(theirs.motion_modules.state_dict())
    _adopt(shell, unet)
    return shell


def _matching_blocks(shell: UNetMotionModel, motion: MotionAdapter):
    yield from zip(shell.down_blocks, motion.down_blocks, strict=True)
    yield from zip(shell.up_blocks, motion.up_blocks, strict=True)
    if hasattr(shell.mid_block, "motion_modules"):
        yield shell.mid_block, motion.mid_block


_SPATIAL = ("resnets", "attentions", "downsamplers", "upsamplers")


def _adopt(shell: nn.Module, donor: nn.Module) -> None:
    """Puts the donor's spatial submodules into `shell` in place of its own (which lie on the meta device)."""
    for name, child in list(shell.named_children()):
        if name in ("down_blocks", "up_blocks"):
            for mine, theirs in zip(child, getattr(donor, name), strict=True):
                _adopt_block(mine, theirs)
        elif name == "mid_block":
            _adopt_block(child, donor.mid_block)
        else:
            setattr(shell, name, getattr(donor, name))


def _adopt_block(mine: nn.Module, theirs: nn.Module) -> None:
    for name in _SPATIAL:
        if getattr(mine, name, None) is not None:
            setattr(mine, name, getattr(theirs, name))
