"""Motion modules as AnimateDiff's own code and ComfyUI-AnimateDiff-Evolved run them: each frame normalised alone."""

import copy

from diffusers import UNetMotionModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import nn


class FrameNorm(nn.GroupNorm):
    """Of clips (B, C, F, h, w), whose frames diffusers normalises together."""

    def forward(self, clips):
        return super().forward(clips.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clips), -1)).transpose(1, 2)


def per_frame(unet: UNetMotionModel) -> UNetMotionModel:
    """A copy of a video UNet that normalises as they do."""
    unet = copy.deepcopy(unet)
    norms = [module.norm for module in unet.modules() if isinstance(module, AnimateDiffTransformer3D)]
    assert norms and all(type(norm) is nn.GroupNorm for norm in norms)
    for norm in norms:
        norm.__class__ = FrameNorm
    return unet
