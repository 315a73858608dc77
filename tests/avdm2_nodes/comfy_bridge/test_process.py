"""Needs no ComfyUI: a process is a process."""

import os
import subprocess
import sys
import time

import pytest

from avdm2_nodes.comfy_bridge import process
from avdm2_nodes.comfy_bridge.process import Process, ProcessError
from tests.avdm2_nodes.conftest import ROOT

UNTIL_ASKED = "import pathlib, sys; print('up', flush=True); sys.stdin.read(); pathlib.Path(sys.argv[1]).write_text('saved')"


@pytest.fixture
def script(tmp_path):
    """script(code, ...): the command that runs this code as a script."""

    def write(code, *arguments):
        path = tmp_path / "script.py"
        path.write_text(code)
        return [path, *arguments]

    return write


def wait_until(condition, limit=60):
    until = time.monotonic() + limit
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    assert condition()


def test_a_job_ends_well_and_its_output_is_kept(script, tmp_path):
    log = tmp_path / "new" / "log"
    with Process(script("print('one'); print('two')"), log) as job:
        wait_until(lambda: job.wait(0.05))
    assert log.read_text() == "one\ntwo\n" and job.last_words() == "two"


def test_a_job_that_fails_is_told_in_its_own_last_words(script, tmp_path):
    code = "import sys; print('begun'); sys.exit('Expected a folder, found none.')"
    with (
        pytest.raises(ProcessError, match=r"^Expected a folder, found none\.$"),
        Process(script(code), tmp_path / "log") as job,
    ):
        wait_until(lambda: job.wait(0.05))


def test_a_job_that_fails_without_a_word_is_told_so(script, tmp_path):
    with pytest.raises(ProcessError, match=r"found exit code 3"), Process(script("exit(3)"), tmp_path / "log") as job:
        wait_until(lambda: job.wait(0.05))


def test_a_job_that_is_killed_is_told_so_and_not_by_its_progress_bar(script, tmp_path):
    code = "import os, signal, sys; sys.stderr.write('training: 50%'); sys.stderr.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    with (
        pytest.raises(ProcessError, match=r"^Expected script\.py to end by itself, found it killed by SIGKILL"),
        Process(script(code), tmp_path / "log") as job,
    ):
        wait_until(lambda: job.wait(0.05))


def test_a_log_that_cannot_be_written_is_one_sentence(script, tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ProcessError, match=r"^Expected to start script\.py with its log at .*log, found: (File|Not a dir)"),
        Process(script("print('one')"), tmp_path / "file" / "log"),
    ):
        pass


def test_of_a_progress_bar_the_newest_state_is_told(script, tmp_path):
    code = r"import sys; sys.stderr.write('\rtraining: 10%\rtraining: 50%\r\n\n')"
    with Process(script(code), tmp_path / "log") as job:
        wait_until(lambda: job.wait(0.05))
    assert job.last_words() == "training: 50%"


def test_leaving_by_an_error_asks_the_job_to_end_and_waits_for_it(script, tmp_path):
    saved = tmp_path / "saved"
    with pytest.raises(KeyboardInterrupt), Process(script(UNTIL_ASKED, saved), tmp_path / "log") as job:
        wait_until(lambda: job.last_words() == "up")
        assert not job.wait(0.05)
        raise KeyboardInterrupt
    assert saved.read_text() == "saved" and job._job.returncode == 0


def test_a_job_that_does_not_end_is_ended(script, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "PATIENCE", 0.1)
    with Process(script("import time; time.sleep(600)"), tmp_path / "log") as job:
        pass
    assert job._job.returncode < 0


def test_a_killed_program_takes_its_job_along_whatever_else_it_has_started(script, tmp_path):
    """Another process that it starts meanwhile, and that outlives it, does not hold the job's input open."""
    saved, pids = tmp_path / "saved", tmp_path / "pids"
    code = f"""
import pathlib, subprocess, sys, time
from avdm2_nodes.comfy_bridge.process import Process
with Process({[str(part) for part in script(UNTIL_ASKED, saved)]!r}, pathlib.Path({str(tmp_path / "log")!r})) as job:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    while job.last_words() != "up":
        time.sleep(.02)
    pathlib.Path({str(pids)!r} + "~").write_text(f"{{job._job.pid}} {{other.pid}}")
    pathlib.Path({str(pids)!r} + "~").rename({str(pids)!r})
    time.sleep(600)
"""
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        wait_until(pids.exists)
        job, other = map(int, pids.read_text().split())
    finally:
        program.kill()
        program.wait()
    try:
        wait_until(lambda: not _runs(job))
        assert saved.read_text() == "saved" and _runs(other)
    finally:
        os.kill(other, 9)


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked after does not."""
    try:
        return "\nState:\tZ" not in open(f"/proc/{pid}/status").read()
    except FileNotFoundError:
        return False
