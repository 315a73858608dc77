"""What an update launches on a GPU, counted on a CPU: `python benchmarks/launches.py [FILE ...]`.

For each configuration (default: both of SD1.5 on one GPU) and phase of its training, with one clip a part and with four: launches of
a clip, and how many of them only change the numbers' format. At SD1.5's depth with few channels, on which neither hangs; in bf16, with
checkpointing.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository in place of this folder: runs from anywhere

import argparse
from collections.abc import Iterator

import torch

from benchmarks.report import table
from training.cost.launches import Noise, casts, count_update, narrow_distillation
from training.method.loop import Phase, phase_of
from training.run.command_line import load_config
from training.run.config import ROOT, DistillConfig

CONFIGS = ROOT / "training" / "configs"
FRAMES = 2
SETTINGS = {
    "run.accumulate": 1, "run.precision": "bf16", "run.device": "cpu", "data.frames": FRAMES, "data.height": 64, "data.width": 64,
    "sdm.frames": 2, "model.lora_rank": 4, "model.gradient_checkpointing": "true",
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [CONFIGS / "sd15_24gb.yaml", CONFIGS / "sd15.yaml"]
    parser.add_argument(
        "files", nargs="*", type=Path, default=default, metavar="FILE", help="configurations of training/distill.py"
    )
    torch.set_num_threads(1)
    print(table(["configuration", "phase", "clips a part", "launches a clip", "casts a clip"], []))
    for file in parser.parse_args(argv).files:
        for row in counted(file):  # some seconds each
            print(f"| {' | '.join(row)} |", flush=True)


def counted(file: Path) -> Iterator[list[str]]:
    """A row for each phase and size of a part."""
    for clips in (4, 1):
        settings = [word for key, value in ({"run.batch": clips} | SETTINGS).items() for word in (f"--{key}", str(value))]
        config = load_config(["--config", str(file), *settings])
        run, data = narrow_distillation(config), Noise(FRAMES)
        for phase, step in first_of_each(config).items():
            counts = count_update(run, data, step)
            words = ("SDM" + phase.adm * " and ADM") if phase.matching else "warm-up" + phase.critics * " with critics"
            numbers = counts.total() / clips, casts(counts) / clips
            yield [file.name, words, str(clips), *(f"{n:,.0f}" for n in numbers)]


def first_of_each(config: DistillConfig) -> dict[Phase, int]:
    """The first update of each phase."""
    updates = range(config.warmup.updates + config.run.updates)
    return {phase_of(config, step): step for step in reversed(updates)}


if __name__ == "__main__":
    main()
