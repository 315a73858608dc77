"""The readers of every kind of file against damaged and hostile ones: each is read or refused in a sentence, in time and in bounds.

FUZZ_SEED and FUZZ_CASES choose other cases, as in: FUZZ_SEED=3 FUZZ_CASES=500 python -m pytest -m slow tests/avdm2_nodes/files/test_fuzz.py
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from avdm2_nodes.files.clip import clip_tokenizer
from avdm2_nodes.files.containers import read_layout, read_tensors
from avdm2_nodes.files.licence import licence_of
from avdm2_nodes.files.lora import load_lora_file
from avdm2_nodes.files.motion import load_motion_file
from avdm2_nodes.files.peers import is_peer, load_peer
from avdm2_nodes.files.recognise import recognise
from avdm2_nodes.files.sd15 import load_sd15_file
from avdm2_nodes.files.sentences import FileError
from avdm2_nodes.files.sparse_control import read_sparse_control
from avdm2_nodes.files.stack import load_image_unet, load_motion, load_stack, load_tokenizer, load_vae
from avdm2_nodes.files.student import read_student
from avdm2_nodes.files.student_unet import student_unet
from avdm2_nodes.files.style import is_style, read_style, require_student
from avdm2_nodes.files.taesd import load_taesd_file
from tests.avdm2_nodes.files.bounded import report, run_bounded, run_numbered, unexpected
from tests.avdm2_nodes.files.hostile import make_case, make_seeds
from training import export

SEED = int(os.environ.get("FUZZ_SEED", "0"))
CASES = int(os.environ.get("FUZZ_CASES", "2000"))

ALL = [
    lambda path, _: recognise(read_layout(path)),
    lambda path, _: read_tensors(path),
    lambda path, _: (is_peer(path), is_style(path)),
]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, stack_folder):
    torch.set_num_threads(1)
    return make_seeds(tmp_path_factory.mktemp("seeds"), stack_folder)


def readers(kind: str) -> tuple[list, list]:
    """What reads a file of this kind and what reads each, as functions of the path and the stack that the seeds were made of."""

    def student(path, base):
        student = read_student(path)
        made = student_unet(student, base.image_unet)
        return made, student.tensors

    def exported(path, base):
        try:
            status = export.main(["--student", str(path), "--format", "animatediff", "--out", str(path.parent / "out")])
        except SystemExit as error:  # of a path that no file can have, after its usage
            status = 1 if error.code == 2 else error.code
        assert status in (0, 1), "another exit status"

    def style(path, base):
        style = read_style(path)
        require_student(style, base.student)
        return style.tensors

    def folder(path, base):
        return load_stack(path), licence_of(path)

    def parts(path, base):
        for load, part in (
            (load_vae, "vae"),
            (load_image_unet, "unet"),
            (load_motion, "motion_adapter"),
            (load_tokenizer, "tokenizer"),
        ):
            try:
                load(path / part)
            except FileError as error:
                require_sentence(error)

    def vocabulary(path, base):
        return clip_tokenizer(path / "tokenizer")

    def lora(path, base):
        return load_lora_file(path, {name: p.shape for name, p in base.image_unet.named_parameters()})

    def peer(path, base):
        return load_peer(path, base.image_unet)

    def motion(path, base):
        return load_motion_file(path, norm_groups=8), load_motion(path)

    def checkpoint(path, base):
        return *load_sd15_file(path), load_image_unet(path)

    def sparse(path, base):
        file = read_sparse_control(path)
        assert file.hint_channels
        return dict(file.tensors)

    def taesd(path, base):
        return load_taesd_file(path)

    own = {
        "student": [student, exported],
        "style": [style],
        "motion": [motion, peer],
        "peer": [peer],
        "animatelcm": [motion, peer],
        "twin": [motion],
        "video-unet": [motion],
        "lora": [lora],
        "sd15": [checkpoint],
        "sparse": [sparse],
        "taesd": [taesd],
        "stack": [folder, parts, vocabulary],
    }
    own |= {"student-motion": own["student"], "student-lora": own["student"]}
    return own[kind], [] if kind == "stack" else ALL


def require_sentence(error: FileError) -> None:
    message = str(error)
    assert message.startswith("Expected") and len(message) < 1600, f"no sentence: {message[:200]!r}"
    assert message.isprintable(), f"no line: {message[:200]!r}"


def require_usable(result: object) -> None:
    """An AssertionError for a network, or weights, that are no finite numbers."""
    for one in result if isinstance(result, tuple) else (result,):
        if isinstance(one, nn.Module):
            one = dict(one.named_parameters()) | dict(one.named_buffers())
        if isinstance(one, dict):
            for name, tensor in one.items():
                if isinstance(tensor, torch.Tensor):
                    assert not tensor.is_meta, f"accepted {name} without values"
                    assert not tensor.is_floating_point() or torch.isfinite(tensor.float()).all(), f"accepted {name} with NaN"


def asks_for_much(error: BaseException | None) -> bool:
    """True where a limit on memory ended a reader, whatever it was told as."""
    while error is not None:
        words = str(error)
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in words or "Cannot allocate memory" in words:
            return True
        error = error.__cause__ or error.__context__
    return False


def read(reader, path, base) -> str:
    try:
        result = reader(path, base)
        if reader not in ALL:
            require_usable(result)
        return "read"
    except FileError as error:
        require_sentence(error)
        assert not asks_for_much(error), f"asked for gigabytes: {error}"
        return "refused"


def fuzzed(seed: int, count: int, seeds: dict, work: Path, base) -> dict:
    marker = work / "marker"

    def run(number: int):
        folder = work / f"case {number}"
        folder.mkdir()
        kind, done, path = make_case(seed, number, seeds, folder, marker)
        own, common = readers(kind)

        def read_all() -> str:
            try:
                said = read(own[number % len(own)], path, base)
                for reader in common:
                    read(reader, path, base)
                assert not marker.exists(), "a payload ran"
                return said
            except BaseException as error:
                return unexpected(f"{kind}, {done}", error)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        return read_all

    said = run_numbered(count, run)
    assert not marker.exists()
    return said


@pytest.fixture(scope="module")
def base(stack_folder, seeds):
    stack = load_stack(stack_folder)
    stack.student = read_student(seeds["student"])
    return stack


def test_seeds_are_read(seeds, base):
    """What the cases are made of is whole: a refusal of them would hide all else."""
    for kind, path in seeds.items():
        for reader in readers(kind)[0]:
            if reader.__name__ not in ("vocabulary", "exported") and (kind, reader.__name__) not in (
                ("motion", "peer"),
                ("animatelcm", "motion"),
            ):
                reader(path, base)


def test_a_few_cases(seeds, base, tmp_path, capsys):
    said = fuzzed(SEED, 20, seeds, tmp_path, base)
    with capsys.disabled():
        report(f"seed {SEED}", said)


@pytest.mark.slow
def test_many_cases(seeds, base, tmp_path, capsys):
    said = fuzzed(SEED + 1, CASES, seeds, tmp_path, base)
    with capsys.disabled():
        report(f"seed {SEED + 1}", said)


def test_what_leaves_its_bounds_is_told(tmp_path):
    """The fuzz itself: memory, processor and waiting beyond the bounds, and a crash, are each a line of the report."""

    def run(case: str):
        def inner() -> str:
            if case == "memory":
                bytearray(5 * 2**28)
            elif case == "crash":
                os.kill(os.getpid(), 11)
            elif case == "loop":
                while True:
                    pass
            return "read"

        return inner

    said = dict(run_bounded(["fine", "memory", "crash", "loop", "fine too"], run, 2, seconds=6))
    assert said["fine"].words == said["fine too"].words == "read" and said["memory"].taken > 2**30
    for case, word in (("memory", "MB taken"), ("crash", "signal 11"), ("loop", "signal 27")):
        assert word in said[case].words
    with pytest.raises(AssertionError, match=r"(?s)(case (memory|crash|loop).*){3}"):
        report("these", said)
