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
    from training.run import entry

    entry.begin()
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; nothing is looked up anywhere

import argparse

from training.data import DataError
from training.data.clips import ClipFolder
from training.data.video import VideoError
from training.evaluation.backbones import BackboneError, add_arguments, features_of, load_networks
from training.evaluation.measure import Figure
from training.evaluation.report import write_report
from training.run import console
from training.run.console import between
from training.run.folder import RunFolderError, require_writable, told_of_disk
from training.run.packages import MissingPackageError
from training.run.precision import pick_device


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generated", type=console.path, required=True, metavar="FOLDER", help="the clips to measure")
    add_arguments(parser)
    parser.add_argument("--frames", type=between(1, 1024), default=16, help="of each clip (default: 16)")
    parser.add_argument(
        "--stride", type=between(1, 1024), default=1, help="frames of a video from one to the next (default: 1)"
    )
    parser.add_argument("--height", type=between(8, 8192), default=256, help="pixels (default: 256)")
    parser.add_argument("--width", type=between(8, 8192), default=256, help="pixels (default: 256)")
    parser.add_argument(
        "--out", type=console.path, metavar="FOLDER", help="where report.json and report.md go (default: the clips' folder)"
    )
    args = parser.parse_args(argv)
    if not (args.i3d or args.videomae or args.clip):
        parser.error("expected a network to measure by, found none; name one with --i3d, --videomae or --clip")
    if (args.i3d or args.videomae) and not args.real:
        parser.error("expected real clips beside --i3d and --videomae, found none; name a folder with --real")
    return args


def evaluate(args: argparse.Namespace) -> dict[str, Figure]:
    """The figures that are asked for, which are written down too; one of the errors named in `main`."""
    out = args.out or args.generated
    require_writable(out)  # before minutes of measuring
    networks = load_networks(args, pick_device())
    size = args.frames, args.height, args.width, args.stride
    made = ClipFolder(args.generated, *size)
    real = ClipFolder(args.real, *size) if networks.distances else None
    count, reference = 0, {}
    if real is not None:
        count = min(len(made), len(real))
        if count < 2:
            raise DataError(
                f"Expected 2 clips or more in {args.generated} and {args.real}, found {count} in one of them; add some."
            )
        reference = {
            name: features_of(net, real.read, count, f"{name}: {args.real}") for name, net in networks.distances.items()
        }
    figures = networks.figures(networks.measure(made.read, made.captions, count), reference)
    about = {
        "clips": f"{len(made)} of {args.generated}"
        + (f", distances from the first {count} to as many of {args.real}" if real else ""),
        "frames": f"{args.frames} of {args.width}x{args.height}, stride {args.stride}",
        **networks.described,
    }
    with told_of_disk(out):
        out.mkdir(parents=True, exist_ok=True)
        write_report(out, "Clips, measured by public networks", {args.generated.name: figures}, {}, about)
    return figures


def main(argv: list[str] | None = None) -> int:
    """0, or 1 after a sentence on stderr; argparse leaves with 2."""
    args = parse(argv)
    console.set_up()
    try:
        for name, (value, low, high) in evaluate(args).items():
            print(f"{name}: {value:.2f} ({low:.2f} to {high:.2f})")
    except (BackboneError, DataError, MissingPackageError, RunFolderError, VideoError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    entry.run(main)
