"""How fast sampling and training are on this machine: `python benchmarks/run.py`. What it cannot run it says was not measured.

In one run, so that they compare: student against teacher, both against diffusers' own pipeline with the same weights and steps, and
against the operations counted at the speed of plain matrix products; an update of each way of training; the cost of an evaluation by
frames, resolution and batch. SD1.5 has random weights: its speed does not depend on them.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository in place of this folder: runs from anywhere
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; nothing is looked up anywhere

import argparse
import gc
import logging
import platform
from datetime import UTC, datetime

import diffusers
import torch

from avdm2_nodes.diffusion.precision import decoding_dtype, sampling_dtype
from benchmarks import nodes, training_modes
from benchmarks.cost import decoder_operations, sd15_table, unet_operations
from benchmarks.report import MISSING, write_report
from benchmarks.subjects import Subject, evaluations, miniature, sd15
from training.cost.memory_plan import memory_plan
from training.run import console
from training.run.command_line import load_config
from training.run.config import ROOT
from training.run.console import between
from training.run.packages import MissingPackageError
from training.run.precision import pick_device, uses_bf16
from training.run.timing import interleaved, matmul_ceiling

logger = logging.getLogger("benchmarks")

MINIATURE, CONFIGS = ROOT / "miniature", ROOT / "training" / "configs"
FULL_SIZE_MEMORY = {"cuda": 20 * 2**30, "cpu": 8 * 2**30}  # bytes that SD1.5 takes here, with room
AXES = {  # of one evaluation: frames, side in pixels, clips
    "miniature": {"frames": (2, 4, 8, 16), "resolution": (32, 64, 96, 128), "batch": (1, 2, 4, 8)},
    "SD1.5": {"frames": (4, 8, 16, 24, 32), "resolution": (256, 384, 512, 640, 768), "batch": (1, 2, 4)},
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=between(1, 1000), default=7, help="of each measurement (default: 7)")
    parser.add_argument("--threads", type=between(1, 1024), help="CPU threads (default: torch's choice)")
    parser.add_argument("--small", action="store_true", help="leave out networks of SD1.5's size")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER", help="default: %(default)s"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = pick_device()
    results = {"about": about(device, args.repetitions)}
    logger.info("The speed of matrix products")
    results["ceiling"] = {
        name_of(dtype): matmul_ceiling(device, dtype)
        for dtype in {sampling_dtype(device), torch.float32, training_dtype(device)}
    }
    logger.info("Counting the operations of SD1.5")
    results["counted"] = sd15_table()
    results["planned"] = {name: planned(CONFIGS / name) for name in ("sd15_24gb.yaml", "sd15.yaml")}

    subject = miniature(MINIATURE, device)
    results["sampling"] = [sampling(subject, args.repetitions)]
    scaled = subject
    shape = (16, 512) if device.type == "cuda" else (8, 256)
    reason = "left out by --small" if args.small else lacks_room(device)
    if reason is None:
        steps = () if device.type == "cuda" else ((1, 1),)  # a CPU would take minutes for all 25
        subject = sd15(device, *shape, *steps)
        results["sampling"].append(sampling(subject, args.repetitions if subject.whole else max(1, args.repetitions // 3)))
        scaled = subject if device.type == "cuda" else scaled
    else:
        results["sampling"].append(not_measured(*shape, reason))
    if device.type != "cuda":
        results["sampling"].append(not_measured(16, 512, "needs a GPU"))
    results["scaling"] = scaling(scaled, args.repetitions)
    del subject, scaled
    gc.collect()
    results["training"] = training(device, args.repetitions)

    name = f"{results['about']['date']}-{device.type}"
    path = write_report(results, args.out, name)
    print(path.read_text(encoding="utf-8"))
    logger.info("Kept: %s, .json and .png beside it", path)
    return 0


def planned(file: Path) -> dict[str, int]:
    """Bytes that a run of these settings would take, by name, counted without numbers; none where a package for it is not installed."""
    logger.info("Counting the memory of %s", file.name)
    try:
        return memory_plan(load_config(["--config", str(file)])).rows
    except MissingPackageError as error:
        logger.warning("%s; the plan is left out.", error)
        return {}


def about(device: torch.device, repetitions: int) -> dict:
    """When, on what and with what this was measured."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"cuda, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "cpu",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "load before the run": f"{os.getloadavg()[0]:.1f} of {os.cpu_count()} cores" if hasattr(os, "getloadavg") else MISSING,
        "repetitions": f"{repetitions} after one to warm up, in turns",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "nodes": f"{MISSING}: {missing}" if (missing := nodes.why_not()) else f"in ComfyUI {nodes.version()}",
        "python": platform.python_version(),
    }


def processor() -> str:
    """The kind of CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{named}, bfloat16 instructions" if training_dtype(torch.device("cpu")) == torch.bfloat16 else named


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def training_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if uses_bf16(device) else torch.float32


def lacks_room(device: torch.device) -> str | None:
    """Why networks of SD1.5's size cannot be measured here; None where they can."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        info = Path("/proc/meminfo")
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines()) if info.is_file() else {}
        free = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else 0
    needed = FULL_SIZE_MEMORY[device.type]
    return None if free >= needed else f"needs {needed / 2**30:.0f} GiB of free memory, found {free / 2**30:.1f}"


def not_measured(frames: int, side: int, reason: str) -> dict:
    return {"subject": "SD1.5", "frames": frames, "side": side, MISSING: reason}


def sampling(subject: Subject, repetitions: int) -> dict:
    """Times and operations of a subject's contenders."""
    logger.info("Sampling: %s, %d frames of %dx%d", subject.name, subject.frames, subject.side, subject.side)
    times = interleaved(subject.contenders(), repetitions, subject.device)
    whole = {"student": 4, "teacher": 25}
    tokens, (_, channels, frames, height, width) = subject.text.shape[1], subject.clip
    operations = {
        by: whole[by] * unet_operations(dict(unet.config), subject.clip, tokens, classifier_free=by == "teacher")
        for by, unet in (("student", subject.student), ("teacher", subject.teacher))
    }
    for name, decoder in (("VAE", subject.vae), ("TAESD", subject.taesd)):
        if decoder is not None:
            operations[name] = decoder_operations(decoder, (frames, channels, height, width))
    return {
        "subject": subject.name,
        "frames": subject.frames,
        "side": subject.side,
        "dtype": name_of(sampling_dtype(subject.device)),
        "decoder dtype": name_of(decoding_dtype(subject.device)),
        "whole": subject.whole,
        "student steps": subject.student_steps,
        "teacher steps": subject.teacher_steps,
        "times": {name: {"wall": t.wall, "cpu": t.cpu} for name, t in times.items()},
        "operations": operations,
    }


def scaling(subject: Subject, repetitions: int) -> dict:
    """Times and operations of one evaluation by frames, resolution and batch, each alone."""
    logger.info("Scaling: %s", subject.name)
    own = {"frames": subject.frames, "resolution": subject.side, "batch": 1}
    axes = {}
    for axis, values in AXES[subject.name].items():
        sizes = {value: (own | {axis: value}).values() for value in values}
        times = interleaved({str(v): evaluations(subject, *size) for v, size in sizes.items()}, repetitions, subject.device)
        axes[axis] = [
            {"at": v, "wall": times[str(v)].wall, "operations": _evaluation_operations(subject, *size)}
            for v, size in sizes.items()
        ]
    fixed = f"{subject.frames} frames of {subject.side}x{subject.side}, one clip"
    return {"subject": subject.name, "else": fixed, "axes": axes}


def _evaluation_operations(subject: Subject, frames: int, side: int, batch: int) -> int:
    _, channels, _, latent, _ = subject.clip
    latent = side * latent // subject.side
    return unet_operations(dict(subject.student.config), (batch, channels, frames, latent, latent), subject.text.shape[1])


def training(device: torch.device, repetitions: int) -> dict:
    """An update of every mode on the miniature and, on a GPU with room for it, at SD1.5's size."""
    found = {}
    size = "--run.batch", "1", "--data.frames", "16", "--data.height", "512", "--data.width", "512"
    for name, options in training_modes.MODES.items():
        found[f"miniature, {name}"] = update(MINIATURE, ["--run.batch", "4", *options], device, repetitions)
    for name, options in training_modes.MODES.items():
        mode = f"SD1.5, {name}"
        if device.type != "cuda":
            found[mode] = {MISSING: "needs a GPU"}
            continue
        torch.cuda.empty_cache()
        try:
            found[mode] = update(None, [*size, *options], device, repetitions)
        except torch.OutOfMemoryError:
            found[mode] = {MISSING: "the GPU has not enough memory for it"}
    return found


def update(teacher: Path | None, options: list[str], device: torch.device, repetitions: int) -> dict:
    logger.info("Training: %s %s", teacher or "SD1.5", " ".join(options))
    try:
        found = training_modes.measure(teacher, options, torch.get_num_threads(), min(3, repetitions))
    except MissingPackageError as error:
        return {MISSING: str(error)}
    return found | {"dtype": name_of(training_dtype(device))}


if __name__ == "__main__":
    console.set_up()
    sys.exit(main())
