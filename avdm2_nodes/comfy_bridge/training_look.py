"""How far a training is, by what it leaves in its folder, shown on the node that waits for it."""

import json
import math
from pathlib import Path

import comfy.model_management as management
import comfy.utils
import yaml
from PIL import Image

from .process import Process
from .progress import show_text

LOSSES = ("guidance", "sdm", "adm", "fake", "critic")  # of `stats.jsonl`
LOOK = 0.5  # seconds between two looks
SHOWN = 768  # pixels of a sample sheet's longer side, at most, while it is only shown


def follow(job: Process, folder: Path) -> None:
    """Waits for the job, showing its progress, its losses and the clips that it makes; an interrupt is raised as such."""
    look, bar, said = Look(folder), None, ""
    before, shown = look.lines, look.sheet
    while not job.wait(LOOK):
        management.throw_exception_if_processing_interrupted()
        look = Look(folder)
        text = job.last_words()
        if look.total and look.lines and look.lines != before:
            bar = bar or comfy.utils.ProgressBar(look.total)
            fresh = look.sheet is not None and look.sheet != shown
            bar.update_absolute(look.lines[-1]["update"], look.total, picture(look.sheet) if fresh else None)
            shown, text = look.sheet, in_words(look.lines, look.total)
        if text != said:
            show_text(text)
            said = text


class Look:
    """What a run's folder says at this moment; what is spoilt there says nothing."""

    def __init__(self, folder: Path):
        self.lines = _stats(folder / "stats.jsonl")  # the figures of each update
        self.total = _total(folder / "config.yaml")  # updates
        self.sheet = next(reversed(sample_sheets(folder)), None)  # the newest clips


def _stats(path: Path) -> list[dict]:
    found = []
    for line in _text(path).splitlines(keepends=True):
        try:
            figures = json.loads(line) if line.endswith("\n") else None
        except (ValueError, RecursionError):
            continue
        if isinstance(figures, dict) and all(
            isinstance(figures.get(key), (int, float)) and math.isfinite(figures[key]) for key in ("update", "seconds")
        ):
            found.append(figures)
    return found


def _total(path: Path) -> int | None:
    try:
        said = yaml.safe_load(_text(path))
        return int(said["run"]["updates"] + said["warmup"]["updates"])
    except (yaml.YAMLError, TypeError, KeyError, ValueError, OverflowError, RecursionError):
        return None


def _text(path: Path) -> str:
    try:  # a pipe would wait for ever
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:
        return ""


def in_words(lines: list[dict], total: int) -> str:
    """How far a run is, what is left of it and its losses, of the last update."""
    *_, last = lines
    done, recent = last["update"], lines[-20:]
    text = f"update {done} of {total}"
    if len(recent) > 1 and recent[0]["update"] < done < total:
        pace = (last["seconds"] - recent[0]["seconds"]) / (done - recent[0]["update"])
        text += f", about {in_time(pace * (total - done))} to go"
    losses = [f"{name} {last[name]:.3f}" for name in LOSSES if isinstance(last.get(name), (int, float))]
    return "\n".join([text, *losses])


def in_time(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 120 else f"{round(minutes / 60)} h"


def sample_sheets(folder: Path) -> list[Path]:
    """The sheets of clips that a run made on its way, in their order."""
    return sorted((folder / "samples").glob("*.png"))


def picture(sheet: Path) -> tuple | None:
    """A sheet as ComfyUI's preview; None for one that is still being written."""
    try:
        with Image.open(sheet) as image:
            return "PNG", image.convert("RGB"), SHOWN
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # SyntaxError is Pillow's for a broken PNG
        return None
