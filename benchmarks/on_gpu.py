"""What a GPU does with sampling and training, in five minutes: `python benchmarks/on_gpu.py`.

One table: the speed of plain matrix products; student, teacher and diffusers' pipeline, with and without compiling; the VAE; every phase
of training by two configurations, with launches, kernel times and memory beside the plan; the largest kernels; and training/distill.py on
the miniature in each mode beside a CPU's. A part that fails says so in the table, and the next one begins; so does one whose time is up.
Networks of SD1.5's shape have random weights. It needs torch, diffusers, transformers, einops, pydantic, pydantic-settings, PyYAML and
tqdm; the miniature also accelerate and tensorboard. Without a GPU all of it runs in small, to see that it runs.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository in place of this folder: runs from anywhere
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; nothing is looked up anywhere

import argparse
import contextlib
import dataclasses
import json
import logging
import multiprocessing
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial

import diffusers
import torch

from benchmarks import gpu_miniature, gpu_parts
from benchmarks.gpu_parts import CARD_24, FULL, SMALL, Row, Session
from benchmarks.kernels import Kernels
from benchmarks.report import table
from training.run import console
from training.run.console import between
from training.run.precision import free_bytes, pick_device

logger = logging.getLogger("benchmarks")
ROOT = Path(__file__).resolve().parents[1]

CONFIGURATIONS = {  # name: its file, and the bytes that it is fitted into, None for this GPU's own
    "sd15_24gb.yaml": ("sd15_24gb.yaml", None),
    "sd15.yaml": ("sd15.yaml", None),
    "sd15_24gb.yaml on 24 GB": ("sd15_24gb.yaml", CARD_24),
}
# name: (function, seconds that it may take, seconds that are kept for it); memory plans are made beside those before training
PARTS: dict[str, tuple[Callable[[Session], Iterator[Row]], int, int]] = {
    "ceilings": (gpu_parts.ceilings, 15, 5),
    "sampling": (gpu_parts.sampling, 45, 25),
    "an evaluation": (gpu_parts.profiled, 15, 5),
    "compiled": (gpu_parts.compiled, 60, 30),
    **{name: (gpu_parts.training(name, file), 50, 25) for name, (file, _) in CONFIGURATIONS.items()},
    "decoders": (gpu_parts.decoders, 45, 10),
    "miniature": (gpu_miniature.miniature, 75, 45),
    "the teacher, compiled": (gpu_parts.teacher_compiled, 75, 1),
}
SECONDS = 285  # of all, with the imports before it five minutes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny networks, as without a GPU")
    parser.add_argument("--seconds", type=between(10, 3600), default=SECONDS, help="for all of it (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS], help="some of them only")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER", help="default: %(default)s"
    )
    args = parser.parse_args(argv)
    device = pick_device()
    size = SMALL if args.small or device.type != "cuda" else FULL
    session = Session(device, size)
    report = partial(write_report, args.out, about(session))
    with planning(session, [name for name in CONFIGURATIONS if name in args.parts]):
        rows = measure(session, args.parts, args.seconds, report)
    print(report(rows, session.kernels).read_text(encoding="utf-8"))
    return 0


def about(session: Session) -> dict[str, str]:
    device, size = session.device, session.size
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, in small",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "clips": f"{size.frames} frames of {size.side}x{size.side}; the teacher in {size.teacher_steps} guided steps",
    }


@contextlib.contextmanager
def planning(session: Session, names: list[str]) -> Iterator[None]:
    """Makes the memory plans of configurations in processes beside the first parts."""
    with multiprocessing.get_context("spawn").Pool(len(names) or 1) as pool:  # ends its processes with the block
        for name in names:
            file, memory = CONFIGURATIONS[name]
            memory = memory or free_bytes(session.device)
            session.plans[name] = pool.apply_async(gpu_parts.planned, (file, memory, session.size))
        yield


def measure(session: Session, names: list[str], seconds: float, report: Callable) -> list[Row]:
    """The rows of these parts. What has failed or found no time is a row too; after each part all of it is written."""
    ends, rows = time.monotonic() + seconds, []
    for i, name in enumerate(names):
        part, most, _ = PARTS[name]
        limit = ends - time.monotonic() - sum(PARTS[later][2] for later in names[i + 1 :])
        if session.size is FULL:
            limit = min(most, limit)
        logger.info("%s: %.0f seconds at most", name, limit)
        try:
            with limited(limit):
                for row in part(session):
                    rows.append(row)
                    logger.info("  %s", in_words(row))
        except OutOfTimeError:
            rows.append(Row(name, "the rest", note=f"left out: its {max(limit, 0):.0f} seconds were over"))
        except Exception as error:  # whatever it is, the other parts are measured
            rows.append(Row(name, "the rest", note=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        with contextlib.suppress(Exception):
            session.free()
        report(rows, session.kernels)
    return rows


class OutOfTimeError(BaseException):
    """Ends a part at its limit; no part catches it."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """OutOfTimeError in the block after so many seconds; at once where there are none."""
    if seconds <= 0:
        raise OutOfTimeError
    if not hasattr(signal, "setitimer"):  # Windows knows none: a part takes what it takes
        yield
        return

    def end(*_):
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write_report(folder: Path, about: Mapping[str, str], rows: list[Row], kernels: Mapping[str, Kernels]) -> Path:
    """Writes the report as .json and .md; the .md's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{about['date']}-on-gpu{'-small' if 'in small' in about['device'] else ''}.md"
    found = {
        "about": dict(about),
        "rows": [dataclasses.asdict(row) for row in rows],
        "kernels": {name: dataclasses.asdict(k) | {"by_name": k.largest(50)} for name, k in kernels.items()},
    }
    path.with_suffix(".json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path.write_text(markdown(about, rows, kernels), encoding="utf-8")
    return path


HEAD = ["what", "s", "TFLOP", "TFLOP/s", "of the ceiling", "launches", "kernels, s", "GiB (plan)", "note"]


def markdown(about: Mapping[str, str], rows: list[Row], kernels: Mapping[str, Kernels]) -> str:
    parts = ["# What a GPU does", "\n".join(f"- {key}: {value}" for key, value in about.items())]
    parts += ["Of training all figures are of a clip.", table(["part", *HEAD], [[row.part, *cells(row)] for row in rows])]
    compared = ratios(rows)
    if compared:
        parts.append(table(["ratio", "found", "goal"], compared))
    for name, found in kernels.items():
        parts.append(f"Kernels of {name}: {found.count} in {found.seconds:.4g} s. The largest:")
        largest = [[f"`{kernel[:90]}`", f"{s * 1e3:.3g}", str(n)] for kernel, (s, n) in found.largest().items()]
        parts.append(table(["kernel", "ms", "calls"], largest))
    return "\n\n".join(parts) + "\n"


def cells(row: Row) -> list[str]:
    rate = row.operations / row.seconds if row.operations and row.seconds else None
    peak = "" if row.peak is None else f"{row.peak / 2**30:.1f}"
    return [
        row.what,
        _figure(row.seconds),
        _figure(row.operations, 1e12),
        _figure(rate, 1e12),
        f"{rate / row.ceiling:.0%}" if rate and row.ceiling else "",
        "" if row.launches is None else f"{row.launches:,.0f}",
        _figure(row.kernel_seconds),
        peak + ("" if row.planned is None else f" ({row.planned / 2**30:.1f})"),
        row.note,
    ]


def _figure(value: float | None, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.3g}"


def in_words(row: Row) -> str:
    return "; ".join(f"{head} {cell}" if head != "what" else cell for head, cell in zip(HEAD, cells(row), strict=True) if cell)


def ratios(rows: list[Row]) -> list[list[str]]:
    """What goals are stated in, of the rows that are there."""
    seconds = {row.what: row.seconds for row in rows if row.part == "sampling" and row.seconds}
    ceiling = {row.what: row.ceiling for row in rows}
    operations = {row.what: row.operations for row in rows}
    found = []
    for suffix in ("", ", compiled", ", compiled and recorded"):
        pair = f"teacher{suffix}", f"student{suffix}"
        if all(name in seconds for name in pair):
            found.append([f"teacher / student, UNet{suffix}", f"{seconds[pair[0]] / seconds[pair[1]]:.3g}", "≥ 12"])
    if "student, frames" in seconds:
        floor = operations["student, frames"] / ceiling["student, frames"]
        found.append(["student to frames / its floor", f"{seconds['student, frames'] / floor:.3g}", "≤ 2.5"])
    goals = {"sd15.yaml": "≥ 35%", "sd15_24gb.yaml on 24 GB": "≥ 25%", "sd15_24gb.yaml": "≥ 35%"}
    for row in rows:
        if row.part in goals and row.what == "SDM and ADM" and row.seconds and row.operations and row.ceiling:
            share = row.operations / row.seconds / row.ceiling
            found.append([f"{row.part}, SDM and ADM, of the ceiling", f"{share:.0%}", goals[row.part]])
    return found


if __name__ == "__main__":
    console.set_up()
    sys.exit(main())
