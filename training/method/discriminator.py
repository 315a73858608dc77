"""The trainable part of ADM's discriminator: small heads on the frozen teacher encoder's features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class DiscriminatorHeads(nn.Module):
    """Logits (B, F, h, w) from the encoder's features at three scales, (B, C_i, F, h_i, w_i) each.

    AVDM2 (arXiv 2412.05899) brings three spatial scales together and puts small heads on them; its text with the sizes could not be
    had, so they are our choice: each scale is projected by a 1x1 convolution, brought to the middle scale, and two space-time
    convolutions judge every place of every frame in the light of its neighbours.
    """

    def __init__(self, channels: list[int], width: int = 64):
        super().__init__()
        self.project = nn.ModuleList(nn.Conv3d(c, width, 1) for c in channels)
        self.judge = nn.Sequential(
            nn.SiLU(),
            nn.Conv3d(width * len(channels), width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv3d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv3d(width, 1, 1),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        frames, height, width = features[len(features) // 2].shape[2:]
        scales = []
        for project, feature in zip(self.project, features, strict=True):
            # The teacher's features grow with depth; to unit length by place, no scale drowns the others.
            feature = F.normalize(feature.float(), dim=1) * feature.shape[1] ** 0.5
            scales.append(_resize(project(feature), frames, height, width))
        return self.judge(torch.cat(scales, 1)).squeeze(1)


def judge_as_they_stand(heads: DiscriminatorHeads, features: list[Tensor]) -> Tensor:
    """The heads' logits; a gradient goes to the features and not to the heads."""
    return functional_call(heads, {name: weight.detach() for name, weight in heads.named_parameters()}, (features,))


def _resize(x: Tensor, frames: int, height: int, width: int) -> Tensor:
    if x.shape[3] > height:
        return F.adaptive_avg_pool3d(x, (frames, height, width))
    return F.interpolate(x, (frames, height, width), mode="nearest")
