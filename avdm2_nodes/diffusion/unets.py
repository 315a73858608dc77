"""Video and image UNets of the AnimateDiff family, seen as functions that predict noise.

Everything outside this module calls a predictor `eps(x_t, t, text)`: noisy latents (B, C, F, h, w) of clips or (B, C, h, w) of
images, timesteps (B,) or (), text embeddings (B, L, D), and the predicted noise of x_t's shape in float32 comes back.
"""

from collections.abc import Callable

import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from einops import rearrange, repeat
from torch import Tensor, nn

from .layers import without_waste
from .schedules import classifier_free_guidance

Predictor = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def video_predictor(unet: UNetMotionModel) -> Predictor:
    """eps(x_t (B, C, F, h, w), t, text (B, L, D)) by a video UNet `without_waste`; every frame reads the same text."""

    def eps(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return unet(x_t.to(_dtype(unet)), t, text.to(_dtype(unet)), return_dict=False)[0].float()

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
