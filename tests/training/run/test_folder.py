import json
import math
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from training.run.config import ROOT, from_yaml, to_yaml
from training.run.folder import RunFolder, RunFolderError, require_writable, told_of_disk

CONFIG = from_yaml("run: {seed: 1}")

HOLDER = """
import sys, time
from training.run.folder import RunFolder
with RunFolder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path / "run"."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def stats(folder):
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def test_makes_the_folder_and_writes_the_settings(tmp_path):
    with RunFolder(tmp_path / "deep" / "run") as folder:
        folder.start(CONFIG)
        assert from_yaml((folder.path / "config.yaml").read_text()) == CONFIG
    assert sorted(p.name for p in folder.path.iterdir()) == [".lock", "config.yaml", "stats.jsonl"]


def test_stats_are_there_at_once_and_valid_json(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.start(CONFIG)
        folder.write_stats(1, {"loss": 0.5, "skipped": 0, "bad": math.nan, "worse": -math.inf})
        assert stats(tmp_path) == [{"update": 1, "loss": 0.5, "skipped": 0, "bad": None, "worse": None}]


def test_another_process_holds_it(tmp_path, holder):
    with pytest.raises(RunFolderError, match=f"run, found it in use by process {holder.pid};"), RunFolder(tmp_path / "run"):
        pass


def test_no_stale_lock_after_sigkill(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunFolder(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())


def test_held_within_one_process_too_and_free_afterwards(tmp_path):
    with RunFolder(tmp_path), pytest.raises(RunFolderError, match="in use"), RunFolder(tmp_path):
        pass
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path):
        _ = 1 / 0
    with RunFolder(tmp_path):
        pass


def test_no_right_to_write(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="Not a directory"), RunFolder(tmp_path / "file" / "run"):
        pass
    with pytest.raises(RunFolderError, match="File exists"), RunFolder(tmp_path / "file"):
        pass

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(RunFolderError, match=r"run, found: Permission denied; name another with --run\.folder"):
        RunFolder(tmp_path / "run").__enter__()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="Permission denied"), RunFolder(tmp_path / "run"):
        pass


def test_no_space(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("training.run.folder.shutil.disk_usage", lambda _: usage(2**33, 0, 2**30))
    with RunFolder(tmp_path, expected_bytes=2**29):
        pass
    with pytest.raises(RunFolderError, match=r"1088 MiB free.*found 1024 MiB"), RunFolder(tmp_path, expected_bytes=2**30):
        pass
    with RunFolder(tmp_path):
        pass  # the refusal let go of the lock


def test_resuming_cuts_the_stats_back(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.start(CONFIG)
        for update in range(1, 6):
            folder.write_stats(update, {"loss": update / 10})
    with (tmp_path / "stats.jsonl").open("a") as file:
        file.write('{"update": 6, "lo')
    with RunFolder(tmp_path) as folder:
        folder.start(CONFIG, update=3)
        folder.write_stats(4, {"loss": 9.0})
    assert [(line["update"], line["loss"]) for line in stats(tmp_path)] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 9.0)]


def test_starting_anew_forgets_the_stats_and_takes_any_settings(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.start(CONFIG)
        folder.write_stats(1, {})
    with RunFolder(tmp_path) as folder:
        folder.start(from_yaml("sdm: {weight: 1}"))
    assert stats(tmp_path) == []


def test_resuming_with_other_settings_is_refused(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.start(CONFIG)
        folder.write_stats(1, {})
        folder.write_stats(2, {})
    with RunFolder(tmp_path) as folder, pytest.raises(RunFolderError) as caught:
        folder.start(from_yaml("run: {seed: 2, updates: 7}\nadm: {lr: 2.0e-3}"), update=1)
    assert "run.seed 2, was 1; adm.lr 0.002, was 0.001;" in str(caught.value) and "updates" not in str(caught.value)
    assert len(stats(tmp_path)) == 2 and (tmp_path / "config.yaml").read_text() == to_yaml(CONFIG)


def test_resuming_for_longer_is_allowed(tmp_path):
    longer = from_yaml("run: {seed: 1, updates: 500, threads: 1}")
    with RunFolder(tmp_path) as folder:
        folder.start(CONFIG)
    with RunFolder(tmp_path) as folder:
        folder.start(longer, update=25)
    assert from_yaml((tmp_path / "config.yaml").read_text()) == longer


def test_resuming_without_the_settings_is_refused(tmp_path):
    with RunFolder(tmp_path) as folder, pytest.raises(RunFolderError, match=r"config\.yaml.*No such file"):
        folder.start(CONFIG, update=5)


# ---- side files that a power cut or a person left ----


@pytest.mark.parametrize("content", [b"\xff\xfe", "run: {seed: 1}".encode("utf-16-le")])
def test_settings_in_another_encoding_are_told(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with RunFolder(tmp_path) as folder, pytest.raises(RunFolderError, match=r"config\.yaml, found: another encoding") as caught:
        folder.start(CONFIG, update=5)
    assert "\n" not in str(caught.value)


def test_settings_that_are_a_pipe_are_told(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    with RunFolder(tmp_path) as folder, pytest.raises(RunFolderError, match="neither a file nor a folder"):
        folder.start(CONFIG, update=5)


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"update": ' + "9" * 5000 + "}", '{"update": "x"}', "[]", '{"update": null}', "\ud800"]
)
def test_lines_of_the_stats_that_are_none_are_dropped(tmp_path, line):
    with RunFolder(tmp_path) as folder:
        folder.start(CONFIG)
        folder.write_stats(1, {"loss": 1.0})
    with (tmp_path / "stats.jsonl").open("ab") as file:
        file.write(line.encode("utf-8", "surrogatepass") + b"\n")
    with RunFolder(tmp_path) as folder:
        folder.start(CONFIG, update=1)
    assert stats(tmp_path) == [{"update": 1, "loss": 1.0}]


def test_a_folder_in_the_place_of_the_stats_is_told(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.start(CONFIG)
    (tmp_path / "stats.jsonl").unlink()
    (tmp_path / "stats.jsonl").mkdir()
    for update in (0, 5):
        with RunFolder(tmp_path) as folder, pytest.raises(RunFolderError, match="Is a directory") as caught:
            folder.start(CONFIG, update)
        assert "\n" not in str(caught.value)


def test_a_pipe_in_the_place_of_the_stats_is_told(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.start(CONFIG)
    (tmp_path / "stats.jsonl").unlink()
    os.mkfifo(tmp_path / "stats.jsonl")
    with RunFolder(tmp_path) as folder, pytest.raises(RunFolderError, match="neither a file nor a folder"):
        folder.start(CONFIG, 5)


# ---- the clips that a run was begun with ----


def test_other_clips_than_a_run_was_begun_with_are_refused(tmp_path):
    ours, others = {"clips": 32, "sha256": "a"}, {"clips": 22, "sha256": "b"}
    with RunFolder(tmp_path) as folder:
        folder.hold_to(others, resumes=False)
        folder.hold_to(ours, resumes=False)  # nothing was learnt from the first
        folder.hold_to(ours, resumes=True)
        with pytest.raises(RunFolderError, match=r"begun with \(32\), found others \(22\).*remove clips\.json") as caught:
            folder.hold_to(others, resumes=True)
        assert "\n" not in str(caught.value)
        (tmp_path / "clips.json").write_text("{")
        with pytest.raises(RunFolderError, match=r"clips\.json, found: no JSON.*remove it"):
            folder.hold_to(ours, resumes=True)
        (tmp_path / "clips.json").unlink()  # also a run of before
        folder.hold_to(others, resumes=True)
        folder.hold_to(others, resumes=True)


@pytest.mark.parametrize("name", ["file", "file/below", "link", "n" * 256, "a\0b"])
def test_a_place_that_cannot_be_written_is_told_beforehand(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(RunFolderError, match=r"^Expected a folder that can be written at .*; name another with --x\.$"):
        require_writable(tmp_path / name, "--x")
    require_writable(tmp_path)
    require_writable(tmp_path / "new" / "below")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_full_disk_is_told(tmp_path):
    with pytest.raises(RunFolderError, match=r"found: No space left on device; .*it goes on"), told_of_disk(tmp_path):
        raise OSError(28, "No space left on device", "clips.png")
