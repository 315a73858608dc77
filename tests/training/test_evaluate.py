import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from avdm2_nodes.diffusion.samplers import sample_student
from avdm2_nodes.diffusion.unets import video_predictor
from avdm2_nodes.files.architecture import unet_config
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.student import read_student, write_student
from avdm2_nodes.files.student_info import StudentInfo
from avdm2_nodes.files.student_unet import student_unet
from training import evaluate
from training.data.clips import write_clips
from training.evaluation.backbones import BackboneError, load_clip
from training.evaluation.report import QUESTIONS
from training.evaluation.rows import Bench
from training.run.folder import RunFolderError


@pytest.fixture(scope="module")
def student_file(_loaded_stack, tmp_path_factory):
    """The teacher itself as a student of two steps."""
    stack, path = _loaded_stack, tmp_path_factory.mktemp("student") / "student.safetensors"
    info = StudentInfo(
        title="tiny", date="2026-01-01", license="Apache-2.0", holds="all", timesteps=(999, 499), frames=8, height=64, width=64,
        unet_config=unet_config(stack.teacher), base_name="tiny", base_hash=weights_hash(stack.image_unet), updates=0,
        training_config="{}",
    )  # fmt: skip
    write_student(path, dict(stack.teacher.named_parameters()), info)
    return path


@pytest.fixture
def run(stack_folder, student_file, tmp_path, monkeypatch):
    """run(options): the command on six clips a row, with a short teacher; the folder that it leaves."""
    full = evaluate.teacher_method
    monkeypatch.setattr(evaluate, "teacher_method", lambda name, p, s, steps, g: full(name, p, s, min(steps, 2), g))

    def inner(*options):
        arguments = [
            "--model",
            str(stack_folder),
            "--student",
            str(student_file),
            "--clips",
            "6",
            "--out",
            str(tmp_path),
            *options,
        ]
        evaluate.main(arguments)
        return next(path.parent for path in tmp_path.glob("*/report.json"))

    return inner


def test_the_table_has_every_row_and_its_pictures_and_goes_into_a_page(run, tmp_path):
    page = tmp_path / "results.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    folder = run("--page", str(page))
    rows = json.loads((folder / "report.json").read_text())["rows"]
    assert list(rows) == [
        "real clips (VAE)",
        "teacher 25 steps, guided",
        "teacher 4 steps, guided",
        "teacher 2 steps, guided",
        "teacher 4 steps, no guidance",
        "teacher 4 steps, as a student",
        *(f"student {n}" for n in ("1 step", "2 steps", "4 steps", "8 steps")),
    ]
    assert [rows[f"student {n}"]["evaluations"] for n in ("1 step", "2 steps", "4 steps", "8 steps")] == [1, 2, 4, 8]
    assert all((folder / name).stat().st_size > 0 for name in ("report.md", "clips.png", "clips.webp", "plot.png"))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "| student 4 steps |" in text
    assert [line for line in text.splitlines() if line.startswith("#")] == [f"### {question}" for question in QUESTIONS]


def test_real_videos_and_public_networks_measure_where_there_is_no_oracle(run, networks, tmp_path):
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 256, (9, 8, 64, 64, 3), dtype=np.uint8)
    write_clips(tmp_path / "real", ((clip, f"a red circle {i}") for i, clip in enumerate(clips)), 8)
    folder = run("--real", str(tmp_path / "real"), "--i3d", str(networks / "i3d.pt"), "--clip", str(networks / "clip"))
    report = json.loads((folder / "report.json").read_text())
    assert report["clips a row"] == 6 and "captions of real" in report["prompts"] and "sha256" in report["i3d"]
    for name in ("real clips (VAE)", "teacher 25 steps, guided", "student 4 steps"):
        assert {"FVD", "CLIPScore"} <= report["rows"][name].keys() and "accuracy" not in report["rows"][name]

    score = load_clip(networks / "clip")
    shown = load_file(folder / "rows" / "student-4-steps.safetensors")
    alone = score(shown["shown"][1], "a red circle 1")
    assert shown["CLIPScore"][1].item() == pytest.approx(alone, rel=1e-4)


def test_real_videos_without_a_network_are_refused(run, tmp_path):
    with pytest.raises(BackboneError, match="--i3d, --videomae or --clip"):
        run("--real", str(tmp_path))


def test_a_student_is_sampled_by_its_own_chain(stack, student_file, tmp_path):
    student = read_student(student_file)
    euler = dataclasses.replace(student, info=dataclasses.replace(student.info, chain="euler"))
    noise, text = torch.randn(1, 4, 8, 8, 8), stack.encode_text(["a red circle"])
    clips = []
    for one in (student, euler):
        method = evaluate.student_methods(stack, one, [2])[0]
        with torch.no_grad():
            clips.append(method.sample(noise, text, [torch.Generator().manual_seed(0)]))
    predict = video_predictor(student_unet(euler, stack.image_unet))
    with torch.no_grad():
        expected = sample_student(predict, noise, text, (999, 499), [torch.Generator()], chain="euler")
    assert torch.allclose(clips[1], expected) and not torch.allclose(clips[0], clips[1])


def test_rows_that_were_measured_are_not_sampled_again(run, monkeypatch):
    first = (run() / "report.json").read_text()
    monkeypatch.setattr(Bench, "sample", lambda *_: pytest.fail("a row was sampled again"))
    assert (run() / "report.json").read_text() == first


def test_places_that_cannot_be_written_are_told_before_anything_is_measured(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_stack", lambda *_, **__: pytest.fail("read before the places were looked at"))
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"file/below, found: Not a directory; name another with --out"):
        run("--out", str(tmp_path / "file" / "below"))
    with pytest.raises(
        RunFolderError, match=r"Expected a page for the tables at .*gone\.md, found nothing; name another with --page"
    ):
        run("--page", str(tmp_path / "gone.md"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
