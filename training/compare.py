"""Compares ways to few steps, on teachers that know less and more: `python training/compare.py [--teachers tenth third own]`.

Every way is trained from the same teacher on the same clips for as many updates, with several seeds, and measured on the miniature world's
held-out prompts: AVDM2, each of its losses alone, its warm-up alone, and three peers. Where several teachers are named, a plot shows what
each way makes of how much its teacher knows.

Runs and rows are kept as soon as they are there; the same command goes on where it was stopped.
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
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime

import torch

from avdm2_nodes.diffusion.schedules import trailing_timesteps
from avdm2_nodes.diffusion.unets import video_predictor
from avdm2_nodes.files.containers import FileFormatError
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.stack import Stack, load_stack
from avdm2_nodes.files.student import read_student
from avdm2_nodes.files.student_unet import student_unet
from training.distill import distil
from training.evaluation.feature_net import content_hash, load_features_of
from training.evaluation.measure import Figure
from training.evaluation.pictures import plot_gain
from training.evaluation.rows import Bench, Method, student_method, teacher_method
from training.evaluation.table import Table, require_page
from training.method.errors import EXPECTED_ERRORS
from training.run import console
from training.run.checkpoint import Checkpoints, write_atomically, write_text_atomically
from training.run.command_line import load_config
from training.run.config import MODEL, DistillConfig, to_yaml
from training.run.console import between, scale
from training.run.folder import RunFolder, require_writable, told_of_disk
from training.run.packages import needs
from training.run.precision import pick_device
from training.run.sections import ROOT

logger = logging.getLogger("compare")

OWN = "own"  # the motion modules of the model's folder itself; other teachers are folders in its `teachers`
SHARED = "warm-up only"  # the run that others begin as, and go on from
FLOOR, TAUGHT = "real clips (VAE)", "teacher 25 steps, guided"


def ways(recipe: DistillConfig) -> dict[str, list[str]]:
    """The options of each row's training: the recipe, with one of its parts left out or replaced, for as many updates."""
    as_long = str(recipe.warmup.updates + recipe.run.updates)
    at_once = ["--warmup.updates", "0", "--run.updates", as_long]
    return {
        SHARED: ["--run.updates", "0"],
        "warm-up alone for as long": ["--run.updates", "0", "--warmup.updates", as_long],
        "SDM only": ["--adm.weight", "0"],
        "ADM only": ["--sdm.weight", "0"],
        "AVDM2": [],
        "AVDM2 without warm-up": at_once,
        "consistency (AnimateLCM)": ["--method.kind", "consistency", *at_once],
        "progressive (Lightning)": ["--method.kind", "progressive", "--adm.pool", "0"],
        "motion consistency (MCM)": ["--method.kind", "motion-consistency", *at_once],
        "AVDM2, 2 steps": ["--student.steps", "999,499"],
        "AVDM2, 1 step": ["--student.steps", "999"],
    }


GO_ON = ("SDM only", "ADM only", "AVDM2")  # those whose first updates are the shared run's


def _name(text: str) -> str:
    if text in ("", ".", "..") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"expected the name of a folder, found {text!r}")
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config_help = "the recipe (default: the main job's); its data, model and evaluation bear on all rows"
    parser.add_argument("--config", type=console.path, metavar="FILE", help=config_help)
    known = ", ".join(sorted(path.name for path in (MODEL / "teachers").iterdir()))
    teacher_help = f"motion modules in the model's folder of teachers ({known}), or {OWN}, the model's own (default)"
    parser.add_argument("--teachers", nargs="+", type=_name, default=[OWN], metavar="NAME", help=teacher_help)
    every = list(ways(load_config([])))
    parser.add_argument(
        "--rows", nargs="+", default=every, choices=every, metavar="ROW", help=f"only these of: {'; '.join(every)}"
    )
    parser.add_argument("--seeds", type=between(1, 100), default=3, help="training seeds of a row (default: 3)")
    parser.add_argument("--clips", type=between(6, 2**20), default=1024, help="clips a row and seed (default: 1024)")
    parser.add_argument("--guidance", type=scale, default=3.0, help="CFG scale of the teachers' own rows (default: 3)")
    parser.add_argument(
        "--out", type=console.path, default=ROOT / "runs" / "comparison", help="where runs, rows and reports are kept"
    )
    page_help = "a page whose sections <!-- comparison NAME -->, one a teacher, are to be replaced"
    parser.add_argument("--page", type=console.path, metavar="FILE", help=page_help)
    args = parser.parse_args(argv)
    # All this before hours of training.
    needs("matplotlib", "to plot the table")
    require_writable(args.out)
    require_page(args.page, [section_of(name) for name in args.teachers])
    recipe = ["--config", str(args.config)] if args.config else []
    tables = {name: compare(name, recipe, args) for name in args.teachers}
    plot_gain(tables, args.out / "gain.png", teacher=TAUGHT, floor=FLOOR)
    logger.info("Figures: %s", ", ".join(str(args.out / name / "report.md") for name in tables))


def section_of(teacher: str) -> str:
    """Of a page, in which the rows of a teacher go."""
    return f"comparison {teacher}"


def compare(teacher: str, recipe: list[str], args: argparse.Namespace) -> dict[str, dict[str, Figure]]:
    """The rows of one teacher, trained and measured as far as they are not there; its report, and its section of the page."""
    config = load_config(of_teacher(teacher, recipe))
    stack, device = load_stack(config.model.teacher, config.model.motion), pick_device()
    for unet in (stack.image_unet, stack.teacher):
        unet.to(device)
    bench, folder = Bench(stack, load_features_of(stack), args.clips, device=device), args.out / teacher
    net = content_hash(stack.folder / "feature_net.safetensors")
    of = hashlib.sha256(json.dumps([weights_hash(stack.teacher), args.guidance, net]).encode()).hexdigest()[:12]
    table = Table(bench, folder / f"{of}-{args.clips}")
    table.add(FLOOR, bench.floor_clips)
    table.add("real clips, another draw", lambda: bench.real_clips(2))  # the metrics' own noise
    predict = video_predictor(stack.teacher)
    table.add_method(teacher_method(TAUGHT, predict, stack, 25, args.guidance))
    table.add_method(teacher_method("teacher 4 steps, guided", predict, stack, 4, args.guidance))
    table.add_method(student_method("teacher 4 steps, as a student", predict, trailing_timesteps(4)))
    for row in args.rows:
        runs = [run_of(row, teacher, recipe, seed, args.out) for seed in range(args.seeds)]
        table.add_runs(
            row, [new_method(f"{row}, seed {i}", stack, file) for i, file in enumerate(runs)], [seconds_of(f) for f in runs]
        )
    about = {
        "clips a row and seed": args.clips,
        "training": f"{config.warmup.updates + config.run.updates} updates of {config.run.batch} clips",
        "students": "the mean of the training seeds, and their range",
        "teacher": f"DDIM, trailing spacing, guidance {args.guidance:g}",
        "feature net": f"sha256 {net[:12]}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {device.type}",
        "torch": torch.__version__,
    }
    table.write(about, args.page, section_of(teacher))
    with told_of_disk(folder):
        for name in ("report.md", "clips.png"):
            write_atomically(folder / name, lambda temporary, name=name: shutil.copy(table.folder / name, temporary))
    return table.rows


def of_teacher(name: str, recipe: Sequence[str]) -> list[str]:
    """The recipe's options, with the motion modules of a teacher."""
    motion = load_config([*recipe]).model.teacher / "teachers" / name
    return [*recipe, *([] if name == OWN else ["--model.motion", str(motion)])]


def new_method(name: str, stack: Stack, file: Path) -> Method:
    """A trained student, as it samples."""
    student = read_student(file)
    unet = student_unet(student, stack.image_unet).to(next(stack.image_unet.parameters()).device)
    return student_method(name, video_predictor(unet), student.info.timesteps, student.info.chain)


def run_of(row: str, teacher: str, recipe: Sequence[str], seed: int, out: Path) -> Path:
    """The student of a row, trained unless that was done before; where it can be, from the shared run on."""
    folder = out / teacher / "runs" / f"{''.join(c if c.isalnum() else '-' for c in row)}-{seed}"
    base = [*of_teacher(teacher, recipe), "--run.folder", str(folder), "--run.seed", str(seed)]
    config = load_config([*base, *ways(load_config([*recipe]))[row]])
    if row in GO_ON and not folder.exists():
        branch(run_of(SHARED, teacher, recipe, seed, out).parent, folder, config)
    file = folder / "student.safetensors"
    if not file.exists():
        with RunFolder(folder) as run:
            distil(config, run, report=False)
    return file


def branch(source: Path, folder: Path, config: DistillConfig) -> None:
    """Begins a run in `folder` from another's newest checkpoint, whose updates it would have made just so.

    That holds where the two differ in what comes later only: all randomness is keyed by seed and sample.
    """
    newest = Checkpoints(source / "checkpoints", keep=1).paths()[-1]
    with told_of_disk(folder):
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(source / "stats.jsonl", folder / "stats.jsonl")
        write_text_atomically(folder / "config.yaml", to_yaml(config))
        write_atomically(folder / "checkpoints" / newest.name, lambda temporary: shutil.copy(newest, temporary))


def seconds_of(file: Path) -> float:
    """Of a student's updates, the wait for data left out."""
    lines = [json.loads(line) for line in (file.parent / "stats.jsonl").read_text().splitlines()]
    return sum(line["update_seconds"] - line["data_seconds"] for line in lines)


if __name__ == "__main__":
    console.set_up()
    entry.run(main, (*EXPECTED_ERRORS, FileFormatError, FileNotFoundError), "Interrupted; the same command goes on.")
