"""Measures the shipped student beside its teacher, and what each loss buys: `python training/evaluate.py [--ablations]`.

Every row is kept as soon as it is measured; the same command goes on where it was stopped.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository in place of this folder: runs from anywhere
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; nothing is looked up anywhere

import argparse
import logging
import platform
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import numpy as np
import torch

from avdm2_nodes.diffusion.schedules import trailing_timesteps
from avdm2_nodes.diffusion.stack import Stack, load_stack
from avdm2_nodes.diffusion.student_file import read_student, student_timesteps, student_unet
from avdm2_nodes.diffusion.unets import video_predictor
from training import console
from training.checkpoint import Checkpoints, write_atomically
from training.config import ROOT, DistillConfig, load_config, to_yaml
from training.distill import EXPECTED_ERRORS, distil, feature_net
from training.evaluation.feature_net import content_hash
from training.evaluation.measure import BETTER, Figure
from training.evaluation.pictures import animated, contact_sheet, plot_table
from training.evaluation.report import markdown_table, write_report
from training.evaluation.rows import Bench, Method, kept, steps_in_words, student_method, teacher_method
from training.precision import pick_device
from training.run_folder import RunFolder

logger = logging.getLogger("evaluate")

# The short recipe (the main job's settings) with one of its parts left out or replaced, everything else the same. The first is what
# the others share, and go on from.
ABLATIONS = {
    "warm-up only": ["--run.updates", "0"],
    "warm-up alone for as long": ["--run.updates", "0", "--warmup.updates", "130"],
    "SDM only": ["--adm.weight", "0"],
    "ADM only": ["--sdm.weight", "0"],
    "AVDM2": [],
}
PLOTTED = ("accuracy", "Fréchet distance", "KID", "motion error", "coverage", "diversity")
SHOWN = 4  # prompts in the pictures
_BEGIN, _END = "<!-- results -->", "<!-- end of results -->"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "miniature", help="the teacher's stack")
    parser.add_argument("--student", type=Path, help="student file (default: the stack's student.safetensors)")
    parser.add_argument("--clips", type=int, default=1024, help="clips a row")
    parser.add_argument("--guidance", type=float, default=3.0, help="CFG scale of the teacher")
    parser.add_argument("--ablations", action="store_true", help="train and measure the short recipe, whole and with one loss")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds of the ablations")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "evaluation", help="where rows and reports are kept")
    parser.add_argument("--readme", type=Path, help="a Markdown file whose results section is to be replaced")
    args = parser.parse_args(argv)

    stack = load_stack(args.model)
    device = pick_device()
    for part in (stack.vae, stack.text_encoder, stack.image_unet, stack.teacher):
        part.to(device)
    features = args.model / "feature_net.safetensors"
    bench = Bench(stack, feature_net(stack), args.clips)
    student_file = args.student or args.model / "student.safetensors"

    about = {
        "clips a row": args.clips,
        "prompts": "held-out combinations of the caption grammar, the same prompts and seeds in every row",
        "teacher": f"DDIM, trailing spacing, guidance {args.guidance:g}",
        "student": f"{student_file.name}, sha256 {content_hash(student_file)[:12]}",
        "feature net": f"sha256 {content_hash(features)[:12]}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {device.type}",
        "torch": torch.__version__,
    }
    # Rows belong to what they were measured with: another student, net or number of clips starts a folder of its own.
    key = content_hash(student_file)[:8] + content_hash(features)[:8]
    folder = args.out / f"{key}-{args.clips}-{args.guidance:g}"
    table = Table(bench, folder)
    table.add("real clips (VAE)", bench.floor_clips)
    for method in teacher_methods(stack, args.guidance) + student_methods(stack, student_file):
        table.add_method(method)
    if args.ablations:
        for name, options in ABLATIONS.items():
            table.add_runs(f"{name}, short", [ablation(stack, name, options, seed, args.out) for seed in range(args.seeds)])
    table.write(about, args.readme)
    logger.info("Figures: %s", folder / "report.md")


def teacher_methods(stack: Stack, guidance: float) -> list[Method]:
    predict = video_predictor(stack.teacher)
    return [
        teacher_method("teacher 25 steps, guided", predict, stack, 25, guidance),
        teacher_method("teacher 4 steps, guided", predict, stack, 4, guidance),
        teacher_method("teacher 2 steps, guided", predict, stack, 2, guidance),
        teacher_method("teacher 4 steps, no guidance", predict, stack, 4, 1.0),
        student_method("teacher 4 steps, as a student", predict, trailing_timesteps(4)),  # where distillation begins
    ]


def student_methods(stack: Stack, file: Path, steps: Sequence[int] = (1, 2, 4, 8), name: str = "student") -> list[Method]:
    student = read_student(file)
    unet = student_unet(student, stack.image_unet).to(next(stack.image_unet.parameters()).device)
    predict = video_predictor(unet)
    return [student_method(f"{name} {steps_in_words(n)}", predict, student_timesteps(student.info.timesteps, n)) for n in steps]


def ablation(stack: Stack, name: str, options: list[str], seed: int, out: Path) -> Method:
    """The short recipe with `options`, trained here unless that was done before; its first updates are those of the warm-up only."""
    folder = out / "ablations" / f"{name.lower().replace(' ', '-')}-{seed}"
    config = load_config(["--run.folder", str(folder), "--run.seed", str(seed), "--model.teacher", str(stack.folder), *options])
    first = next(iter(ABLATIONS))
    if name != first and not folder.exists():
        ablation(stack, first, ABLATIONS[first], seed, out)
        branch(out / "ablations" / f"{first.lower().replace(' ', '-')}-{seed}", folder, config)
    file = folder / "student.safetensors"
    if not file.exists():
        with RunFolder(folder) as run:
            distil(config, run, report=False)
    return student_methods(stack, file, [len(config.student.steps)], f"{name}, seed {seed},")[0]


def branch(source: Path, folder: Path, config: DistillConfig) -> None:
    """Begins a run in `folder` from another's newest checkpoint, whose updates it would have made just so.

    That holds where the two differ in what comes later only: all randomness is keyed by seed and sample.
    """
    newest = Checkpoints(source / "checkpoints", keep=1).paths()[-1]
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    write_atomically(folder / "checkpoints" / newest.name, lambda temporary: shutil.copy(newest, temporary))


class Table:
    """Rows, each measured once and kept in `folder`."""

    def __init__(self, bench: Bench, folder: Path):
        self.bench, self.folder = bench, folder
        self.rows: dict[str, dict[str, Figure]] = {}
        self.costs: dict[str, dict] = {}
        self.shown: dict[str, list[np.ndarray]] = {}
        self.reference = kept(self._path("reference"), bench.reference)

    def add(self, name: str, make: Callable[[], np.ndarray]) -> None:
        """A row of the clips that `make` gives."""
        self._add(name, lambda: (make(), 0.0))

    def add_method(self, method: Method) -> None:
        """A row of the clips that a method samples, with its cost."""
        seconds = self._add(method.name, lambda: self.bench.sample(method))
        self.costs[method.name] = {"evaluations": method.evaluations, "seconds": seconds}

    def add_runs(self, name: str, methods: list[Method]) -> None:
        """One row for several training seeds: the mean of each figure, and the range of the seeds as its interval."""
        for method in methods:
            self.add_method(method)
        runs = [self.rows.pop(method.name) for method in methods]
        self.costs[name] = {"evaluations": methods[0].evaluations, "seconds": self.costs[methods[0].name]["seconds"]}
        self.shown[name] = self.shown[methods[0].name]
        for method in methods:
            del self.costs[method.name], self.shown[method.name]
        values = {key: [run[key][0] for run in runs] for key in runs[0]}
        self.rows[name] = {key: (float(np.mean(v)), min(v), max(v)) for key, v in values.items()}

    def write(self, about: dict, readme: Path | None) -> None:
        """report.json, report.md, clips.png, clips.webp, plot.png; and the table into `readme`, between its markers."""
        write_report(self.folder, "What distillation buys", self.rows, self.costs, about)
        captions = self.bench.prompts[:SHOWN]
        contact_sheet(self.shown, captions, self.folder / "clips.png")
        animated(self.shown, self.folder / "clips.webp", captions=captions)
        plotted = {name: {key: row[key] for key in PLOTTED if key in row} for name, row in self.rows.items()}
        plot_table(plotted, self.folder / "plot.png", better=BETTER)
        if readme is not None:
            text = readme.read_text()
            head, _, rest = text.partition(_BEGIN)
            _, _, tail = rest.partition(_END)
            facts = "; ".join(f"{key}: {value}" for key, value in about.items())
            readme.write_text(f"{head}{_BEGIN}\n{markdown_table(self.rows, self.costs)}\n{facts}.\n{_END}{tail}")

    def _add(self, name: str, make: Callable[[], tuple[np.ndarray, float]]) -> float:
        def measured() -> dict[str, np.ndarray]:
            logger.info("Measuring: %s", name)
            clips, seconds = make()
            return self.bench.measure(clips) | {"shown": clips[:SHOWN], "seconds": np.array([seconds])}

        row = kept(self._path(name), measured)
        self.shown[name] = list(row["shown"])
        self.rows[name] = self.bench.figures(row, self.reference)
        return float(row["seconds"][0])

    def _path(self, name: str) -> Path:
        return self.folder / "rows" / ("".join(c if c.isalnum() else "-" for c in name) + ".safetensors")


if __name__ == "__main__":
    console.set_up()
    try:
        main()
    except (*EXPECTED_ERRORS, FileNotFoundError) as error:
        sys.exit(str(error))
