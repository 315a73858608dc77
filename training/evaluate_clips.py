"""Measures a folder of clips by public networks: FVD and the VideoMAE distance to a folder of real clips, and CLIPScore.

python training/evaluate_clips.py --generated FOLDER [--real FOLDER --i3d FILE --videomae FOLDER] [--clip FOLDER]

Folders hold captioned videos as for training. The networks are named by local paths; of each that is named a figure is measured.
Every clip is read from its first frame on: `frames` of them, `stride` apart, resized to cover `height` x `width`, the centre cut out.
Distances compare equally many clips of both folders, the first of each by name; published figures take 2,048 and more. With fewer, a
distance is biased upwards: compare it only with others of this command at the same settings.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository in place of this folder: runs from anywhere
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; nothing is looked up anywhere

import argparse
from functools import partial

import numpy as np

from training import console
from training.data import ClipFolder, DataError
from training.evaluation.backbones import BackboneError, clip_scores, features_of, load_clip, load_i3d, load_videomae
from training.evaluation.feature_net import content_hash
from training.evaluation.measure import Figure, spread
from training.evaluation.metrics import bootstrap_interval, frechet_distance
from training.evaluation.report import write_report
from training.precision import pick_device
from training.sample import between
from training.video import VideoError

DISTANCES = {"FVD": ("i3d", load_i3d), "VideoMAE distance": ("videomae", load_videomae)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generated", type=Path, required=True, metavar="FOLDER", help="the clips to measure")
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="real clips, for the distances")
    parser.add_argument("--i3d", type=Path, metavar="FILE", help="i3d_torchscript.pt, for FVD")
    parser.add_argument("--videomae", type=Path, metavar="FOLDER", help="a VideoMAE in transformers' layout")
    parser.add_argument("--clip", type=Path, metavar="FOLDER", help="a CLIP in transformers' layout, for CLIPScore")
    parser.add_argument("--frames", type=between(1, 1024), default=16, help="of each clip (default: 16)")
    parser.add_argument(
        "--stride", type=between(1, 1024), default=1, help="frames of a video from one to the next (default: 1)"
    )
    parser.add_argument("--height", type=between(8, 8192), default=256, help="pixels (default: 256)")
    parser.add_argument("--width", type=between(8, 8192), default=256, help="pixels (default: 256)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where report.json and report.md go (default: the clips' folder)"
    )
    args = parser.parse_args(argv)
    if not (args.i3d or args.videomae or args.clip):
        parser.error("expected a network to measure by, found none; name one with --i3d, --videomae or --clip")
    if (args.i3d or args.videomae) and not args.real:
        parser.error("expected real clips beside --i3d and --videomae, found none; name a folder with --real")
    return args


def evaluate(args: argparse.Namespace) -> dict[str, Figure]:
    """The figures that are asked for, which are written down too; one of the errors named in `main`."""
    device = pick_device()
    networks = {name: load(path, device) for name, (key, load) in DISTANCES.items() if (path := getattr(args, key))}
    score = load_clip(args.clip, device) if args.clip else None
    size = args.frames, args.height, args.width, args.stride
    made = ClipFolder(args.generated, *size)
    real = ClipFolder(args.real, *size) if networks else None
    rng, figures = np.random.default_rng(0), {}
    if real is not None:
        count = min(len(made), len(real))
        if count < 2:
            raise DataError(
                f"Expected 2 clips or more in {args.generated} and {args.real}, found {count} in one of them; add some."
            )
        for name, network in networks.items():
            theirs, ours = (features_of(network, folder.read, count, f"{name}: {folder.folder}") for folder in (real, made))
            figures[name] = spread(partial(frechet_distance, theirs), ours, rng)
    if score is not None:
        scores = clip_scores(score, made.read, made.captions, "CLIPScore")
        figures["CLIPScore"] = (float(scores.mean()), *bootstrap_interval(np.mean, [scores], 500, rng))
    about = {
        "clips": f"{len(made)} of {args.generated}"
        + (f", distances from the first {count} to as many of {args.real}" if real else ""),
        "frames": f"{args.frames} of {args.width}x{args.height}, stride {args.stride}",
        **{key: described(path) for key in ("i3d", "videomae", "clip") if (path := getattr(args, key))},
    }
    out = args.out or args.generated
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_report(out, "Clips, measured by public networks", {args.generated.name: figures}, {}, about)
    except OSError as error:
        raise DataError(f"Expected the right to write into {out}, found: {error.strerror}; name another with --out.") from error
    return figures


def described(path: Path) -> str:
    """A network's name and the hash of its weights, so that figures of two files are never taken for the same."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    return f"{path.name} (sha256 {', '.join(content_hash(file)[:12] for file in files)})"


def main(argv: list[str] | None = None) -> int:
    """0, or 1 after a sentence on stderr; argparse leaves with 2."""
    args = parse(argv)
    console.set_up()
    try:
        for name, (value, low, high) in evaluate(args).items():
            print(f"{name}: {value:.2f} ({low:.2f} to {high:.2f})")
    except (BackboneError, DataError, VideoError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
