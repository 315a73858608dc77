"""A cache of captioned clips in model space: safetensors shards of them, and a list of the shards with their hashes.

`cache.json` says in what space the clips are (hashes of the networks, frames, size, stride), what they were made of, and of each
shard its hash and which clips were left out of it. It is written anew after every shard, so a writing that was cut short goes on.
"""

import bisect
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.stack import Stack
from training.data import DataError
from training.data.unusable import Unusable
from training.run.checkpoint import write_atomically
from training.run.reading import parsed, read_json
from training.run.sections import DataConfig

FORMAT = 1
_LIST = "cache.json"
_AGAIN = "the command that prepared it makes it again"
_PROGRESS_FROM = 32  # shards


@dataclass(frozen=True)
class LatentClip:
    """A captioned clip in model space."""

    name: str
    caption: str
    latents: Tensor  # (C, F, h, w) float32
    text: Tensor  # (L, D) float32, the caption's embedding
    rate: float | None = None  # frames a second of its video


# Parts of what is to be made, each a range of places in the source -> what stands there, in the same order.
Maker = Callable[[Sequence[range]], Iterator[LatentClip | Unusable]]


def space_of(stack: Stack, data: DataConfig) -> dict[str, str | int | None]:
    """What clips in model space depend on: networks by their hashes, and how clips are cut from videos."""
    words = json.dumps([sorted(stack.tokenizer.get_vocab().items()), stack.tokenizer.model_max_length])
    return {
        "vae": f"{weights_hash(stack.vae)[:16]} x {stack.vae.config.scaling_factor}",
        "text_encoder": weights_hash(stack.text_encoder)[:16],
        "tokenizer": hashlib.sha256(words.encode()).hexdigest()[:16],
        "frames": data.frames,
        "height": data.height,
        "width": data.width,
        "stride": data.stride,
        "fps": data.fps,
    }


def is_cache(folder) -> bool:
    """Whether a folder is a cache, finished or not."""
    return (Path(folder) / _LIST).exists()


# ---- reading ----


class Cache:
    """The clips of a finished cache, read from its shards as they are asked for.

    DataError for a cache of another space than `space`, one that is unfinished, and one of whose shards a byte is not as it was
    written: all are read through once, for their hashes.
    """

    def __init__(self, folder, space: dict):
        self.folder = Path(folder)
        listed = _read_list(self.folder)
        other = {key: (listed["space"].get(key), value) for key, value in space.items()}
        # A stride of null: the clips were sampled, not cut from videos.
        free = ("stride", "fps") if listed["space"].get("stride") is None else ()
        other = {key: pair for key, pair in other.items() if pair[0] != pair[1] and key not in free}
        if other:
            found = ", ".join(f"{key} {theirs} where this run has {ours}" for key, (theirs, ours) in other.items())
            raise DataError(
                f"Expected clips in {self.folder} that were prepared for this run's model and settings, found {found}; "
                "prepare them again, or set these as the cache has them."
            )
        if not listed["complete"]:
            raise DataError(
                f"Expected a finished cache in {self.folder}, found that preparing it was cut short; "
                "give that command again: it goes on."
            )
        shards = [shard for shard in listed["shards"] if shard["clips"]]
        for path, problem in zip(_paths(self.folder, shards), _problems(self.folder, shards), strict=True):
            if problem:
                raise DataError(f"Expected {path} as it was written, found it {problem}; {_AGAIN}.")
        self._paths, self._ends = _paths(self.folder, shards), list(accumulate(shard["clips"] for shard in shards))
        about = [_about(path, shard["clips"]) for path, shard in zip(self._paths, shards, strict=True)]
        self.captions = [caption for clips in about for _, caption in clips]
        self.left_out = _left_out(listed)
        self.rates = [float(rate) for shard in shards for rate, count in shard.get("rates", {}).items() for _ in range(count)]
        self.fingerprint = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
        if not self.captions:
            raise DataError(f"Expected clips in the cache {self.folder}, found that none could be used; prepare others.")

    def __len__(self) -> int:
        return len(self.captions)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """(clip (C, F, h, w), text embedding (L, D)), float32 on the CPU. DataError if its shard went bad meanwhile."""
        number = bisect.bisect_right(self._ends, index)
        path, row = self._paths[number], index - (self._ends[number - 1] if number else 0)
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_slice("latents")[row], file.get_slice("text")[row]
        except (OSError, SafetensorError, IndexError) as error:
            raise DataError(f"Expected {path} as it was written, found it unreadable ({error}); {_AGAIN}.") from error


def _read_list(folder: Path) -> dict:
    path = folder / _LIST
    try:
        listed = read_json(path)
        if listed["format"] > FORMAT:
            raise DataError(
                f"Expected a cache of format {FORMAT} or older in {folder}, found {listed['format']}; update this project."
            )
        for shard in listed["shards"]:
            whole = all(type(shard[key]) is int and 0 <= shard[key] < 10**9 for key in ("number", "clips"))
            counts = shard.get("rates", {}).items()
            if not whole or type(shard["sha256"]) is not str or any(type(n) is not int or not float(r) > 0 for r, n in counts):
                raise ValueError(f"a shard of another kind: {str(shard)[:99]}")
        _ = listed["space"].items(), listed["source"].items(), listed["complete"], _left_out(listed)
        return listed
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"Expected the list of a cache's shards in {path}, found it damaged ({type(error).__name__}: {error}); "
            "put it back, or prepare the clips into another folder."
        ) from error


def _left_out(listed: dict) -> list[Unusable]:
    """What was left out: of the videos that were found, then in the making of each shard. TypeError for a list of another kind."""
    every = [*listed.get("left_out", []), *(pair for shard in listed["shards"] for pair in shard["skipped"])]
    if not all(isinstance(one, list) and len(one) in (2, 3) and all(isinstance(part, str) for part in one) for one in every):
        raise TypeError("names and reasons of another kind")
    return [Unusable(*one) for one in every]


def _paths(folder: Path, shards: Sequence[dict]) -> list[Path]:
    return [_shard_path(folder, shard["number"]) for shard in shards]


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.safetensors"


def _problems(folder: Path, shards: Sequence[dict]) -> list[str]:
    """What is wrong with each shard: "missing", "torn or altered", or nothing."""

    def problem(path: Path, shard: dict) -> str:
        try:
            if path.exists() and not path.is_file():
                return "no file"
            return "" if _hash(path) == shard["sha256"] else "torn or altered"
        except OSError as error:
            return "missing" if isinstance(error, FileNotFoundError) else f"unreadable ({error.strerror})"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        checks = pool.map(problem, _paths(folder, shards), shards)
        quiet = len(shards) < _PROGRESS_FROM
        return list(tqdm(checks, "verifying shards", len(shards), disable=quiet, leave=False))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _about(path: Path, count: int) -> list[tuple[str, str]]:
    """(name, caption) of a shard's `count` clips. DataError for a shard that is none, though it is as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            clips = [(str(name), str(caption)) for name, caption in parsed(file.metadata()["clips"])]
            rows = {key: file.get_slice(key).get_shape()[0] for key in ("latents", "text")}
        if {len(clips), *rows.values()} != {count}:
            raise ValueError(f"{len(clips)} captions and {rows} where {count} clips are listed")
        return clips
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"Expected a shard of clips in {path}, found {type(error).__name__}: {error}; remove it: {_AGAIN}."
        ) from error


# ---- writing ----


def write_cache(
    folder, space: dict, source: dict, count: int, shard_clips: int, make: Maker, left_out: Sequence[Unusable] = ()
) -> tuple[int, list[Unusable]]:
    """Makes the `count` clips of a source and writes them as a cache into an existing folder; goes on where it was cut short.

    `source` says all that bears on what `make` makes, as plain JSON values. Shards that stand as they were written are kept, all
    others are made again: whatever happens in between, the result is the same to the byte. Returns the number of clips in the
    cache and those left out in the making; the list keeps them, and those `left_out` before, for who trains on the cache.
    DataError for a folder that holds a cache of something else, no room or no right to write.
    """
    folder, source = Path(folder), source | {"clips": count, "shard_clips": shard_clips}
    listed = {"format": FORMAT, "space": space, "source": source, "complete": False, "shards": []}
    if is_cache(folder):
        found = _read_list(folder)
        other = [key for key, value in (space | source).items() if (found["space"] | found["source"]).get(key) != value]
        if other:
            raise DataError(
                f"Expected to go on with the cache in {folder}, found one that was prepared with another {', '.join(other)}; "
                "set that back, or name another folder."
            )
        listed["shards"] = _intact(folder, found["shards"])
    if left_out:
        listed["left_out"] = [[one.name, one.reason, one.kind] for one in left_out]
    try:
        _write_all(folder, listed, make)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        cause = getattr(error, "strerror", None) or error
        raise DataError(
            f"Expected room and the right to write into {folder}, found: {cause}; make room and give the command again: it goes on."
        ) from error
    skipped = [Unusable(*one) for shard in listed["shards"] for one in shard["skipped"]]
    return sum(shard["clips"] for shard in listed["shards"]), skipped


def _intact(folder: Path, shards: list[dict]) -> list[dict]:
    kept = []
    for shard, problem in zip(shards, _problems(folder, shards), strict=True):
        if not problem:
            kept.append(shard)
        else:
            tqdm.write(f"{_shard_path(folder, shard['number'])} is {problem}: it is made again.")
    return kept


def _write_all(folder: Path, listed: dict, make: Maker) -> None:
    count, size = listed["source"]["clips"], listed["source"]["shard_clips"]
    for unfinished in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
        unfinished.unlink()
    stands = {shard["number"] for shard in listed["shards"]}
    parts = {number: range(start, min(start + size, count)) for number, start in enumerate(range(0, count, size))}
    todo = {number: part for number, part in parts.items() if number not in stands}
    _write_list(folder, listed)
    made = make(list(todo.values()))
    with tqdm(total=count, initial=count - sum(map(len, todo.values())), desc="preparing", unit="clip") as bar:
        for number, part in todo.items():
            clips, skipped = [], []
            for _ in part:
                clip = next(made)
                (clips if isinstance(clip, LatentClip) else skipped).append(clip)
                bar.update()
            shard = {
                "number": number,
                "clips": len(clips),
                "sha256": _write_shard(_shard_path(folder, number), clips),
                "skipped": [[clip.name, clip.reason, clip.kind] for clip in skipped],
            }
            if rates := Counter(f"{clip.rate:g}" for clip in clips if clip.rate):
                shard["rates"] = dict(sorted(rates.items()))
            listed["shards"] = sorted([*listed["shards"], shard], key=lambda shard: shard["number"])
            _write_list(folder, listed)
    listed["complete"] = True
    _write_list(folder, listed)


def _write_shard(path: Path, clips: list[LatentClip]) -> str:
    """Writes a shard, whole or not at all; returns its hash. One of no clips is an empty file of safetensors."""
    tensors = {}
    if clips:
        tensors = {"latents": torch.stack([c.latents for c in clips]), "text": torch.stack([c.text for c in clips])}
    # One key: safetensors writes several in random order, and the hash would change from one writing to the next.
    about = {"clips": json.dumps([(clip.name, clip.caption) for clip in clips], ensure_ascii=False)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, about))
    return _hash(path)


def _write_list(folder: Path, listed: dict) -> None:
    text = json.dumps(listed, indent=1, ensure_ascii=False)
    write_atomically(folder / _LIST, lambda temporary: temporary.write_text(text, encoding="utf-8"))
