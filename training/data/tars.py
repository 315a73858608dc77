"""WebDataset's tar shards: found by name or pattern, and what lies where in them."""

import glob
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from training.data import DataError
from training.data.captions import caption_in, words
from training.data.folders import files_below
from training.data.video import VIDEO_SUFFIXES
from training.run.packages import needs
from training.run.reading import UnreadableError, decoded, parsed, printable

Span = tuple[int, int]  # where in a file: first byte, bytes


class TarVideo(NamedTuple):
    name: str  # shard.tar/clip.mp4
    shard: Path
    span: Span
    caption: str  # "" where its sample has none
    problem: str = ""  # why its caption, or it itself, cannot be read


def is_pattern(path: Path) -> bool:
    """Whether a path stands for files whose names match it."""
    return glob.has_magic(str(path)) and not path.exists()


def find_tars(place: Path) -> list[Path]:
    """The tar shards that a folder holds or a file's name or pattern stands for; [] for a folder of videos.

    DataError for videos beside shards, and for a pattern that names anything else or nothing.
    """
    if place.is_dir():
        tars = sorted(place.glob("[!.]*.tar"))
        if tars and (video := next((p for p in files_below(place).values() if p.suffix.lower() in VIDEO_SUFFIXES), None)):
            raise DataError(f"Expected videos or tar shards in {place}, found {tars[0].name} and {video.name}; keep one kind.")
        return tars
    tars = sorted(map(Path, glob.glob(str(place)))) if is_pattern(place) else [place] if place.suffix == ".tar" else []
    if is_pattern(place) and (not tars or any(path.suffix != ".tar" or not path.is_file() for path in tars)):
        found = next((path.name for path in tars if path.suffix != ".tar" or not path.is_file()), "nothing")
        raise DataError(f"Expected tar shards at {place}, found {found}; correct the pattern.")
    return tars


def videos_in(tars: list[Path]) -> Iterator[TarVideo]:
    """The videos of shards, of samples as WebDataset sees them: files in a row with the same name up to the first dot. DataError.

    Within a sample a name may have more dots: clip.0001.mp4 has its caption in clip.0001.txt or clip.0001.json.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        samples = pool.map(_samples, tars)
        for path, found in tqdm(
            zip(tars, samples, strict=True), "reading shards", len(tars), disable=len(tars) < 9, leave=False
        ):
            for sample in found:
                plain = False  # of a sample's clip.mp4 and clip.webm, the first is the clip
                for field, span in sample.items():
                    stem, dot, suffix = field.rpartition(".")
                    if field.startswith("__") or f".{suffix}" not in VIDEO_SUFFIXES or (plain and not dot):
                        continue
                    plain = plain or not dot
                    name = f"{path.name}/{printable(sample['__key__'])}.{printable(field)}"
                    if span is None:
                        problem = f"Expected a file for {name}, found a link; pack the shard with the files themselves."
                        yield TarVideo(name, path, (0, 0), "", problem)
                    else:
                        yield TarVideo(name, path, span, *_caption_of(path, name, sample, stem + dot))


def _samples(path: Path) -> list[dict]:
    """WebDataset's samples of a tar shard, the place (first byte, bytes) of each file in place of what it holds; None of a link."""
    group_by_keys = needs("webdataset.tariterators", "to read tar shards").group_by_keys
    try:
        if not path.is_file():
            raise tarfile.ReadError("no file" if path.exists() else "nothing")
        spans: dict[str, Span] = {}
        files = []
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg():
                    spans[member.name] = (member.offset_data, member.size)
                elif not (member.islnk() or member.issym()):
                    continue
                if any(part.startswith(".") for part in PurePosixPath(member.name).parts):
                    continue
                if not PurePosixPath(member.name).name.startswith("__"):
                    # A hard link is a file that stands elsewhere in the shard.
                    span = spans.get(member.name if member.isreg() else member.linkname if member.islnk() else "")
                    files.append({"fname": member.name, "data": span, "__url__": str(path)})
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end after {len(files)} files")
        return list(group_by_keys(files))
    except (tarfile.TarError, OSError, ValueError) as error:  # of webdataset ValueError, for a file that is there twice
        cause = getattr(error, "strerror", None) or (error.args[0] if error.args else type(error).__name__)
        raise DataError(
            f"Expected a whole, uncompressed tar shard at {path}, found: {cause}; copy it again or take it out."
        ) from error


def _caption_of(path: Path, name: str, sample: dict, stem: str) -> tuple[str, str]:
    """(the caption in a sample's .txt or .json, or why it cannot be read)."""
    field = next((stem + suffix for suffix in ("txt", "json") if sample.get(stem + suffix) is not None), None)
    if field is None:
        return "", ""
    try:
        data = read_span(path, sample[field])
        if field.endswith("txt"):
            return words(decoded(data)), ""
        found = parsed(data)
        return (caption_in(found) if isinstance(found, dict) else ""), ""
    except (OSError, UnreadableError) as error:
        where = f"{name.rpartition('.')[0]}.{field.rpartition('.')[2]}"
        return "", f"Expected a caption in UTF-8 in {where}, found {error}; pack it again as UTF-8, or leave it out."


def read_span(path: Path, span: Span) -> bytes:
    """The bytes of a part of a file. OSError."""
    with path.open("rb") as file:
        file.seek(span[0])
        return file.read(span[1])
