"""WebDataset's tar shards: found by name or pattern, and what lies where in them."""

import glob
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from training.data import DataError
from training.data.captions import caption_in, words
from training.data.video import VIDEO_SUFFIXES
from training.run.packages import needs

Span = tuple[int, int]  # where in a file: first byte, bytes


class TarVideo(NamedTuple):
    name: str  # shard.tar/clip.mp4
    shard: Path
    span: Span
    caption: str  # "" where its sample has none that can be read


def is_pattern(path: Path) -> bool:
    """Whether a path stands for files whose names match it."""
    return glob.has_magic(str(path)) and not path.exists()


def find_tars(place: Path) -> list[Path]:
    """The tar shards that a folder holds or a file's name or pattern stands for; [] for a folder of videos.

    DataError for videos beside shards, and for a pattern that names anything else or nothing.
    """
    if place.is_dir():
        tars = sorted(place.glob("[!.]*.tar"))
        if tars and (video := next((p for p in place.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES), None)):
            raise DataError(f"Expected videos or tar shards in {place}, found {tars[0].name} and {video.name}; keep one kind.")
        return tars
    tars = sorted(map(Path, glob.glob(str(place)))) if is_pattern(place) else [place] if place.suffix == ".tar" else []
    if is_pattern(place) and (not tars or any(path.suffix != ".tar" or not path.is_file() for path in tars)):
        found = next((path.name for path in tars if path.suffix != ".tar" or not path.is_file()), "nothing")
        raise DataError(f"Expected tar shards at {place}, found {found}; correct the pattern.")
    return tars


def videos_in(tars: list[Path]) -> Iterator[TarVideo]:
    """The videos of shards, of samples as WebDataset sees them: files in a row with the same name up to the first dot. DataError."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        samples = pool.map(_samples, tars)
        for path, found in tqdm(
            zip(tars, samples, strict=True), "reading shards", len(tars), disable=len(tars) < 9, leave=False
        ):
            for sample in found:
                suffix = next((s for s in sample if f".{s}" in VIDEO_SUFFIXES), None)
                if suffix is not None:
                    name = f"{path.name}/{sample['__key__']}.{suffix}"
                    yield TarVideo(name, path, sample[suffix], _caption_of(path, sample))


def _samples(path: Path) -> list[dict]:
    """WebDataset's samples of a tar shard, the place (first byte, bytes) of each file in place of what it holds."""
    group_by_keys = needs("webdataset.tariterators", "to read tar shards").group_by_keys
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


def _caption_of(path: Path, sample: dict) -> str:
    """The caption in a sample's .txt or .json; "" if it has none that can be read."""
    try:
        if "txt" in sample:
            return words(read_span(path, sample["txt"]).decode("utf-8-sig"))
        found = json.loads(read_span(path, sample["json"])) if "json" in sample else {}
    except (OSError, ValueError):
        return ""
    return caption_in(found) if isinstance(found, dict) else ""


def read_span(path: Path, span: Span) -> bytes:
    """The bytes of a part of a file. OSError."""
    with path.open("rb") as file:
        file.seek(span[0])
        return file.read(span[1])
