"""Captioned video clips in folders and tar shards: found, checked, read, written, and put into an order that numbers alone decide."""

import csv
import glob
import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch.nn.functional import interpolate
from tqdm import tqdm
from webdataset.tariterators import group_by_keys

from training.data.video import VideoError, read_video, write_video

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
TABLES = ("captions.csv", "captions.jsonl")
_FILE_KEYS, _CAPTION_KEYS = ("file", "video", "path"), ("caption", "text")
_UNFINISHED = ".unfinished"  # marks a folder that write_clips has begun and not completed
_PROGRESS_FROM = 200  # files; checking fewer is over before a bar is read
_PIECE = 2**16  # bytes


class DataError(ValueError):
    """A data folder that cannot be used; the message is one sentence that names it."""


@dataclass(frozen=True)
class Entry:
    """A video and what it shows, in words."""

    name: str  # its path in the folder; in a tar shard, shard.tar/clip.mp4
    path: Path  # its file, or the tar shard's
    caption: str
    span: tuple[int, int] | None = None  # where in the tar shard: first byte, bytes

    def fingerprint(self) -> str:
        """A hash of the video's size, beginning, middle and end (up to 192 KiB, of all of it); "" for one that cannot be read.

        Another video under the same name has another, a copy with another date has the same, and no terabyte is read through for it.
        """
        try:
            first, size = self.span or (0, self.path.stat().st_size)
            starts = (0, size // 2 - _PIECE // 2, size - _PIECE) if size > 3 * _PIECE else range(0, size, _PIECE)
            pieces = [_read_span(self.path, (first + start, min(_PIECE, size - start))) for start in starts]
        except OSError:
            return ""
        return hashlib.sha256(b"".join([str(size).encode(), *pieces])).hexdigest()

    def read(self, frames: int, stride: int) -> np.ndarray:
        """As `read_video`."""
        if self.span is None:
            return read_video(self.path, frames, stride)
        try:
            data = _read_span(self.path, self.span)
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
        planes = frames.permute(0, 3, 1, 2).float()
        planes = interpolate(planes, size=size, mode="bicubic", antialias=True, align_corners=False)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        planes = planes[..., top : top + height, left : left + width]
        frames = planes.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return frames.contiguous()


# ---- writing ----


def needs_clips(folder) -> bool:
    """True when `write_clips` may fill this folder: it is not there, is empty, or an earlier writing was cut short."""
    folder = Path(folder)
    if _is_pattern(folder):
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


# ---- order ----


def epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    """The permutation of range(length) in which pass `epoch` visits the samples."""
    return list(_permutation(length, seed, epoch))


def indices(position: int, count: int, length: int, seed: int) -> list[int]:
    """The samples at places position … position + count - 1 of an endless stream of passes, each in its own `epoch_order`.

    Numbers alone decide, no state: a resumed run and any slicing over ranks draw the same samples.
    """
    return [_permutation(length, seed, place // length)[place % length] for place in range(position, position + count)]


def rank_places(position: int, count: int, rank: int, ranks: int) -> range:
    """The places of a global batch (position … position + count - 1) that one of `ranks` processes takes: the rank-th equal part.

    All parts together are the batch, none has a place of another's; `indices(places.start, len(places), …)` are their samples.
    ValueError for a batch that cannot be cut so, or a rank that is none.
    """
    if ranks < 1 or count % ranks:
        raise ValueError(f"Expected a batch that {ranks} processes share equally, found {count} clips; change one of them.")
    if not 0 <= rank < ranks:
        raise ValueError(f"Expected a rank from 0 to {ranks - 1}, found {rank}.")
    part = count // ranks
    return range(position + rank * part, position + (rank + 1) * part)


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, epoch]).permutation(length).tolist())


# ---- finding ----


def _survey(folder: Path) -> tuple[list[Entry], list[tuple[str, str]]]:
    """(entries with captions, (name, reason) of the videos without)."""
    if tars := _find_tars(folder):
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


def _is_pattern(path: Path) -> bool:
    return glob.has_magic(str(path)) and not path.exists()


def _find_tars(place: Path) -> list[Path]:
    """The tar shards that a folder holds or a file's name or pattern stands for; [] for a folder of videos."""
    if place.is_dir():
        tars = sorted(place.glob("[!.]*.tar"))
        if tars and (video := next((p for p in place.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES), None)):
            raise DataError(f"Expected videos or tar shards in {place}, found {tars[0].name} and {video.name}; keep one kind.")
        return tars
    tars = sorted(map(Path, glob.glob(str(place)))) if _is_pattern(place) else [place] if place.suffix == ".tar" else []
    if _is_pattern(place) and (not tars or any(path.suffix != ".tar" or not path.is_file() for path in tars)):
        found = next((path.name for path in tars if path.suffix != ".tar" or not path.is_file()), "nothing")
        raise DataError(f"Expected tar shards at {place}, found {found}; correct the pattern.")
    return tars


def _survey_tars(tars: list[Path]) -> tuple[list[Entry], list[tuple[str, str]]]:
    """As `_survey`, of the samples that WebDataset sees in its shards: files in a row with the same name up to the first dot."""
    entries, skipped = [], []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        samples = pool.map(_samples, tars)
        for path, found in tqdm(
            zip(tars, samples, strict=True), "reading shards", len(tars), disable=len(tars) < 9, leave=False
        ):
            for sample in found:
                suffix = next((s for s in sample if f".{s}" in VIDEO_SUFFIXES), None)
                if suffix is None:
                    continue
                name, caption = f"{path.name}/{sample['__key__']}.{suffix}", _caption_in(path, sample)
                if caption:
                    entries.append(Entry(name, path, caption, sample[suffix]))
                else:
                    skipped.append((name, f"Expected a caption for {name}, found none; add a .txt or a .json to its sample."))
    return entries, skipped


def _samples(path: Path) -> list[dict]:
    """WebDataset's samples of a tar shard, the place (first byte, bytes) of each file in place of what it holds."""
    try:
        with tarfile.open(path, "r:") as tar:
            files = [
                {"fname": member.name, "data": (member.offset_data, member.size), "__url__": str(path)}
                for member in tar
                if member.isreg() and not PurePosixPath(member.name).name.startswith((".", "__"))
            ]
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end after {len(files)} files")
        return list(group_by_keys(files))
    except (tarfile.TarError, OSError, ValueError) as error:  # of webdataset ValueError, for a file that is there twice
        cause = getattr(error, "strerror", None) or (error.args[0] if error.args else type(error).__name__)
        raise DataError(
            f"Expected a whole, uncompressed tar shard at {path}, found: {cause}; copy it again or take it out."
        ) from error


def _caption_in(path: Path, sample: dict) -> str:
    """The caption in a sample's .txt or .json; "" if it has none that can be read."""
    try:
        if "txt" in sample:
            return _words(_read_span(path, sample["txt"]).decode("utf-8-sig"))
        found = json.loads(_read_span(path, sample["json"])) if "json" in sample else {}
    except (OSError, ValueError):
        return ""
    caption = _pick(found, _CAPTION_KEYS) if isinstance(found, dict) else None
    return _words(caption) if isinstance(caption, str) else ""


def _read_span(path: Path, span: tuple[int, int]) -> bytes:
    with path.open("rb") as file:
        file.seek(span[0])
        return file.read(span[1])


def caption_beside(path: Path) -> str:
    """The text in the .txt beside a file; "" where there is none that can be read."""
    try:
        return _words(path.with_suffix(".txt").read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError):
        return ""


def read_table(folder: Path) -> dict[str, str]:
    """{path in the folder: caption} of the folder's table; {} if it has none."""
    tables = [folder / name for name in TABLES if (folder / name).exists()]
    if not tables:
        return {}
    if len(tables) > 1:
        raise DataError(f"Expected one table of captions in {folder}, found {' and '.join(TABLES)}; keep one of them.")
    table = tables[0]
    captions = {}
    for line, row in _rows(table):
        name, caption = _pick(row, _FILE_KEYS), _pick(row, _CAPTION_KEYS)
        if not isinstance(name, str) or not name.strip():
            raise DataError(
                f"Expected a file's name under {_FILE_KEYS[0]!r} in line {line} of {table}, found {name!r}; add it."
            )
        place = PurePosixPath(name.strip())
        if place.is_absolute() or ".." in place.parts or re.match(r"[A-Za-z]:|.*\\", str(place)):
            raise DataError(
                f"Expected a path inside {folder} in line {line} of {table}, found {name!r}; write it relative to that, with /."
            )
        if str(place) in captions:
            raise DataError(f"Expected each file once in {table}, found {name!r} again in line {line}; remove one.")
        captions[str(place)] = _words(caption) if isinstance(caption, str) else ""
    return captions


def _rows(table: Path):
    """Yields (line number, row as a dict)."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".csv":
                reader = csv.DictReader(file)
                if not set(reader.fieldnames or ()) & set(_FILE_KEYS) or not set(reader.fieldnames) & set(_CAPTION_KEYS):
                    raise DataError(
                        f"Expected a first line with the columns file,caption in {table}, found {reader.fieldnames}; add it."
                    )
                for row in reader:
                    yield reader.line_num, row
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DataError(
                            f"Expected a JSON object with file and caption in line {number} of {table}, "
                            f"found {line.strip()[:60]!r}; correct it."
                        )
                    yield number, row
    except json.JSONDecodeError as error:
        raise DataError(
            f"Expected one JSON object a line in {table}, found in line {number}: {error.msg}; correct it."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"Expected {table} in UTF-8, found another encoding; save it as UTF-8.") from error
    except (csv.Error, OSError) as error:
        raise DataError(f"Expected a readable table of captions at {table}, found: {error}.") from error


def _pick(row: dict, keys: tuple[str, ...]):
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _words(text: str) -> str:
    return " ".join(text.split())


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _warn(skipped: list[tuple[str, str]]) -> None:
    for name, reason in skipped:
        log.warning("Skipped %s: %s", name, reason)
