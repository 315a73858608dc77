"""A small video feature net: what the Fréchet and kernel distances of the miniature are measured on.

It learns to name everything that a clip of the miniature world shows, where it is and how it moves, on rendered clips of both
styles. Its features are its own: distances on them are comparable only under the same `content_hash`, and are not FVD.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from avdm2_nodes.files.stack import Stack, StackError
from training.world.scenes import BACKGROUNDS, COLOURS, DIRECTIONS, FRAMES, RADII, SHAPES, SIDE, SPEEDS, STYLES, Content

VERSION = 1
STILL = "still"  # the class of a shape that stands still, among directions and among speeds
CLASSES = {
    "size": tuple(RADII),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "direction": (STILL, *DIRECTIONS),
    "speed": (STILL, *SPEEDS),
    "background": BACKGROUNDS,
    "style": STYLES,
}

_FORMAT = "avdm2_video_features"
_PLACE_SCALE = SIDE / 2  # pixels: centres are regressed as -1..1 from the middle of the frame
_VELOCITY_SCALE = max(SPEEDS.values())  # pixels a frame


@dataclass(frozen=True)
class FeatureConfig:
    """Widths of the three stages (multiples of 8) and of the features."""

    widths: tuple[int, int, int] = (32, 64, 96)
    features: int = 96


class VideoFeatures(nn.Module):
    """Factorised 2D + 1D convolutions on clips of 8 frames of 64x64 pixels.

    `forward` takes float clips (N, 3, F, H, W) in 0..1 and returns a dict: "features" (N, D), logits (N, classes) of every name in
    CLASSES, "velocity" (N, 2) in pixels a frame and "centres" (N, F, 2) in pixels. All heads are linear in the features, so what
    the heads know lies in the features' own distances.
    """

    def __init__(self, config: FeatureConfig | None = None):
        super().__init__()
        self.config = config or FeatureConfig()
        a, b, c = self.config.widths
        self.stem = nn.Conv2d(3, a, 4, stride=2, padding=1)
        self.space = nn.ModuleList([_Space(a, b), _Space(b, c), _Space(c, c)])
        self.time = nn.ModuleList([_Time(b), _Time(c), _Time(c)])
        self.squeeze = nn.Conv2d(c, 24, 1)
        self.project = nn.Linear(24 * FRAMES // 2 * (SIDE // 16) ** 2 + 2 * c, self.config.features)
        # Unit variance on the training clips: every feature weighs alike in the distances.
        self.standardise = nn.BatchNorm1d(self.config.features, affine=False, momentum=0.05)
        self.heads = nn.ModuleDict({name: nn.Linear(self.config.features, len(words)) for name, words in CLASSES.items()})
        self.velocity = nn.Linear(self.config.features, 2)
        self.centres = nn.Linear(self.config.features, FRAMES * 2)

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        frames = clips.shape[2]
        if clips.shape[1:] != (3, FRAMES, SIDE, SIDE):
            raise ValueError(
                f"Expected clips of shape (N, 3, {FRAMES}, {SIDE}, {SIDE}), found {tuple(clips.shape)}; "
                "resize them and pick that many frames."
            )
        x = rearrange(clips, "n c f h w -> (n f) c h w").contiguous(memory_format=torch.channels_last)
        x = F.silu(self.stem(x - 0.35))
        for space, time in zip(self.space, self.time, strict=True):
            x = time(space(x), frames)
        x = rearrange(x, "(n f) c h w -> n f c h w", f=frames)
        # What is shown is read from pooled maps, where and how it moves from all places of every pair of frames.
        pooled = [x.mean((1, 3, 4)), x.amax((1, 3, 4))]
        pairs = rearrange(x, "n (p two) c h w -> n p two c h w", two=2).mean(2)
        pairs = F.silu(self.squeeze(rearrange(pairs, "n p c h w -> (n p) c h w")))
        pairs = rearrange(pairs, "(n p) c h w -> n (p c h w)", p=frames // 2)
        features = self.standardise(self.project(torch.cat([pairs, *pooled], 1)))
        outputs = {name: head(features) for name, head in self.heads.items()}
        outputs["features"] = features
        outputs["velocity"] = self.velocity(features) * _VELOCITY_SCALE
        outputs["centres"] = rearrange(self.centres(features), "n (f xy) -> n f xy", xy=2) * _PLACE_SCALE + SIDE / 2
        return outputs

    @torch.no_grad()
    def features(self, clips: np.ndarray | Tensor, batch: int = 8) -> Tensor:
        """Float32 features (N, D) on the CPU of uint8 clips (N, F, H, W, 3); the net must be in eval mode."""
        weight = self.stem.weight
        clips = torch.as_tensor(clips)
        if clips.dtype != torch.uint8 or clips.ndim != 5:
            raise ValueError(f"Expected uint8 clips (N, F, H, W, 3), found {clips.dtype} {tuple(clips.shape)}; see as_input.")
        parts = [self(as_input(part.to(weight.device)).to(weight.dtype))["features"] for part in clips.split(batch)]
        return torch.cat(parts).float().cpu() if parts else torch.empty(0, self.config.features)


class _Space(nn.Module):
    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(8, outer)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


class _Time(nn.Module):
    """Residual convolution over three neighbouring frames, each place apart."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, (3, 1), padding=(1, 0))
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        tracks = F.silu(self.conv(rearrange(x, "(n f) c h w -> n c f (h w)", f=frames)))
        return x + rearrange(tracks, "n c f (h w) -> (n f) c h w", h=x.shape[2])


def as_input(clips: Tensor) -> Tensor:
    """Float clips (N, 3, F, H, W) in 0..1 from uint8 ones (N, F, H, W, 3)."""
    return rearrange(clips, "n f h w c -> n c f h w").float() / 255


def targets_of(
    contents: Sequence[Content], styles: Sequence[str], velocities: np.ndarray, centres: np.ndarray
) -> dict[str, Tensor]:
    """What the net should say of rendered clips: class indices (N,), "velocity" (N, 2) and "centres" (N, F, 2) in pixels."""
    words = {name: [getattr(content, name) or STILL for content in contents] for name in CLASSES if name != "style"}
    words["style"] = list(styles)
    targets = {name: torch.tensor([CLASSES[name].index(word) for word in words[name]]) for name in CLASSES}
    targets["velocity"] = torch.as_tensor(np.asarray(velocities), dtype=torch.float32)
    targets["centres"] = torch.as_tensor(np.asarray(centres), dtype=torch.float32)
    return targets


def degrade(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Augments float clips (N, 3, F, H, W): half of them as they are, the others blurred (sigma to 1 pixel) and noisy (to 0.05)."""
    n, channels, frames = clips.shape[:3]
    draw = torch.rand(3, n, generator=generator).to(clips.device)
    touched = (draw[0] < 0.5).float()
    reach = torch.arange(-2, 3, device=clips.device)
    kernel = torch.exp(-(reach**2) / (2 * (touched * draw[1]).clamp(min=1e-2)[:, None] ** 2))
    kernel = repeat(kernel / kernel.sum(1, keepdim=True), "n k -> (n planes) 1 k", planes=channels * frames)
    x = F.pad(rearrange(clips, "n c f h w -> 1 (n c f) h w"), (2, 2, 2, 2), mode="replicate")
    x = F.conv2d(x, kernel[:, :, :, None], groups=len(kernel))
    x = F.conv2d(x, kernel[:, :, None, :], groups=len(kernel)).view(clips.shape)
    noise = torch.randn(clips.shape, generator=generator).to(clips.device)
    return (x + 0.05 * (touched * draw[2]).view(-1, 1, 1, 1, 1) * noise).clamp(0, 1)


def loss(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalar losses: cross entropy of every name in CLASSES, smooth L1 of velocity and centres, and their sum "total"."""
    losses = {name: F.cross_entropy(outputs[name], targets[name]) for name in CLASSES}
    losses["velocity"] = 4 * F.smooth_l1_loss(outputs["velocity"] / _VELOCITY_SCALE, targets["velocity"] / _VELOCITY_SCALE)
    losses["centres"] = 4 * F.smooth_l1_loss(outputs["centres"] / _PLACE_SCALE, targets["centres"] / _PLACE_SCALE)
    return losses | {"total": sum(losses.values())}


def training_step(
    net: VideoFeatures, clips: Tensor, targets: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """Losses of one batch of uint8 clips (N, F, H, W, 3) after augmentation; the caller steps on the "total"."""
    return loss(net(degrade(as_input(clips), generator)), targets)


@torch.no_grad()
def score(net: VideoFeatures, clips: Tensor, targets: dict[str, Tensor]) -> dict[str, float]:
    """Accuracy of every name in CLASSES, and mean errors of "velocity" (pixels a frame) and "centres" (pixels), on uint8 clips."""
    outputs = net(as_input(clips))
    scores = {name: (outputs[name].argmax(1) == targets[name]).float().mean().item() for name in CLASSES}
    return scores | {name: (outputs[name] - targets[name]).norm(dim=-1).mean().item() for name in ("velocity", "centres")}


def save_features(net: VideoFeatures, path: str | Path) -> None:
    """Writes the net as fp16 safetensors with its config and version in the metadata; the file appears whole or not at all."""
    path = Path(path)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    weights = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    # One key: safetensors writes several in random order, and the hash would change from one writing to the next.
    metadata = {_FORMAT: json.dumps({"version": VERSION, "config": asdict(net.config)}, sort_keys=True)}
    part = path.with_name(path.name + ".part")
    save_file(weights, part, metadata)
    os.replace(part, path)


def load_features(path: str | Path) -> VideoFeatures:
    """Reads a net written by `save_features`, frozen and in eval mode, float32 on the CPU.

    ValueError for a file that is damaged, of another kind or of a newer version; FileNotFoundError if there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected the feature net at {path}, found no file; train it or fetch the weights.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            weights = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"Expected a safetensors file at {path}, found a damaged one ({error}); fetch it again.") from error
    header = json.loads(metadata.get(_FORMAT, "{}"))
    if header.get("version") != VERSION:
        raise ValueError(
            f"Expected {_FORMAT} of version {VERSION} in {path}, found version {header.get('version')}; "
            "use the file that belongs to this version of the code."
        )
    config = header["config"]
    net = VideoFeatures(FeatureConfig(tuple(config["widths"]), config["features"]))
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"Expected the weights of {net.config} in {path}, found others ({error}); fetch it again.") from error
    return net.eval().requires_grad_(False)


def load_features_of(stack: Stack) -> VideoFeatures:
    """The net of the evaluation, which lies beside the stack's parts. StackError where it does not."""
    try:
        return load_features(stack.folder / "feature_net.safetensors")
    except (OSError, ValueError) as error:
        raise StackError(str(error)) from error


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex: what a table names as the feature net that it was measured with."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
