"""What training reads, damaged: clips, pictures, shards, caches, checkpoints, settings and run folders, each case fixed by a seed."""

import io
import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.avdm2_nodes.files.hostile import NASTY
from training.data.cache import LatentClip, write_cache
from training.data.video import write_video
from training.run.checkpoint import save_state
from training.run.config import DistillConfig, to_yaml

SPACE = {"vae": "a", "frames": 4, "stride": 1, "fps": None}
_WORDS = [
    b"[" * 100_000, b'{"a": ' * 5_000, b"9" * 5_000, b'"\\ud800"', b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b"\x1b[31m", b'"', b",",
    b"\r", b"\n\n", b"../a.mp4", b"n" * 300 + b".mp4", b"n/" * 3_000 + b"a.png", b"&a [*a]", b"NaN", b"1e400", b"\x83\x65",
    b"!!python/object/apply:os.system [ls]",
]  # fmt: skip
_ENCODINGS = ("utf-16", "utf-16-le", "utf-32", "cp500", "utf-7")


def make_seeds(folder: Path) -> dict[str, Path]:
    """A whole folder, or file, of every kind."""
    rng = np.random.default_rng(0)
    seeds = {kind: folder / kind for kind in ("clips", "tars", "pictures", "cache", "run")}
    for path in seeds.values():
        path.mkdir()
    seeds |= {"checkpoint": folder / "checkpoint", "config": folder / "config.yaml", "prompts": folder / "prompts.txt"}
    for name in ("a.mp4", "b.avi", "c.mkv"):
        write_video(seeds["clips"] / name, rng.integers(0, 256, (6, 32, 32, 3), np.uint8), 8)
    (seeds["clips"] / "captions.csv").write_text('file,caption\na.mp4,"a dog, running"\nb.avi,a café\n')
    (seeds["clips"] / "c.txt").write_text("a cat")
    with tarfile.open(seeds["tars"] / "a.tar", "w") as tar:
        for name in ("a.mp4", "b.avi"):
            tar.add(seeds["clips"] / name, name)
            text = b"a dog" if name[0] == "a" else b'{"caption": "a cat"}'
            entry = tarfile.TarInfo(f"{name[0]}.{'txt' if name[0] == 'a' else 'json'}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    for name in ("a.png", "b.jpg", "c.webp", "d.bmp"):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(seeds["pictures"] / name, exif=exif)
    (seeds["pictures"] / "captions.jsonl").write_text(
        '{"file": "a.png", "caption": "a dog"}\n{"file": "b.jpg", "caption": "é"}\n'
    )

    def make(parts):
        for part in parts:
            for i in part:
                yield LatentClip(f"{i}.mp4", f"clip {i}", torch.randn(4, 4, 2, 2), torch.randn(3, 8), 8.0)

    write_cache(seeds["cache"], SPACE, {"kind": "videos"}, 4, 2, make)
    seeds["checkpoint"].mkdir()
    for step in (1, 2):
        state = {"step": step, "seconds": 1.5, "weights": {"a": torch.randn(8, 8)}, "list": [torch.ones(2), 3, None]}
        save_state(seeds["checkpoint"] / f"step-{step:08d}.safetensors", state)
    seeds["config"].write_text(to_yaml(DistillConfig()))
    (seeds["run"] / "config.yaml").write_text(to_yaml(DistillConfig()))
    (seeds["run"] / "stats.jsonl").write_text("".join(json.dumps({"update": i, "loss": 0.5}) + "\n" for i in range(1, 9)))
    (seeds["run"] / "clips.json").write_text(json.dumps({"clips": 4, "sha256": "0" * 64}))
    seeds["prompts"].write_text("a dog\na cat with a café\n")
    return seeds


def make_case(seed: int, number: int, seeds: dict[str, Path], folder: Path) -> tuple[str, str, Path]:
    """(kind, what was done, path) of a case; it writes into `folder`."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choice([*seeds])
    source, path = seeds[kind], folder / seeds[kind].name
    if source.is_dir():
        shutil.copytree(source, path)
    else:
        shutil.copy(source, path)
    done = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
        if not files:
            break
        file = rng.choice(files)
        how = rng.choice(
            [_bytes] * 3 + [_place] + ([_text] * 5 if file.suffix in (".csv", ".jsonl", ".json", ".yaml", ".txt") else [])
        )
        done.append(f"{file.name} {how(rng, file)}")
    return kind, "; ".join(done), path


def _place(rng: random.Random, file: Path) -> str:
    what = rng.randrange(6)
    data = file.read_bytes()
    file.unlink()
    if what == 0:
        os.mkfifo(file)
    elif what == 1:
        file.mkdir()
    elif what == 2:
        file.symlink_to(file.parent / "nowhere")
    elif what == 3:
        file.symlink_to(file)
    elif what == 4:
        file.symlink_to("/dev/zero")
    else:
        file.with_name(rng.choice(["é", "x.tar", "captions.jsonl", "captions.csv", "cover.png", "y.mp4"])).write_bytes(data)
    return f"place {what}"


def _bytes(rng: random.Random, file: Path) -> str:
    data, what = bytearray(file.read_bytes()), rng.randrange(7)
    where = rng.randrange(max(1, min(len(data), rng.choice([64, 512, 10**9]))))
    if what == 0:
        del data[where:]
    elif what == 1:
        for _ in range(rng.choice([1, 3, 50])):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif what == 2:
        data[where : where + 4096] = bytes(len(data[where : where + 4096]))
    elif what == 3:
        data[where:where] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 8, 100])))
    elif what == 4:
        data = bytearray(
            rng.choice(
                [b"", b"\0" * 4096, b"<html>", bytes(rng.randrange(256) for _ in range(2000)), b"RIFF\xff\xff\xff\xffAVI "]
            )
        )
    elif what == 5:
        # Sizes and counts are mostly four bytes in a row.
        data[where : where + 4] = rng.choice(
            [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\1\0\0"]
        )
    else:
        data += data[where:]
    file.write_bytes(data)
    return f"bytes {what}"


def _text(rng: random.Random, file: Path) -> str:
    data, what = file.read_bytes(), rng.randrange(4)
    if what == 0:
        where = rng.randrange(len(data) + 1)
        file.write_bytes(data[:where] + rng.choice(_WORDS) + data[where:])
    elif what == 1:
        file.write_bytes(data.decode("utf-8", "replace").encode(rng.choice(_ENCODINGS), "replace"))
    elif what == 2:
        lines = data.splitlines(keepends=True)
        rng.shuffle(lines)
        file.write_bytes(b"".join(rng.choices(lines, k=len(lines))) if lines else b"")
    else:
        _values(rng, file, data)
    return f"text {what}"


def _values(rng: random.Random, file: Path, data: bytes) -> None:
    """One value of JSON, or of a line of it, in place of another."""
    lines = [data] if file.suffix == ".json" else data.splitlines()
    if not lines:
        return
    i = rng.randrange(len(lines))
    try:
        said = json.loads(lines[i])
        place = said
        while isinstance(place, (dict, list)) and place:
            keys = [*place] if isinstance(place, dict) else range(len(place))
            key = rng.choice(keys)
            if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
                place[key] = rng.choice(NASTY)
                break
            place = place[key]
        lines[i] = json.dumps(said).encode()
    except ValueError:
        key, colon, _ = lines[i].partition(b":")
        lines[i] = key + colon + b" " + json.dumps(rng.choice(NASTY)).encode()
    file.write_bytes(b"\n".join(lines))
