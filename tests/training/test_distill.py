import errno
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from avdm2_nodes.diffusion.unets import video_predictor
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.student import read_student
from avdm2_nodes.files.student_unet import student_unet
from training.data.clips import write_clips
from training.method.export import export
from training.run.checkpoint import Checkpoints
from training.run.command_line import load_config
from training.run.config import ROOT, to_yaml
from training.run.folder import RunFolder
from training.run.meter import MEASURED
from training.world import scenes

SCRIPT = ROOT / "training" / "distill.py"


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("distil")


@pytest.fixture(scope="session")
def settings(work, stack_folder, make_config):
    """settings(run folder, ...): a YAML file of a tiny run on the tiny stack; with render, clips are rendered first."""

    def write(folder, **changes):
        sections = {
            "run": {"updates": 3, "sample_every": 2, "folder": str(work / folder)},
            "data": {"folder": str(work / "data"), "render": 5},
            "model": {"teacher": str(stack_folder)},
            "student": {"steps": [999, 499]},
            "warmup": {"updates": 1},
            "evaluation": {"teacher_steps": 2, "world": "miniature"},
        }
        for name, values in changes.items():
            sections[name] = sections.get(name, {}) | values if isinstance(values, dict) else values
        path = work / f"{folder}.yaml"
        path.write_text(to_yaml(make_config(**sections)))
        return path

    return write


def start(config, cwd, *arguments, stdin=None):
    """The command, as a process from another folder, with nothing of ours installed or on the path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(SCRIPT), "--config", str(config), *arguments]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=cwd, env=environment, stdin=stdin, text=True, **out)


@pytest.fixture(scope="session")
def finished(settings, work):
    """The folder of a run that nothing interrupted."""
    process = start(settings("finished"), work)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return work / "finished"


@pytest.fixture
def command(monkeypatch, capsys):
    """command(arguments): the script as a command within this process: (exit code, what it said on stderr)."""

    def inner(*arguments):
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        code = caught.value.code
        return (1, code) if isinstance(code, str) else (code, capsys.readouterr().err)  # Python prints a text and exits with 1

    return inner


def stats(folder):
    path = folder / "stats.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(names): from then on files of these names find no room when their bytes are to be on the disk."""
    names, written = set(), os.fsync

    def fsync(file):
        path = os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")
        if any(f".{name}." in path for name in names):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(file)

    monkeypatch.setattr(os, "fsync", fsync)

    def fill(*full):
        names.clear()
        names.update(full)

    return fill


# ---- what a run leaves ----


def test_a_run_leaves_everything_that_it_promises(finished):
    for name in ("student.safetensors", "report.json", "report.md", "clips.png", "clips.webp", "stats.jsonl", "config.yaml"):
        assert (finished / name).stat().st_size > 0, name
    assert (finished / "samples" / "update-000002.png").exists() and any((finished / "tensorboard").iterdir())
    lines = [json.loads(line) for line in stats(finished)]
    assert [line["update"] for line in lines] == [1, 2, 3, 4]
    assert {"sdm", "adm", "fake", "critic", "seconds", *MEASURED} < lines[-1].keys()
    rows = json.loads((finished / "report.json").read_text())["rows"]
    names = ["real clips (VAE)", "teacher 2 steps", "teacher 2 steps, no guidance"]
    names += ["teacher 2 steps, as a student", "teacher 1 step", "student 2 steps"]
    assert list(rows) == names and [rows[name].get("evaluations") for name in names] == [None, 4, 2, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks Linux which file is written")
def test_a_report_that_finds_no_room_is_told_and_made_when_there_is(command, settings, work, finished, full_disk):
    config, folder, names = settings("no_room"), work / "no_room", ["clips.png", "clips.webp", "report.json", "report.md"]
    for i, name in enumerate(names):
        full_disk(name)
        code, said = command("--config", config)
        assert code == 1 and "\n" not in said
        assert said == (
            f"Expected room and the right to write into {folder}, found: No space left on device; "
            "clear the way and give the command again: it goes on."
        )
        assert sorted(path.name for path in folder.iterdir() if path.name in names) == sorted(names[:i])
        assert not list(folder.glob(".*.tmp"))
    full_disk()
    assert command("--config", config)[0] in (0, None)
    assert all((folder / name).stat().st_size > 0 for name in names)
    assert_same_student(folder, finished)


def test_without_a_report_the_finished_student_s_clips_are_the_last_of_the_samples(finished, settings, work):
    output, _ = start(settings("unreported", evaluation={"report": False, "world": None}), work).communicate()
    left = {path.name for path in (work / "unreported").iterdir()}
    assert "student.safetensors" in left, output
    assert not left & {"report.json", "report.md", "clips.png", "clips.webp"}
    assert sorted(path.name for path in (work / "unreported" / "samples").iterdir()) == [
        "update-000002.png",
        "update-000004.png",
    ]
    assert_same_student(work / "unreported", finished)


def test_the_student_file_holds_the_averaged_weights(finished, stack):
    student = read_student(finished / "student.safetensors")
    _, state = Checkpoints(finished / "checkpoints", 3).latest()
    average = state["ema"]["shadow"]
    others = student.tensors.keys() - average.keys()
    assert average.keys() < student.tensors.keys() and all(name.endswith("pos_embed.pe") for name in others)
    assert all(torch.equal(student.tensors[name], average[name].half()) for name in average)
    built = dict(student_unet(student, stack.image_unet).named_parameters())
    assert all(torch.equal(built[name], average[name].half().float()) for name in average)
    info = student.info
    assert (info.holds, info.timesteps, info.frames, info.height, info.updates) == ("all", (999, 499), 8, 64, 3)
    assert info.base_hash == info.score_hash == weights_hash(stack.image_unet)
    assert "updates: 3" in info.training_config


@pytest.mark.parametrize(("train", "share_base"), [("motion", False), ("motion+lora", True), ("all", False)])
def test_an_exported_student_is_the_student_that_was_trained(
    stack, settings, make_distillation, tmp_path, train, share_base, random_clips
):
    config = load_config(["--config", str(settings("exported", model={"train": train, "share_base": share_base}))])
    run = make_distillation(stack, config)
    for step in range(3):
        run.update(step, random_clips)
    with RunFolder(tmp_path) as folder:
        path = export(config, folder, stack, run.roles, None)
    unet = student_unet(read_student(path), stack.image_unet)
    x, text = random_clips.batch([0])
    with torch.no_grad():
        for weight in run.roles.student_weights.values():
            weight.copy_(weight.half())  # as the file has them
        want = run.roles.student(x, torch.tensor([500]), text)
        got = video_predictor(unet)(x, torch.tensor([500]), text)
        teacher = run.roles.teacher(x, torch.tensor([500]), text)
    assert (want - teacher).abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_second_start_of_a_finished_run_trains_no_more(finished, settings):
    from training import distill

    before, lines = load_file(finished / "student.safetensors"), stats(finished)
    (finished / "report.md").unlink()
    distill.main(["--config", str(settings("finished"))])
    after = load_file(finished / "student.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert stats(finished) == lines and (finished / "report.md").exists()


# ---- killed at any moment ----


def kill_when(process, condition, limit=300, delay=0.0):
    """Waits until the condition holds, and a little longer, and kills the process, which must still be running."""
    end = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def assert_same_student(folder, other):
    a, b = (load_file(f / "student.safetensors") for f in (folder, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    figures = [
        [{k: v for k, v in json.loads(line).items() if k not in ("seconds", *MEASURED)} for line in stats(f)]
        for f in (folder, other)
    ]
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_a_run_that_was_killed_thrice_ends_bitwise_as_one_that_was_not(finished, settings, work):
    config, folder = settings("killed"), work / "killed"
    checkpoints = folder / "checkpoints"
    for moment in (
        lambda: any(checkpoints.glob(".*.tmp")) or len(stats(folder)) >= 1,  # the first checkpoint is being written
        lambda: len(stats(folder)) >= 3,
        lambda: len(stats(folder)) >= 4,  # the last update is done, its checkpoint and all that follows are not
    ):
        kill_when(start(config, work), moment)
    process = start(config, work)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert_same_student(folder, finished)
    assert not list(checkpoints.glob(".*.tmp"))


def test_a_run_whose_input_ends_stops_with_a_checkpoint_and_goes_on_bitwise(finished, settings, work):
    config, folder = settings("stopped", run={"save_every": 100}), work / "stopped"
    process = start(config, work, "--run.attached", "true", stdin=subprocess.PIPE)
    while len(stats(folder)) < 1:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    output, _ = process.communicate()  # closes its input
    done = len(stats(folder))
    assert process.returncode == 1 and f"Stopped after update {done} of 4; the same command goes on from there." in output
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{done:08d}.safetensors"]
    assert "attached" not in (folder / "config.yaml").read_text()
    output, _ = start(config, work).communicate()
    assert_same_student(folder, finished)


@pytest.mark.slow
def test_twenty_kills_at_random_moments(settings, work):
    long = {"run": {"updates": 60, "save_every": 3, "sample_every": 7}}
    process = start(settings("long", **long), work)
    assert process.wait() == 0
    config, folder, rng = settings("long-killed", **long), work / "long-killed", random.Random(0)
    for target in sorted(rng.sample(range(61), 20)):
        process = start(config, work)
        kill_when(process, lambda target=target: len(stats(folder)) >= target, 1200, rng.uniform(0, 0.5))
        print(f"killed after line {target} of 61, at checkpoint {len(list((folder / 'checkpoints').glob('step-*')))}")
    assert start(config, work).wait() == 0
    assert_same_student(folder, work / "long")


# ---- refusals: one sentence each, exit code 1 ----


@pytest.fixture
def data(finished):
    """The clips that the finished run has rendered."""


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.teacher", "gone"], "gone, found nothing"),
        (["--model.score_unet", "gone"], "gone, found nothing"),
        (["--data.folder", "gone", "--data.render", "null"], "gone, found nothing"),
        (["--student.lr", "-1"], "student.lr"),
        (["--sdm.wieght", "1"], "--sdm.weight"),
        (["--evaluation.clips", "2"], "evaluation.clips"),
    ],
)
def test_refusals(command, settings, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, message = command("--config", settings("refused"), "--run.folder", "run", *arguments)
    assert code == 1 and said in message and "\n" not in message.strip() and "Traceback" not in message
    assert not (tmp_path / "run" / "student.safetensors").exists()


@pytest.mark.usefixtures("data")
def test_other_settings_for_a_run_that_has_begun_are_refused(command, settings, finished):
    before = (finished / "student.safetensors").read_bytes()
    code, message = command("--config", settings("finished"), "--model.train", "motion")
    assert code == 1 and "model.train 'motion', was 'all'" in message
    assert (finished / "student.safetensors").read_bytes() == before


def test_a_motion_module_of_other_widths_is_refused(command, settings, make_motion, tmp_path):
    make_motion((32, 64, 64)).save_pretrained(tmp_path / "motion")
    code, message = command("--config", settings("refused"), "--model.motion", tmp_path / "motion")
    assert code == 1 and "(32, 64, 64)" in message


def test_a_stack_without_a_feature_net_is_refused(command, settings, stack_folder, tmp_path):
    shutil.copytree(stack_folder, tmp_path / "stack")
    (tmp_path / "stack" / "feature_net.safetensors").unlink()
    code, message = command("--config", settings("refused"), "--model.teacher", tmp_path / "stack")
    assert code == 1 and "feature_net.safetensors, found no file" in message


def test_a_run_folder_in_use_is_refused_by_the_real_command(settings, work, tmp_path):
    config = settings("used")
    with RunFolder(work / "used"):
        process = start(config, tmp_path)
        output, _ = process.communicate()
    assert process.returncode == 1
    assert f"in use by process {os.getpid()}" in output and "Traceback" not in output and len(output.splitlines()) == 1


def test_captions_beside_the_videos_serve_too(settings, tmp_path):
    """Anybody's folder: no rendering, captions in text files, a size of its own."""
    from training import distill

    clips = list(scenes.render_split(2, style="plain", held_out=False, seed=0))
    write_clips(tmp_path / "data", ((clip.frames, clip.content.caption) for clip in clips), scenes.FPS)
    (tmp_path / "data" / "captions.jsonl").unlink()
    for i, clip in enumerate(clips):
        (tmp_path / "data" / f"{i:05d}.txt").write_text(clip.content.caption)
    (tmp_path / "data" / "broken.mp4").write_bytes(b"no video")
    config = load_config(
        ["--config", str(settings("own", data={"folder": str(tmp_path / "data"), "render": None, "height": 48, "width": 32,
         "frames": 5}, run={"updates": 1, "folder": str(tmp_path / "run")}, evaluation={"world": None}))]
    )  # fmt: skip
    with RunFolder(config.run.folder) as run:
        path = distill.distil(config, run)
    info = read_student(path).info
    assert (info.frames, info.height, info.width) == (5, 48, 32)
    # No world's oracle can measure it: its clips are shown.
    assert (path.parent / "clips.png").exists() and not (path.parent / "report.json").exists()
