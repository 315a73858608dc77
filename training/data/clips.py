"""Captioned video clips in folders and tar shards: found, checked, read and written."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from tqdm import tqdm

from training.data import DataError
from training.data.captions import captioned
from training.data.sizes import cover
from training.data.tars import Span, find_tars, is_pattern, read_span, videos_in
from training.data.unusable import ENCODING, NO_CAPTION, Unusable, named, require_none, told
from training.data.video import VIDEO_SUFFIXES, Decoded, VideoError, codec, decode_video, write_video
from training.run.reading import printable

log = logging.getLogger(__name__)

_UNFINISHED = ".unfinished"  # marks a folder that write_clips has begun and not completed
_PROGRESS_FROM = 200  # files; checking fewer is over before a bar is read
_PIECE = 2**16  # bytes
_SAME_RATE = 1.05  # frame rates are one up to this: 29.97 and 30 are


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

    def decode(self, frames: int, stride: int, fps: float | None = None) -> Decoded:
        """As `decode_video`."""
        if self.span is None:
            return decode_video(self.path, frames, stride, fps=fps)
        try:
            data = read_span(self.path, self.span)
        except OSError as error:
            raise VideoError(f"Expected a readable tar shard at {self.path}, found: {error.strerror}; put it back.") from error
        return decode_video(self.path / PurePosixPath(self.name).name, frames, stride, data=data, fps=fps)


def find_clips(folder) -> list[Entry]:
    """The captioned videos of a folder and its subfolders, sorted by their path in it, or those of WebDataset's tar shards.

    A caption stands in `captions.csv` or `captions.jsonl` (columns or keys `file`, `caption`; paths relative to the folder),
    else in a text file beside the video (`clip.txt` for `clip.mp4`). Tar shards are a folder's `*.tar`, one such file, or a
    pattern such as `data/train-*.tar`: sorted by name, their clips in the shards' own order, with captions in `clip.txt` or
    `clip.json`. A video without a caption, or whose caption cannot be read, is named in the log and left out. DataError for a missing
    or unfinished folder, a table or a shard that cannot be read, or a table that names a file outside the folder.
    """
    entries, left_out = _survey(Path(folder))
    named(left_out)
    return entries


class ClipFolder:
    """The usable clips of a folder (or as `find_clips`), checked once: each opens and decodes as many frames as are asked for.

    Those that do not are named in the log and listed in `left_out`; DataError when none is left, with `strict` when one is left out, or
    as `find_clips`. Without `check` nothing is decoded before it is read. `fps` is `decode_video`'s.
    """

    def __init__(
        self, folder, frames: int, height: int, width: int, stride: int = 1, check: bool = True, fps: float | None = None,
        strict: bool = False,
    ):  # fmt: skip
        self.folder, self.frames, self.height, self.width, self.stride, self.fps = (
            Path(folder),
            frames,
            height,
            width,
            stride,
            fps,
        )
        codec()
        self.entries, self.left_out = _survey(self.folder)
        rates = self._check() if check else []
        named(self.left_out)
        require_none(self.left_out, self.folder, strict)
        if not self.entries:
            found = (
                "no videos" if not self.left_out else f"{len(self.left_out)} that cannot be used, first: {self.skipped[0][1]}"
            )
            raise DataError(
                f"Expected captioned videos ({', '.join(VIDEO_SUFFIXES)}) in {self.folder}, found {found.rstrip('.')}; "
                "put clips there with a captions.csv, a captions.jsonl or a .txt beside each."
            )
        if check:
            told(self.folder, len(self.entries), "clips", self.left_out)
            if fps is None:
                tell_of_rates(rates)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def captions(self) -> list[str]:
        return [entry.caption for entry in self.entries]

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(name, reason) of those left out, sorted."""
        return sorted((one.name, one.reason) for one in self.left_out)

    def fingerprint(self) -> str:
        """A hash of the entries' names, captions and fingerprints."""
        entries = hashlib.sha256()
        with ThreadPoolExecutor(8) as pool:  # waits for the disk
            for entry, fingerprint in zip(self.entries, pool.map(Entry.fingerprint, self.entries), strict=True):
                entries.update(json.dumps([entry.name, entry.caption, fingerprint]).encode())
        return entries.hexdigest()

    def read(self, index: int) -> torch.Tensor:
        """Clip `index` from its first frame on: (frames, height, width, 3) uint8, resized to cover, the centre cut out.

        VideoError if the file went bad meanwhile.
        """
        return self.decode(index)[0]

    def decode(self, index: int) -> tuple[torch.Tensor, float | None]:
        """(`read`, the frames a second that the file has)."""
        decoded = self.entries[index].decode(self.frames, self.stride, self.fps)
        return cover(torch.from_numpy(decoded.frames), self.height, self.width), decoded.rate

    def _check(self) -> list[float]:
        """Leaves out what cannot be decoded; the rates of the others."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            checks = pool.map(self._checked, self.entries)
            quiet = len(self.entries) <= _PROGRESS_FROM
            checks = list(tqdm(checks, "checking clips", len(self.entries), disable=quiet, leave=False))
        self.left_out = sorted(
            self.left_out + [one for one in checks if isinstance(one, Unusable)], key=lambda one: (one.name, one.reason)
        )
        self.entries = [entry for entry, one in zip(self.entries, checks, strict=True) if not isinstance(one, Unusable)]
        return [rate for rate in checks if isinstance(rate, float)]

    def _checked(self, entry: Entry) -> float | Unusable | None:
        try:
            return entry.decode(self.frames, self.stride, self.fps).rate
        except VideoError as error:
            return Unusable(entry.name, str(error), error.kind)


def tell_of_rates(rates: Iterable[float]) -> None:
    """A word in the log where clips have different frame rates and are taken frame by frame."""
    counts = Counter(round(rate, 1) for rate in rates)
    if counts and max(counts) > _SAME_RATE * min(counts):
        several = ", ".join(f"{rate:g} ({count})" for rate, count in sorted(counts.items())[:8])
        log.warning(
            "The clips have several frame rates: %s%s. Taken frame by frame, the same movement is slower in those of a higher one; "
            "set data.fps to resample all of them by time.",
            several,
            ", …" if len(counts) > 8 else "",
        )


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


def _survey(folder: Path) -> tuple[list[Entry], list[Unusable]]:
    """(entries with captions, the videos without)."""
    if tars := find_tars(folder):
        return _survey_tars(tars)
    if not folder.is_dir():
        raise DataError(f"Expected a folder of videos at {folder}, found {'a file' if folder.exists() else 'nothing'}.")
    if (folder / _UNFINISHED).exists():
        raise DataError(f"Expected a finished folder at {folder}, found that writing it was cut short; have it written again.")
    entries, left_out = [], []
    for name, path, caption, problem in captioned(folder, VIDEO_SUFFIXES):
        if caption:
            entries.append(Entry(name, path, caption))
        else:
            left_out.append(
                _captionless(name, problem, f"{printable(str(path))}, found none; add it to a table or to a .txt beside it")
            )
    return entries, left_out


def _survey_tars(tars: list[Path]) -> tuple[list[Entry], list[Unusable]]:
    entries, left_out = [], []
    for name, shard, span, caption, problem in videos_in(tars):
        if caption:
            entries.append(Entry(name, shard, caption, span))
        else:
            left_out.append(_captionless(name, problem, f"{name}, found none; add a .txt or a .json to its sample"))
    return entries, left_out


def _captionless(name: str, problem: str, rest: str) -> Unusable:
    return Unusable(name, problem, ENCODING) if problem else Unusable(name, f"Expected a caption for {rest}.", NO_CAPTION)
