import os
import subprocess
import sys

import pytest
from diffusers import AnimateDiffPipeline

from avdm2_nodes.files.architecture import unet_config
from avdm2_nodes.files.containers import read_layout
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.recognise import recognise
from avdm2_nodes.files.student import write_student
from avdm2_nodes.files.student_info import StudentInfo
from training import export
from training.run.config import ROOT


@pytest.fixture
def student_file(stack, tmp_path):
    unet = stack.teacher
    info = StudentInfo(
        holds="motion", timesteps=(999, 749, 499, 249), frames=8, height=64, width=64, unet_config=unet_config(unet),
        base_name="tiny", base_hash=weights_hash(stack.image_unet), updates=1, training_config="", title="t", date="2026-01-01",
        license="Apache-2.0",
    )  # fmt: skip
    path = tmp_path / "mine.safetensors"
    write_student(path, {name: p for name, p in unet.named_parameters() if "motion_modules" in name}, info)
    return path


def test_animatediff_files_from_another_folder(student_file, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "training" / "export.py")]
    arguments = ["--student", "mine.safetensors", "--format", "animatediff", "--out", "out"]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [os.path.join("out", "mine_motion.safetensors")]
    assert recognise(read_layout(tmp_path / "out" / "mine_motion.safetensors")).id == "motion-v3"


def test_a_diffusers_folder(student_file, stack_folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--student", str(student_file), "--format", "diffusers", "--out", str(out), "--model", str(stack_folder)]
    assert export.main(arguments) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert export.main(arguments) == 1
    assert capsys.readouterr().err.startswith("Expected a new or empty folder at ")
    assert AnimateDiffPipeline.from_pretrained(out, local_files_only=True).scheduler.config.beta_schedule == "linear"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--student": "none.safetensors"}, "Expected a student file at none.safetensors, found nothing"),
        ({"--model": "nowhere"}, "Expected a model folder in the diffusers layout at nowhere, found nothing"),
        ({"--model": str(ROOT / "miniature")}, "another architecture"),
        (
            {"--format": "animatediff", "--student": str(ROOT / "training" / "export.py")},
            "Expected a model file (.safetensors",
        ),
    ],
)
def test_errors_are_one_sentence(student_file, stack_folder, tmp_path, monkeypatch, capsys, changes, said):
    monkeypatch.chdir(tmp_path)
    arguments = {
        "--student": str(student_file),
        "--format": "diffusers",
        "--out": "out",
        "--model": str(stack_folder),
    } | changes
    assert export.main([text for pair in arguments.items() for text in pair]) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("Expected") and said in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["animatediff", "diffusers"])
def test_a_place_that_cannot_be_written_is_told_before_the_base_is_read(student_file, tmp_path, capsys, kind):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    places = [tmp_path / "used" / "file", tmp_path / "used" / "file" / "below", tmp_path / ("o" * 255) / ("o" * 255)]
    places += [tmp_path / "used"] if kind == "diffusers" else []
    for place in places[:2] + places[3:]:
        arguments = ["--student", str(student_file), "--format", kind, "--out", str(place), "--model", "nowhere"]
        assert export.main(arguments) == 1
        (message,) = capsys.readouterr().err.splitlines()
        assert (str(place) in message and "nowhere" not in message and message.endswith("another.")) or "--out." in message
    assert sorted(os.listdir(tmp_path)) == ["mine.safetensors", "used"]


@pytest.mark.parametrize("arguments", [[], ["--student", "a", "--format", "onnx", "--out", "b"], ["--format", "diffusers"]])
def test_arguments_that_cannot_be(arguments):
    with pytest.raises(SystemExit) as caught:
        export.main(arguments)
    assert caught.value.code == 2
