import os
import subprocess
import sys
import threading
import time

import pytest

from training.run.config import ROOT
from training.run.parent import watch

PROGRAM = """
import sys, time
from training.run.parent import watch
stop = watch(grace={grace})
{asks}
try:
    print("up", flush=True)
    {body}
except KeyboardInterrupt:
    sys.exit("interrupted")
"""


@pytest.fixture
def program():
    """program(body, ...): a Python that runs it, once it is up; killed at the end of the test."""
    started = []

    def start(body, asks="", grace=60):
        code = PROGRAM.format(body=body, asks=asks, grace=grace)
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes))
        assert started[-1].stdout.readline() == "up\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_end_of_the_input_is_seen_and_what_it_says_is_not_read_as_one():
    ours, theirs = os.pipe()
    stop = watch(ours, grace=threading.TIMEOUT_MAX)
    assert not stop()
    os.write(theirs, b"still here")
    time.sleep(0.1)
    assert not stop()
    os.close(theirs)
    until = time.monotonic() + 60
    while not stop() and time.monotonic() < until:
        time.sleep(0.01)
    assert stop()
    os.close(ours)


def test_before_anything_asks_the_end_interrupts(program):
    process = program("time.sleep(600)")
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, "interrupted\n")


def test_who_asks_is_left_to_end_in_its_own_time(program):
    process = program("\n    ".join(["while not stop(): time.sleep(.01)", "time.sleep(.2)", "print('saved')"]), asks="stop()")
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said, errors) == (0, "saved\n", "")


def test_what_does_not_end_is_ended(program):
    process = program("time.sleep(600)", asks="stop()", grace=0.1)
    process.communicate(timeout=60)
    assert process.returncode == 1


def test_a_parent_that_is_killed_takes_it_along(program, tmp_path):
    """The parent is a Python of its own, whose child writes its number down; SIGKILL gives it no time to say goodbye."""
    child = PROGRAM.format(body="time.sleep(600)", asks="", grace=60)
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdin=subprocess.PIPE)
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "up\n"
    parent.kill()
    _, said = parent.communicate(timeout=60)  # ends with the last holder of the pipe, which is the child
    assert said == "interrupted\n"
    pid = int((tmp_path / "child").read_text())
    until = time.monotonic() + 60
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < until:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")
