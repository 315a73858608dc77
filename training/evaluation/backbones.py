"""The public networks that FVD and CLIPScore are defined by, from local paths; nothing is ever downloaded.

Protocols, for clips (N, F, H, W, 3) uint8 that `training.data.clips.ClipFolder` has read, resized to cover and cut at the centre:

- FVD (Unterthiner et al., arXiv 1812.01717): the squared Fréchet distance of I3D's 400 Kinetics logits, from the TorchScript file
  that StyleGAN-V (arXiv 2112.14683) and most papers since have used (i3d_torchscript.pt), which resizes to 224x224 and rescales by itself.
- VideoMAE distance (Ge et al., arXiv 2404.12391, who found I3D's to look at single frames more than at motion; they take a larger
  network, so figures compare only within one file): the same distance of VideoMAE's last tokens, averaged, on 224x224 pixels.
- CLIPScore (Hessel et al., arXiv 2104.08718, without their factor of 2.5): 100 times the cosine of CLIP's embeddings of a frame and of
  its clip's caption, averaged over all frames and clips.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer, VideoMAEModel

from training.data.clips import cover
from training.evaluation.feature_net import content_hash
from training.evaluation.measure import Figure, spread
from training.evaluation.metrics import bootstrap_interval, frechet_distance
from training.run import console

Clips = Callable[[int], Tensor]  # the number of a clip -> (F, H, W, 3) uint8
Extractor = Callable[[Tensor], Tensor]  # (N, F, H, W, 3) uint8 -> features (N, D) float32

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of the colours 0..1
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class BackboneError(ValueError):
    """A network that is not there or not what it should be; the message is one sentence that names its path."""


def load_i3d(path: Path, device: torch.device | str = "cpu") -> Extractor:
    """I3D in TorchScript: logits (N, 400). BackboneError for a missing or other file."""
    path = Path(path)
    if not path.is_file():
        raise BackboneError(f"Expected I3D's TorchScript file (i3d_torchscript.pt) at {path}, found none; check the path.")
    try:
        net = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise BackboneError(
            f"Expected I3D's TorchScript file (i3d_torchscript.pt) at {path}, found another or a damaged one ({_first_line(error)}); "
            "download it again."
        ) from error

    @torch.no_grad()
    def features(clips: Tensor) -> Tensor:
        videos = rearrange(clips, "n f h w c -> n c f h w").float().to(device)
        return net(videos, rescale=True, resize=True, return_features=True).float().cpu()

    return features


def load_videomae(folder: Path, device: torch.device | str = "cpu") -> Extractor:
    """VideoMAE in transformers' layout: the mean of its last tokens (N, D). BackboneError for a missing or other folder."""
    model = _load(VideoMAEModel, folder, "VideoMAE").to(device)
    frames, side = model.config.num_frames, model.config.image_size

    @torch.no_grad()
    def features(clips: Tensor) -> Tensor:
        if clips.shape[1] != frames:
            raise BackboneError(
                f"Expected clips of {frames} frames for VideoMAE from {folder}, found {clips.shape[1]}; set --frames {frames}."
            )
        pixels = torch.stack([_normalised(clip, side, _IMAGENET) for clip in clips])
        return model(pixels.to(device)).last_hidden_state.mean(1).float().cpu()

    return features


def load_clip(folder: Path, device: torch.device | str = "cpu") -> Callable[[Tensor, str], float]:
    """CLIP in transformers' layout: the score of a clip (F, H, W, 3) uint8 and its caption. BackboneError as `load_videomae`."""
    model = _load(CLIPModel, folder, "CLIP").to(device)
    tokenizer = _load(CLIPTokenizer, folder, "CLIP's tokenizer")
    side, length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def score(clip: Tensor, caption: str) -> float:
        tokens = tokenizer([caption], truncation=True, max_length=length, return_tensors="pt").to(device)
        out = model(**tokens, pixel_values=_normalised(clip, side, _CLIP).to(device))
        return 100 * (out.image_embeds @ out.text_embeds.T).mean().item()

    return score


@dataclass
class Networks:
    """The networks that a measurement has, and what they measure on captioned clips."""

    distances: dict[str, Extractor]  # by the name of the distance on their features
    score: Callable[[Tensor, str], float] | None
    described: dict[str, str]  # their files and hashes: figures of two of them are never the same figure

    def measure(self, read: Clips, captions: Sequence[str], count: int) -> dict[str, np.ndarray]:
        """Features (count, D) of the first `count` clips for every distance, and the CLIPScore (N,) of each of all."""
        row = {name: features_of(net, read, count, name) for name, net in self.distances.items()}
        return row | ({"CLIPScore": clip_scores(self.score, read, captions, "CLIPScore")} if self.score else {})

    def figures(self, row: dict[str, np.ndarray], real: dict[str, np.ndarray], seed: int = 0) -> dict[str, Figure]:
        """The figures of a measured row against measured real clips, with 95% intervals as in `measure.figures`."""
        rng = np.random.default_rng(seed)
        figures = {name: spread(partial(frechet_distance, real[name]), row[name], rng) for name in self.distances}
        if self.score:
            scores = row["CLIPScore"]
            figures["CLIPScore"] = (float(scores.mean()), *bootstrap_interval(np.mean, [scores], 500, rng))
        return figures


_DISTANCES = {"i3d": ("FVD", load_i3d), "videomae": ("VideoMAE distance", load_videomae)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name the networks and the real clips."""
    parser.add_argument("--real", type=console.path, metavar="FOLDER", help="real clips, for the distances")
    parser.add_argument("--i3d", type=console.path, metavar="FILE", help="i3d_torchscript.pt, for FVD")
    parser.add_argument("--videomae", type=console.path, metavar="FOLDER", help="a VideoMAE in transformers' layout")
    parser.add_argument("--clip", type=console.path, metavar="FOLDER", help="a CLIP in transformers' layout, for CLIPScore")


def load_networks(args: argparse.Namespace, device: torch.device | str = "cpu") -> Networks:
    """The networks that a command line names. BackboneError for one that is not there or not what it should be."""
    paths = {key: path for key in (*_DISTANCES, "clip") if (path := getattr(args, key))}
    distances = {name: load(paths[key], device) for key, (name, load) in _DISTANCES.items() if key in paths}
    score = load_clip(args.clip, device) if args.clip else None
    return Networks(distances, score, {key: _described(path) for key, path in paths.items()})


def _described(path: Path) -> str:
    """A network's name and the hash of its weights."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    return f"{path.name} (sha256 {', '.join(content_hash(file)[:12] for file in files)})"


def features_of(extractor: Extractor, read: Clips, count: int, name: str, batch: int = 8) -> np.ndarray:
    """Features (count, D) float64 of the first `count` clips, read a batch at a time."""
    with tqdm(range(0, count, batch), name, leave=False) as starts:
        parts = [extractor(torch.stack([read(i) for i in range(start, min(start + batch, count))])) for start in starts]
    return torch.cat(parts).double().numpy()


def clip_scores(score: Callable[[Tensor, str], float], read: Clips, captions: Sequence[str], name: str) -> np.ndarray:
    """(N,) CLIPScore of each clip with its caption."""
    with tqdm(captions, name, leave=False) as bar:
        return np.array([score(read(i), caption) for i, caption in enumerate(bar)])


def _normalised(frames: Tensor, side: int, colours: tuple) -> Tensor:
    """(F, 3, side, side) float of (F, H, W, 3) uint8, resized to cover, the centre cut out, its colours standardised."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in colours)
    return (rearrange(cover(frames, side, side), "f h w c -> f c h w").float() / 255 - mean) / deviation


def _load(cls, folder: Path, what: str):
    """`cls.from_pretrained` on a local folder, whole, in evaluation mode."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BackboneError(f"Expected a folder with {what} in transformers' layout at {folder}, found none; check the path.")
    try:
        if cls is CLIPTokenizer:
            return cls.from_pretrained(folder, local_files_only=True)
        model, info = cls.from_pretrained(folder, local_files_only=True, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers raises a dozen kinds for one cause
        raise BackboneError(f"Expected {what} in {folder}, found: {_first_line(error)}; name another folder.") from error
    if missing := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise BackboneError(
            f"Expected all weights of {what} in {folder}, found {len(missing)} of them missing or of another shape; name another folder."
        )
    return model.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
