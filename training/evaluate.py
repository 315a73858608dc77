"""Measures a student beside its teacher: `python training/evaluate.py [--student FILE]`, by default the shipped one.

Where the teacher's folder holds the net of a rendered world, as the miniature's does, that world's oracle reads clips of held-out
prompts. Any other teacher is measured on the captions of real videos by public networks, each from a local path:
`--model CHECKPOINT --motion FILE --student FILE --real FOLDER --i3d FILE --videomae FOLDER --clip FOLDER`.

Every row is kept as soon as it is measured; the same command goes on where it was stopped.
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
import hashlib
import json
import logging
import platform
from collections.abc import Sequence
from datetime import UTC, datetime

import torch

from avdm2_nodes.diffusion.samplers import student_timesteps
from avdm2_nodes.diffusion.schedules import trailing_timesteps
from avdm2_nodes.diffusion.unets import video_predictor
from avdm2_nodes.files.containers import FileFormatError
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.peers import is_peer, load_peer
from avdm2_nodes.files.stack import Stack, load_stack
from avdm2_nodes.files.student import Student, read_student
from avdm2_nodes.files.student_info import StudentInfo
from avdm2_nodes.files.student_unet import student_unet
from training.data.clips import ClipFolder
from training.evaluation.backbones import BackboneError, add_arguments, load_networks
from training.evaluation.feature_net import content_hash, load_features_of
from training.evaluation.rows import Bench, Method, VideoBench, steps_in_words, student_method, teacher_method
from training.evaluation.table import Table, require_page
from training.method.errors import EXPECTED_ERRORS
from training.run import console
from training.run.config import MODEL, ROOT
from training.run.console import between, scale
from training.run.folder import require_writable
from training.run.packages import needs
from training.run.precision import pick_device

logger = logging.getLogger("evaluate")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_help = "the teacher: a diffusers folder or an SD1.5 checkpoint (default: the miniature)"
    parser.add_argument("--model", type=console.path, default=MODEL, metavar="PATH", help=model_help)
    parser.add_argument(
        "--motion", type=console.path, metavar="PATH", help="motion modules, where the teacher's folder has none"
    )
    parser.add_argument(
        "--tokenizer", type=console.path, metavar="FOLDER", help="CLIP's vocabulary, for a checkpoint in one file"
    )
    student_help = "student file, or an AnimateDiff-Lightning or AnimateLCM module (default: the teacher's student.safetensors)"
    parser.add_argument("--student", type=console.path, metavar="FILE", help=student_help)
    parser.add_argument("--clips", type=between(6, 2**20), default=1024, help="clips a row (default: 1024)")
    parser.add_argument("--guidance", type=scale, default=3.0, help="CFG scale of the teacher (default: 3)")
    parser.add_argument(
        "--out", type=console.path, default=ROOT / "runs" / "evaluation", help="where rows and reports are kept"
    )
    page_help = "a page, such as docs/results.md, whose tables are to be replaced"
    parser.add_argument("--page", type=console.path, metavar="FILE", help=page_help)
    add_arguments(parser)
    args = parser.parse_args(argv)

    # All this before hours of measuring.
    needs("matplotlib", "to plot the table")
    require_writable(args.out)
    require_page(args.page)
    device = pick_device()
    stack = load_stack(args.model, args.motion, tokenizer=args.tokenizer)
    for unet in (stack.image_unet, stack.teacher):
        unet.to(device)
    student_file = args.student or args.model / "student.safetensors"
    student = load_peer(student_file, stack.image_unet) if is_peer(student_file) else read_student(student_file)
    bench, measured_by = new_bench(args, stack, student.info, device)

    about = {
        "clips a row": len(bench.prompts),
        "teacher": f"DDIM, trailing spacing, guidance {args.guidance:g}",
        "student": f"{student_file.name}, sha256 {content_hash(student_file)[:12]}",
        **measured_by,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {device.type}",
        "torch": torch.__version__,
    }
    # Rows belong to what they were measured with: another student, teacher, network or number of clips starts a folder of its own.
    of = [weights_hash(stack.teacher), args.guidance, measured_by, str(args.real), bench.shape]
    key = content_hash(student_file)[:8] + hashlib.sha256(json.dumps(of).encode()).hexdigest()[:8]
    folder = args.out / f"{key}-{len(bench.prompts)}"
    table = Table(bench, folder)
    table.add("real clips (VAE)", bench.floor_clips)
    for method in teacher_methods(stack, args.guidance) + student_methods(stack, student):
        table.add_method(method)
    table.write(about, args.page)
    logger.info("Figures: %s", folder / "report.md")


def new_bench(
    args: argparse.Namespace, stack: Stack, student: StudentInfo, device: torch.device
) -> tuple[Bench | VideoBench, dict[str, str]]:
    """Who measures the rows, and that in words. The errors of the files that it is made of."""
    if args.real is None:
        net = load_features_of(stack)
        words = {
            "prompts": "held-out combinations of the caption grammar, the same prompts and seeds in every row",
            "feature net": f"sha256 {content_hash(stack.folder / 'feature_net.safetensors')[:12]}",
        }
        return Bench(stack, net, args.clips, device=device), words
    networks = load_networks(args, device)
    if not networks.described:
        raise BackboneError("Expected a network to measure by, found none; name one with --i3d, --videomae or --clip.")
    real = ClipFolder(args.real, student.frames, student.height, student.width)
    words = {"prompts": f"captions of {args.real.name}, {student.frames} frames of {student.width}x{student.height}"}
    return VideoBench(stack, networks, real, args.clips, device=device), words | networks.described


def teacher_methods(stack: Stack, guidance: float) -> list[Method]:
    predict = video_predictor(stack.teacher)
    return [
        teacher_method("teacher 25 steps, guided", predict, stack, 25, guidance),
        teacher_method("teacher 4 steps, guided", predict, stack, 4, guidance),
        teacher_method("teacher 2 steps, guided", predict, stack, 2, guidance),
        teacher_method("teacher 4 steps, no guidance", predict, stack, 4, 1.0),
        student_method("teacher 4 steps, as a student", predict, trailing_timesteps(4)),  # where distillation begins
    ]


def student_methods(stack: Stack, student: Student, steps: Sequence[int] = (1, 2, 4, 8), name: str = "student") -> list[Method]:
    info, device = student.info, next(stack.image_unet.parameters()).device
    predict = video_predictor(student_unet(student, stack.image_unet).to(device))
    return [
        student_method(f"{name} {steps_in_words(n)}", predict, student_timesteps(info.timesteps, n, info.chain), info.chain)
        for n in steps
    ]


if __name__ == "__main__":
    console.set_up()
    errors = (*EXPECTED_ERRORS, BackboneError, FileFormatError, FileNotFoundError)
    entry.run(main, errors, "Interrupted; the same command goes on.")
