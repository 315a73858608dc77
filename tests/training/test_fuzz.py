"""Everything that training reads against damage and malice: each is read, left out with a word or refused in a sentence, in bounds.

FUZZ_SEED and FUZZ_CASES choose other cases, as in tests/avdm2_nodes/files/test_fuzz.py.
"""

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.avdm2_nodes.files.bounded import report, run_numbered, unexpected
from tests.training.hostile import SPACE, make_case, make_seeds
from training.data.cache import Cache
from training.data.clips import ClipFolder
from training.data.pictures import read_pictures
from training.data.teacher_clips import read_prompts
from training.data.unusable import Unusable
from training.data.video import VideoError
from training.method.errors import EXPECTED_ERRORS
from training.run.checkpoint import Checkpoints
from training.run.command_line import load_config
from training.run.config import DistillConfig
from training.run.folder import RunFolder

SEED = int(os.environ.get("FUZZ_SEED", "0"))
CASES = int(os.environ.get("FUZZ_CASES", "2000"))


def clips(path: Path) -> list[Unusable]:
    found = ClipFolder(path, 4, 16, 16)
    found.fingerprint()
    for i in range(len(found)):
        assert found.captions[i] and found.read(i).shape == (4, 16, 16, 3)
    return found.left_out


def pictures(path: Path) -> None:
    pixels, captions = read_pictures(path, 16, 16)
    assert len(pixels) == len(captions) and pixels.shape[1:] == (16, 16, 3) and pixels.dtype == torch.uint8


def cache(path: Path) -> None:
    found = Cache(path, SPACE)
    for i in range(len(found)):
        found.read(i)


def checkpoint(path: Path) -> None:
    found = Checkpoints(path, 3)
    latest = found.latest(("step", "seconds", "weights"))
    if latest is not None:
        # What is read is what was written: damage never passes.
        assert latest[1]["step"] == latest[0] and latest[1]["seconds"] == 1.5 and latest[1]["weights"]["a"].isfinite().all()
    found.save(9, {"step": 9})


def run(path: Path) -> None:
    with RunFolder(path) as folder:
        folder.start(DistillConfig(), 4)
        folder.write_stats(5, {"loss": 1.0})
        folder.hold_to({"clips": 4, "sha256": "0" * 64}, resumes=True)


READERS = {
    "clips": clips, "tars": clips, "pictures": pictures, "cache": cache, "checkpoint": checkpoint, "run": run,
    "config": lambda path: load_config(["--config", str(path)]), "prompts": read_prompts,
}  # fmt: skip


def require_line(error: Exception) -> None:
    message = str(error)
    assert message and len(message) < 20_000, f"no sentence: {message[:200]!r}"
    assert "Traceback" not in message and all(line.isprintable() for line in message.splitlines()), (
        f"no text: {message[:200]!r}"
    )


def fuzzed(seed: int, count: int, seeds: dict, work: Path) -> dict:
    def one(number: int):
        folder = work / f"case {number}"
        folder.mkdir()
        kind, done, path = make_case(seed, number, seeds, folder)

        def read() -> str:
            try:
                READERS[kind](path)
                return "read"
            except (*EXPECTED_ERRORS, VideoError) as error:
                try:
                    require_line(error)
                    return "refused"
                except AssertionError as problem:
                    return f"VIOLATION: {kind}, {done}: {problem}"
            except BaseException as error:
                return unexpected(f"{kind}, {done}", error)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        return read

    logging.disable(logging.CRITICAL)
    try:
        return run_numbered(count, one)
    finally:
        logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    torch.set_num_threads(1)
    return make_seeds(tmp_path_factory.mktemp("seeds"))


def test_seeds_are_read(seeds, tmp_path):
    """What the cases are made of is whole: a refusal of them would hide all else."""
    for kind, source in seeds.items():
        path = tmp_path / source.name
        shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)
        assert not READERS[kind](path) or kind in ("config", "prompts")


def test_a_few_cases(seeds, tmp_path, capsys):
    said = fuzzed(SEED, 60, seeds, tmp_path)
    with capsys.disabled():
        report(f"seed {SEED}", said)


@pytest.mark.slow
def test_many_cases(seeds, tmp_path, capsys):
    said = fuzzed(SEED + 1, CASES, seeds, tmp_path)
    with capsys.disabled():
        report(f"seed {SEED + 1}", said)
