"""The trainable part of ADM's discriminator: small heads on the frozen teacher encoder's features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class DiscriminatorHeads(nn.Module):
    """Logits (B, places) from the encoder's features at three scales, (B, C_i, F, h_i, w_i) each.

    AVDM2 (arXiv 2412.05899) brings three spatial scales together and puts small heads on them; its text with the sizes could not be
    had, so they are our choice: each scale is projected by a 1x1 convolution, brought to the middle scale, and two space-time
    convolutions judge every place of every frame in the light of its neighbours. With `motion` a second such judge sees the differences
    between one frame's features and the next's, after the motion space of MCM (arXiv 2406.06890) and the temporal heads of SF-V (arXiv
    2406.04324): what single frames look like is nothing to it.
    """

    def __init__(self, channels: list[int], width: int = 64, motion: bool = False):
        super().__init__()
        self.project, self.judge = _projections(channels, width), _judge(width * len(channels), width)
        if motion:
            self.project_motion, self.judge_motion = _projections(channels, width), _judge(width * len(channels), width)
        self.motion = motion

    def forward(self, features: list[Tensor]) -> Tensor:
        # The teacher's features grow with depth; to unit length by place, no scale drowns the others.
        features = [F.normalize(feature.float(), dim=1) * feature.shape[1] ** 0.5 for feature in features]
        logits = self.judge(_brought_together(features, self.project)).flatten(1)
        if not self.motion:
            return logits
        moved = [feature.diff(dim=2) for feature in features]
        return torch.cat([logits, self.judge_motion(_brought_together(moved, self.project_motion)).flatten(1)], 1)


def _projections(channels: list[int], width: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Conv3d(c, width, 1) for c in channels)


def _judge(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.SiLU(),
        nn.Conv3d(channels, width, 3, padding=1),
        nn.GroupNorm(8, width),
        nn.SiLU(),
        nn.Conv3d(width, width, 3, padding=1),
        nn.SiLU(),
        nn.Conv3d(width, 1, 1),
    )


def _brought_together(features: list[Tensor], project: nn.ModuleList) -> Tensor:
    """All scales at the middle one's places, (B, width * scales, F, h, w)."""
    frames, height, width = features[len(features) // 2].shape[2:]
    return torch.cat([_resize(p(f), frames, height, width) for p, f in zip(project, features, strict=True)], 1)


def judge_as_they_stand(heads: DiscriminatorHeads, features: list[Tensor]) -> Tensor:
    """The heads' logits; a gradient goes to the features and not to the heads."""
    return functional_call(heads, {name: weight.detach() for name, weight in heads.named_parameters()}, (features,))


def _resize(x: Tensor, frames: int, height: int, width: int) -> Tensor:
    if x.shape[3] > height:
        return F.adaptive_avg_pool3d(x, (frames, height, width))
    return F.interpolate(x, (frames, height, width), mode="nearest")
