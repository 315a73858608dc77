import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import webdataset

from avdm2_nodes.diffusion.samplers import draw_noise, sample_teacher
from avdm2_nodes.diffusion.unets import video_predictor
from avdm2_nodes.files.student import read_student
from training import distill, prepare
from training.data import DataError, teacher_clips
from training.data.cache import Cache, is_cache, space_of
from training.data.clips import ClipFolder, write_clips
from training.data.latents import open_clips
from training.run.command_line import load_config
from training.run.config import ROOT, ConfigError, to_yaml
from training.run.folder import RunFolder, RunFolderError
from training.run.randomness import keyed_generator
from training.world import scenes

SCRIPT = ROOT / "training" / "prepare.py"
CPU = torch.device("cpu")
GOOD = 7


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """A folder of seven clips and, between them, three that cannot be used."""
    folder = tmp_path_factory.mktemp("videos") / "set"
    clips = [(clip.frames, clip.content.caption) for clip in scenes.render_split(GOOD, style="plain", held_out=False, seed=0)]
    write_clips(folder, clips, scenes.FPS)
    data = (folder / "00003.mp4").read_bytes()
    (folder / "00003b.mp4").write_bytes(data[: len(data) // 2])
    (folder / "00004b.mp4").write_bytes(data)  # has no caption
    (folder / "00005b.mp4").write_text("no video")
    with (folder / "captions.jsonl").open("a") as table:
        for name in ("00003b.mp4", "00005b.mp4"):
            table.write(json.dumps({"file": name, "caption": "bad"}) + "\n")
    return folder


@pytest.fixture(scope="session")
def settings(tmp_path_factory, videos, stack_folder, make_config):
    """settings(section={...}): a YAML file of a tiny run on those clips and the tiny stack."""
    folder = tmp_path_factory.mktemp("settings")

    def write(**changes):
        sections = {
            "run": {"updates": 2, "folder": str(folder / "run"), "sample_every": 9},
            "data": {"folder": str(videos)},
            "model": {"teacher": str(stack_folder)},
            "student": {"steps": [999, 499]},
            "evaluation": {"teacher_steps": 2, "world": None},
        }
        for name, values in changes.items():
            sections[name] = sections[name] | values
        path = folder / f"{len(list(folder.iterdir()))}.yaml"
        path.write_text(to_yaml(make_config(**sections)))
        return path

    return write


def run(out, config, *arguments):
    prepare.main(["--out", str(out), "--config", str(config), "--shard-clips", "2", *map(str, arguments)])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}


@pytest.fixture(scope="session")
def prepared(settings, tmp_path_factory):
    """What an unbroken command leaves; one worker decodes."""
    out = tmp_path_factory.mktemp("prepared") / "cache"
    run(out, settings(), "--workers", "1")
    return out


def opened(stack, config, *arguments):
    return open_clips(load_config(["--config", str(config), *map(str, arguments)]), stack, CPU)


# ---- from videos ----


def test_training_gets_the_same_batches_from_videos_and_from_the_cache(stack, settings, prepared):
    raw, cached = opened(stack, settings()), opened(stack, settings(), "--data.folder", prepared)
    assert len(raw) == len(cached) == GOOD and raw.captions == cached.captions
    for batch in ([0, 1, 2, 3, 4, 5, 6], [6, 2, 2], [4]):
        for a, b in zip(raw.batch(batch), cached.batch(batch), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype == torch.float32
    assert torch.equal(raw.text(["", "x"]), cached.text(["", "x"]))


@pytest.mark.parametrize("workers", [0, 3])
def test_the_cache_is_the_same_whatever_the_number_of_workers(settings, prepared, tmp_path, workers):
    run(tmp_path / "cache", settings(), "--workers", workers)
    assert contents(tmp_path / "cache") == contents(prepared)


def test_bad_clips_are_named_skipped_and_counted(settings, tmp_path, caplog):
    with caplog.at_level("INFO"):
        run(tmp_path / "cache", settings(), "--workers", "0")
    for name in ("00003b.mp4", "00004b.mp4", "00005b.mp4"):
        assert caplog.text.count(f"Skipped {name}: Expected") == 1
    assert f"{GOOD} clips are in {tmp_path / 'cache'}, 3 skipped" in caplog.text
    assert "3 skipped: 2 damaged, 1 without a caption" in caplog.text


def test_strict_makes_them_an_error_here_and_in_training(stack, settings, videos, prepared, tmp_path):
    with pytest.raises(DataError, match=r"data\.strict.*1 skipped: 1 without a caption; first 00004b\.mp4"):
        run(tmp_path / "cache", settings(), "--workers", "0", "--data.strict", "true")
    with pytest.raises(DataError, match=r"data\.strict.*3 skipped: .*2 damaged"):
        opened(stack, settings(), "--data.folder", prepared, "--data.strict", "true")
    good = tmp_path / "good"
    shutil.copytree(videos, good, ignore=shutil.ignore_patterns("*b.mp4"))
    with pytest.raises(DataError, match=r"2 skipped: 2 missing"):  # the table names them
        run(tmp_path / "cache", settings(), "--workers", "0", "--data.folder", good, "--strict")


def test_frames_beyond_the_positions_are_refused_before_anything_is_read(settings, prompts, tmp_path):
    for arguments in (["--data.folder", tmp_path / "gone"], ["--prompts", prompts]):
        with pytest.raises(DataError, match=r"data\.frames of 32 at most.*found 33"):
            run(tmp_path / "cache", settings(), "--data.frames", "33", *arguments)
    assert not is_cache(tmp_path / "cache")


def test_clips_are_resampled_by_time_where_it_is_said(stack, settings, videos, tmp_path):
    run(tmp_path / "cache", settings(), "--workers", "0", "--data.fps", "16", "--data.frames", "8")
    config = settings(data={"fps": 16.0, "frames": 8})
    raw, cached = opened(stack, config), opened(stack, config, "--data.folder", tmp_path / "cache")
    assert all(torch.equal(a, b) for a, b in zip(raw.batch([0, 3]), cached.batch([0, 3]), strict=True))
    with pytest.raises(DataError, match=r"fps 16\.0 where this run has None"):
        opened(stack, settings(), "--data.folder", tmp_path / "cache", "--data.frames", "8")


def test_tar_shards_are_prepared_too(stack, settings, videos, prepared, tmp_path):
    captions = {row["file"]: row["caption"] for row in map(json.loads, (videos / "captions.jsonl").read_text().splitlines())}
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for name, caption in sorted(captions.items()):
            tar.write({"__key__": name[:-4], "mp4": (videos / name).read_bytes(), "txt": caption})
    run(tmp_path / "cache", settings(data={"folder": str(tmp_path / "*.tar")}), "--workers", "1")
    ours, theirs = Cache(tmp_path / "cache", _space(stack, settings())), Cache(prepared, _space(stack, settings()))
    assert ours.captions == theirs.captions
    for i in range(GOOD):
        assert all(torch.equal(a, b) for a, b in zip(ours.read(i), theirs.read(i), strict=True))


def _space(stack, config):
    return space_of(stack, load_config(["--config", str(config)]).data)


def test_the_space_is_that_of_the_weights_and_the_settings(stack, settings):
    def space(**data):
        return _space(stack, settings(data=data))

    before = space()
    for key, value in {"frames": 4, "height": 32, "width": 32, "stride": 2}.items():
        assert space(**{key: value}) == before | {key: value}
    with torch.no_grad():
        next(stack.vae.parameters()).add_(1)
    assert {key for key, value in space().items() if value != before[key]} == {"vae"}
    with torch.no_grad():
        next(stack.text_encoder.parameters()).add_(1)
    assert {key for key, value in space().items() if value != before[key]} == {"vae", "text_encoder"}


def test_a_worker_that_ends_is_told_and_nothing_is_lost(settings, prepared, tmp_path, monkeypatch):
    decode = ClipFolder.decode

    def last_moment(clips, index):
        if index == 6:
            os.kill(os.getpid(), signal.SIGKILL)  # as a system short of memory does
        return decode(clips, index)

    monkeypatch.setattr(ClipFolder, "decode", last_moment)
    with pytest.raises(DataError, match=r"processes that decode to go on, found: .*--workers") as caught:
        run(tmp_path / "cache", settings(), "--workers", "1")
    assert "\n" not in str(caught.value) and is_cache(tmp_path / "cache")
    monkeypatch.undo()
    run(tmp_path / "cache", settings(), "--workers", "1")
    assert contents(tmp_path / "cache") == contents(prepared)


@pytest.mark.slow
def test_training_on_the_cache_is_training_on_the_videos(settings, prepared, tmp_path):
    students = []
    for name, arguments in {"raw": [], "cached": ["--data.folder", str(prepared)]}.items():
        config = load_config(["--config", str(settings()), *arguments, "--run.folder", str(tmp_path / name)])
        with RunFolder(config.run.folder) as folder:
            students.append(read_student(distill.distil(config, folder, report=False)).tensors)
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])


# ---- from the teacher ----


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a large red circle\n\n  a small  blue square \na green triangle\n")
    return path


def test_the_teachers_clips_are_those_of_its_sampler(stack, settings, prompts, tmp_path):
    config = settings(run={"batch": 1}, data={"folder": "nowhere"}, evaluation={"teacher_guidance": 3.0})
    run(tmp_path / "cache", config, "--prompts", prompts, "--clips", "5")
    data = opened(stack, config, "--data.folder", tmp_path / "cache", "--data.stride", "4")
    words = ["a large red circle", "a small blue square", "a green triangle"]
    assert data.captions == words + words[:2]
    clips, texts = data.batch(range(5))
    for i in (0, 4):
        noise = draw_noise((1, 4, 8, 8, 8), [keyed_generator(0, "teacher clip", i)], CPU)
        text, empty = stack.encode_text([words[i % 3]]), stack.encode_text([""])
        want = sample_teacher(video_predictor(stack.teacher), noise, text, empty, 2, 3.0)[0]
        torch.testing.assert_close(clips[i], want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(texts[i], text[0], rtol=1e-4, atol=1e-5)
    assert (clips[0] - clips[3]).abs().max() > 0.1  # the same prompt, another noise


def test_the_teachers_clips_go_on_where_they_were(settings, prompts, tmp_path, monkeypatch):
    arguments = settings(), "--prompts", prompts, "--clips", "6"
    run(tmp_path / "whole", *arguments)
    sample, calls = teacher_clips.sample_teacher, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(*args)

    monkeypatch.setattr(teacher_clips, "sample_teacher", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cache", *arguments)
    run(tmp_path / "cache", *arguments)
    assert len(calls) == 4 and contents(tmp_path / "cache") == contents(tmp_path / "whole")


# ---- killed at any moment ----


def alive(pid):
    """Whether a process runs; one that has ended and waits to be asked how has no command line any more."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_command_that_was_killed_at_random_moments_ends_as_one_that_was_not(settings, prepared, tmp_path, kills):
    out, config, rng = tmp_path / "cache", settings(), random.Random(kills)
    while kills:
        process = multiprocessing.get_context("fork").Process(target=run, args=(out, config, "--workers", "2"))
        process.start()
        shards = rng.randrange(5)
        while process.is_alive() and not (is_cache(out) and len(list(out.glob("shard-*"))) >= shards):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() if process.is_alive() else []
        process.kill()
        process.join()
        kills -= process.exitcode == -signal.SIGKILL
        end = time.monotonic() + 60
        while any(map(alive, workers)):  # they end with the command
            assert time.monotonic() < end
            time.sleep(0.1)
        if process.exitcode == 0 and kills:  # it was done before it could be killed
            assert contents(out) == contents(prepared)
            shutil.rmtree(out)
    run(out, config, "--workers", "2")
    assert contents(out) == contents(prepared) and not list(out.glob(".*.tmp"))


# ---- refusals: one sentence each ----


def test_refusals_of_training(stack, settings, prepared, tmp_path):
    def refused(match, *arguments):
        with pytest.raises(DataError, match=match) as caught:
            opened(stack, settings(), "--data.folder", tmp_path / "cache", *arguments)
        assert "\n" not in str(caught.value)

    shutil.copytree(prepared, tmp_path / "cache")
    refused("found frames 8 where this run has 4; prepare", "--data.frames", 4)
    shard = tmp_path / "cache" / "shard-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused("shard-000001.safetensors as it was written, found it torn or altered")
    with torch.no_grad():
        next(stack.vae.parameters()).add_(1)
    refused("found vae .* where this run has ")


def test_refusals(settings, videos, prepared, prompts, tmp_path):
    def refused(error, match, *arguments, out=tmp_path / "new"):
        with pytest.raises(error, match=match) as caught:
            run(out, settings(), "--workers", "0", *arguments)
        assert "\n" not in str(caught.value)

    before = contents(prepared)
    refused(DataError, "in use; name another", out=videos)
    refused(DataError, "found a file", out=SCRIPT)
    refused(
        RunFolderError, "found: Not a directory; name another with --out", "--data.folder", tmp_path / "gone", out=SCRIPT / "x"
    )
    refused(DataError, "gone, found nothing", "--data.folder", tmp_path / "gone")
    refused(DataError, "found a cache of them", "--data.folder", prepared)
    refused(DataError, "gone.txt, found: No such file", "--prompts", tmp_path / "gone.txt")
    refused(ConfigError, "--data.frames", "--data.framse", "8")
    refused(DataError, "another frames; set", "--data.frames", "4", out=prepared)
    refused(DataError, "another stride, kind", "--prompts", prompts, out=prepared)
    refused(DataError, "none; write some", "--prompts", _write(tmp_path / "blank.txt", " \n\n"))
    refused(DataError, "another encoding", "--prompts", _write(tmp_path / "l.txt", b"\xff"))
    with RunFolder(tmp_path / "held"):
        refused(RunFolderError, f"in use by process {os.getpid()}.*--out", out=tmp_path / "held")
    refused(DataError, "data.frames of 32 at most, .* found 99; lower it", "--data.frames", "99")
    refused(DataError, "found 10 that cannot be used, first: Expected at least 32 frames", "--data.frames", "32")
    (tmp_path / "mute").mkdir()
    shutil.copy(videos / "00000.mp4", tmp_path / "mute")
    refused(
        DataError,
        "1 that cannot be used, first: Expected a caption",
        "--data.folder",
        tmp_path / "mute",
        out=tmp_path / "other",
    )
    assert contents(prepared) == before


def test_a_video_that_was_replaced_by_one_of_the_same_size_is_another_source(settings, videos, tmp_path):
    """Name, caption, size and date of the file stay: what is in the cache is no longer of this video."""
    folder, out = tmp_path / "videos", tmp_path / "cache"
    shutil.copytree(videos, folder)
    config = settings(data={"folder": str(folder)})
    run(out, config, "--workers", "0")
    before, video = contents(out), folder / "00001.mp4"
    data, stat = video.read_bytes(), video.stat()
    video.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(video, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match="prepared with another videos; "):
        run(out, config, "--workers", "0")
    video.write_bytes(data)  # of another date
    run(out, config, "--workers", "0")
    assert contents(out) == before


def _write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_refusal_of_the_real_command_is_one_line(settings, videos, tmp_path):
    """From another folder, with nothing of ours installed or on the path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(SCRIPT), "--out", str(videos), "--config", str(settings())]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and len(ended.stderr.splitlines()) == 1 and "in use" in ended.stderr


@pytest.mark.parametrize("arguments", [[], ["--out", "x", "--clips", "3"], ["--out", "x", "--workers", "-1"]])
def test_arguments_that_cannot_be(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        prepare.parse(arguments)
    assert caught.value.code == 2 and "error:" in capsys.readouterr().err
