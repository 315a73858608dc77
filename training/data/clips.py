"""Captioned video clips in folders and tar shards: found, checked, read and written."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from einops import rearrange
from torch.nn.functional import interpolate
from tqdm import tqdm

from training.data import DataError
from training.data.captions import caption_beside, read_table
from training.data.tars import Span, find_tars, is_pattern, read_span, videos_in
from training.data.video import VIDEO_SUFFIXES, VideoError, codec, read_video, write_video

log = logging.getLogger(__name__)

_UNFINISHED = ".unfinished"  # marks a folder that write_clips has begun and not completed
_PROGRESS_FROM = 200  # files; checking fewer is over before a bar is read
_PIECE = 2**16  # bytes


@dataclass(frozen=True)
class Entry:
    """A video and what it shows, in words."""

    name: str  # its path in the folder; in a tar shard, shard.tar/clip.mp4
    path: Path  # its file, or the tar shard's
    caption: str
    span: Span | None = None  # where in the tar shard

    def fingerprint(self) -> str:
        """A hash of the video's size, beginning, middle and end (up to 192 KiB, of all of it); "" for one that cannot be read.

        Another video under the same name has another, a copy with another date has the same, and no terabyte is read through for it.
        """
        try:
            first, size = self.span or (0, self.path.stat().st_size)
            starts = (0, size // 2 - _PIECE // 2, size - _PIECE) if size > 3 * _PIECE else range(0, size, _PIECE)
            pieces = [read_span(self.path, (first + start, min(_PIECE, size - start))) for start in starts]
        except OSError:
            return ""
        return hashlib.sha256(b"".join([str(size).encode(), *pieces])).hexdigest()

    def read(self, frames: int, stride: int) -> np.ndarray:
        """As `read_video`."""
        if self.span is None:
            return read_video(self.path, frames, stride)
        try:
            data = read_span(self.path, self.span)
        except OSError as error:
            raise VideoError(f"Expected a readable tar shard at {self.path}, found: {error.strerror}; put it back.") from error
        return read_video(self.path / PurePosixPath(self.name).name, frames, stride, data=data)


def find_clips(folder) -> list[Entry]:
    """The captioned videos of a folder and its subfolders, sorted by their path in it, or those of WebDataset's tar shards.

    A caption stands in `captions.csv` or `captions.jsonl` (columns or keys `file`, `caption`; paths relative to the folder),
    else in a text file beside the video (`clip.txt` for `clip.mp4`). Tar shards are a folder's `*.tar`, one such file, or a
    pattern such as `data/train-*.tar`: sorted by name, their clips in the shards' own order, with captions in `clip.txt` or
    `clip.json`. A video without a caption is named in the log and left out. DataError for a missing or unfinished folder, a table
    or a shard that cannot be read, or a table that names a file outside the folder.
    """
    entries, skipped = _survey(Path(folder))
    _warn(skipped)
    return entries


class ClipFolder:
    """The usable clips of a folder (or as `find_clips`), checked once: each opens and decodes as many frames as are asked for.

    Those that do not are named in the log and listed in `skipped`; DataError when none is left, or as `find_clips`. Without
    `check` nothing is decoded before it is read.
    """

    def __init__(self, folder, frames: int, height: int, width: int, stride: int = 1, check: bool = True):
        self.folder, self.frames, self.height, self.width, self.stride = Path(folder), frames, height, width, stride
        codec()
        self.entries, self.skipped = _survey(self.folder)
        if check:
            self._check()
        _warn(self.skipped)
        if not self.entries:
            found = "no videos" if not self.skipped else f"{len(self.skipped)} that cannot be used, first: {self.skipped[0][1]}"
            raise DataError(
                f"Expected captioned videos ({', '.join(VIDEO_SUFFIXES)}) in {self.folder}, found {found.rstrip('.')}; "
                "put clips there with a captions.csv, a captions.jsonl or a .txt beside each."
            )
        if check and self.skipped:
            log.warning("%s: %d clips are used, %d skipped.", self.folder, len(self.entries), len(self.skipped))

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def captions(self) -> list[str]:
        return [entry.caption for entry in self.entries]

    def read(self, index: int) -> torch.Tensor:
        """Clip `index` from its first frame on: (frames, height, width, 3) uint8, resized to cover, the centre cut out.

        VideoError if the file went bad meanwhile.
        """
        frames = self.entries[index].read(self.frames, self.stride)
        return cover(torch.from_numpy(frames), self.height, self.width)

    def _check(self) -> None:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            checks = pool.map(self._problem, self.entries)
            quiet = len(self.entries) <= _PROGRESS_FROM
            problems = list(tqdm(checks, "checking clips", len(self.entries), disable=quiet, leave=False))
        checked = list(zip(self.entries, problems, strict=True))
        self.entries = [entry for entry, problem in checked if not problem]
        self.skipped = sorted(self.skipped + [(entry.name, problem) for entry, problem in checked if problem])

    def _problem(self, entry: Entry) -> str | None:
        try:
            entry.read(self.frames, self.stride)
        except VideoError as error:
            return str(error)
        return None


def cover(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes (F, H, W, 3) uint8 until it covers height x width, antialiased, and cuts the centre out."""
    h, w = frames.shape[1:3]
    if (h, w) != (height, width):
        scale = max(height / h, width / w)
        size = max(height, round(h * scale)), max(width, round(w * scale))
        planes = rearrange(frames, "f h w c -> f c h w").float()
        planes = interpolate(planes, size=size, mode="bicubic", antialias=True, align_corners=False)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        planes = planes[..., top : top + height, left : left + width]
        frames = rearrange(planes.round().clamp(0, 255).to(torch.uint8), "f c h w -> f h w c")
    return frames.contiguous()


# ---- writing ----


def needs_clips(folder) -> bool:
    """True when `write_clips` may fill this folder: it is not there, is empty, or an earlier writing was cut short."""
    folder = Path(folder)
    if is_pattern(folder):
        return False
    return not folder.exists() or (folder / _UNFINISHED).exists() or (folder.is_dir() and not any(folder.iterdir()))


def write_clips(folder, clips: Iterable[tuple[np.ndarray, str]], fps: int) -> None:
    """Writes (frames (F, H, W, 3) uint8, caption) pairs as 00000.mp4, 00001.mp4, … and their captions.jsonl.

    Until all of it stands the folder carries a marker, `needs_clips` says True and `find_clips` refuses it; writing then starts
    over. DataError for a folder that holds anything else or cannot be written; VideoError as `write_video`.
    """
    folder = Path(folder)
    if not needs_clips(folder):
        raise DataError(f"Expected a new or empty folder to write clips into, found {folder} in use; name another one.")
    try:
        _write_all(folder, clips, fps)
    except OSError as error:
        raise DataError(
            f"Expected room and the right to write clips into {folder}, found: {error.strerror}; name another or make room."
        ) from error


def _write_all(folder: Path, clips: Iterable[tuple[np.ndarray, str]], fps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    marker, table = folder / _UNFINISHED, folder / "captions.jsonl"
    marker.touch()
    table.unlink(missing_ok=True)
    for stale in folder.glob("[0-9]*.mp4"):
        stale.unlink()
    lines = []
    for i, (frames, caption) in enumerate(clips):
        write_video(folder / f"{i:05d}.mp4", frames, fps)
        lines.append(json.dumps({"file": f"{i:05d}.mp4", "caption": caption}, ensure_ascii=False) + "\n")
    temporary = folder / ".captions.jsonl"
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, table)
    marker.unlink()


# ---- finding ----


def _survey(folder: Path) -> tuple[list[Entry], list[tuple[str, str]]]:
    """(entries with captions, (name, reason) of the videos without)."""
    if tars := find_tars(folder):
        return _survey_tars(tars)
    if not folder.is_dir():
        raise DataError(f"Expected a folder of videos at {folder}, found {'a file' if folder.exists() else 'nothing'}.")
    if (folder / _UNFINISHED).exists():
        raise DataError(f"Expected a finished folder at {folder}, found that writing it was cut short; have it written again.")
    table = read_table(folder)
    videos = {
        _name(folder, path): path
        for path in folder.rglob("*")
        if path.suffix.lower() in VIDEO_SUFFIXES and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    }
    entries, skipped = [], []
    for name, path in sorted((videos | {name: folder / name for name in table}).items()):
        caption = table.get(name) or caption_beside(path)
        if caption:
            entries.append(Entry(name, path, caption))
        else:
            skipped.append((name, f"Expected a caption for {path}, found none; add it to a table or to a .txt beside it."))
    return entries, skipped


def _survey_tars(tars: list[Path]) -> tuple[list[Entry], list[tuple[str, str]]]:
    entries, skipped = [], []
    for name, shard, span, caption in videos_in(tars):
        if caption:
            entries.append(Entry(name, shard, caption, span))
        else:
            skipped.append((name, f"Expected a caption for {name}, found none; add a .txt or a .json to its sample."))
    return entries, skipped


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _warn(skipped: list[tuple[str, str]]) -> None:
    for name, reason in skipped:
        log.warning("Skipped %s: %s", name, reason)
