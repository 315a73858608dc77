"""The trainable part of ADM's discriminator: small heads on the frozen teacher encoder's features."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from training.method.roles import Encoder
from training.run.config import DistillConfig


class DiscriminatorHeads(nn.Module):
    """Logits (B, places) from the encoder's features at three scales, (B, C_i, F, h_i, w_i) each.

    AVDM2 (arXiv 2412.05899) brings three spatial scales together and puts small heads on them; its text with the sizes could not be
    had, so they are our choice: each scale is projected by a 1x1 convolution, brought to the middle scale, and two space-time
    convolutions judge every place of every frame in the light of its neighbours. With `motion` a second such judge sees the differences
    between one frame's features and the next's, after the motion space of MCM (arXiv 2406.06890) and the temporal heads of SF-V (arXiv
    2406.04324): what single frames look like is nothing to it. With `frames_alone` no frame is judged by another.
    """

    def __init__(self, channels: list[int], width: int = 64, motion: bool = False, frames_alone: bool = False):
        super().__init__()
        self.project, self.judge = _projections(channels, width), _judge(width * len(channels), width)
        if motion:
            self.project_motion, self.judge_motion = _projections(channels, width), _judge(width * len(channels), width)
        self.motion, self.frames_alone = motion, frames_alone

    def forward(self, features: list[Tensor]) -> Tensor:
        # The teacher's features grow with depth; to unit length by place, no scale drowns the others.
        features = [F.normalize(feature.float(), dim=1) * feature.shape[1] ** 0.5 for feature in features]
        shown, clips = features, len(features[0])
        if self.frames_alone:
            shown = [rearrange(feature, "b c f h w -> (b f) c 1 h w") for feature in features]
        logits = self.judge(_brought_together(shown, self.project)).reshape(clips, -1)
        if not self.motion:
            return logits
        moved = [feature.diff(dim=2) for feature in features]
        return torch.cat([logits, self.judge_motion(_brought_together(moved, self.project_motion)).flatten(1)], 1)


def heads_for(channels: list[int], config: DistillConfig) -> DiscriminatorHeads:
    """The heads that a run's settings ask for."""
    frames_alone = config.method.kind == "motion-consistency"
    return DiscriminatorHeads(channels, config.adm.width, config.adm.motion and not frames_alone, frames_alone)


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


def frame_by_frame(encoder: Encoder) -> Encoder:
    """The encoder on each frame alone, as a clip of one: features (B, C_i, F, h_i, w_i) that know nothing of other frames."""

    def features(x_t: Tensor, t: Tensor, text: Tensor) -> list[Tensor]:
        frames = x_t.shape[2]
        alone = rearrange(x_t, "b c f h w -> (b f) c 1 h w")
        seen = encoder(alone, t.repeat_interleave(frames), text.repeat_interleave(frames, 0))
        return [rearrange(feature, "(b f) c 1 h w -> b c f h w", f=frames) for feature in seen]

    return features


def judge_as_they_stand(heads: DiscriminatorHeads, features: list[Tensor]) -> Tensor:
    """The heads' logits; a gradient goes to the features and not to the heads."""
    return functional_call(heads, {name: weight.detach() for name, weight in heads.named_parameters()}, (features,))


def _resize(x: Tensor, frames: int, height: int, width: int) -> Tensor:
    if x.shape[3] > height:
        return F.adaptive_avg_pool3d(x, (frames, height, width))
    return F.interpolate(x, (frames, height, width), mode="nearest")
