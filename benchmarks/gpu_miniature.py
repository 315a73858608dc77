"""The part of `benchmarks/on_gpu.py` that trains the miniature by the real command, on the device and on the CPU."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_parts import CONFIGS, FULL, Row, Session
from training.run.config import ROOT


def miniature(session: Session) -> Iterator[Row]:
    """training/distill.py on the shipped miniature in each mode, side by side on the device and on the CPU; the losses of both."""
    modes = {
        "all weights": ["--model.train", "all"],
        "motion modules": ["--model.train", "motion"],
        "motion modules and LoRA, one base": ["--model.train", "motion+lora", "--model.share_base", "true"],
        "a style": ["--config", str(CONFIGS / "style.yaml"), "--model.score_unet", str(ROOT / "miniature" / "styles" / "neon")],
    }
    if session.size is not FULL:
        modes = {"all weights": modes["all weights"]}
    common = [
        "--run.batch", "4", "--run.updates", "2", "--run.sample_every", "100", "--evaluation.report", "false",
        "--warmup.updates", "2", "--warmup.critics_from", "1", "--run.threads", "1",
    ]  # fmt: skip
    devices = [*dict.fromkeys((session.device.type, "cpu"))]
    with tempfile.TemporaryDirectory() as made, _ended() as runs:
        folder = Path(made)
        prompts = "--prompts", ROOT / "miniature" / "prompts.txt", "--clips", "8", "--evaluation.teacher_steps", "4"
        runs["clips"] = _started("prepare.py", folder / "clips.log", "--out", folder / "clips", *prompts, "--run.device", "cpu")
        _wait_for(runs["clips"], folder / "clips.log")
        began = time.perf_counter()
        for name, options in modes.items():
            data = [] if name == "a style" else ["--data.folder", folder / "clips"]
            for device in devices:
                out = "--run.device", device, "--run.folder", folder / device / name
                runs[name, device] = _started("distill.py", folder / f"{device} {name}.log", *options, *data, *common, *out)
        for name in modes:
            lines = []
            for device in devices:
                _wait_for(runs[name, device], folder / f"{device} {name}.log")
                stats = (folder / device / name / "stats.jsonl").read_text(encoding="utf-8")
                lines.append([json.loads(line) for line in stats.splitlines()])
            note = (
                f"{len(lines[0])} updates, the last in {lines[0][-1]['update_seconds']:.3g} s; losses, {' / '.join(devices)}: "
            )
            yield Row("miniature", name, time.perf_counter() - began, note=note + _compared(*lines))


def _compared(*runs: list[dict]) -> str:
    """The last figure of each loss that runs have."""
    names = [name for name in ("guidance", "sdm", "adm", "fake", "critic") if any(name in line for line in runs[0])]
    last = {name: [[line[name] for line in lines if name in line][-1] for lines in runs] for name in names}
    return ", ".join(f"{name} {' / '.join(f'{loss:.4g}' for loss in losses)}" for name, losses in last.items())


def _started(script: str, log: Path, *arguments) -> subprocess.Popen:
    """A command of training, which says what it has to say into a file."""
    command = [sys.executable, str(ROOT / "training" / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)


def _wait_for(process: subprocess.Popen, log: Path) -> None:
    if process.wait():
        raise RuntimeError(f"{log.stem} ended with {process.returncode}: {log.read_text(errors='replace').strip()[-300:]}")


@contextlib.contextmanager
def _ended() -> Iterator[dict]:
    """Processes by name, which end with the block."""
    processes: dict = {}
    try:
        yield processes
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
