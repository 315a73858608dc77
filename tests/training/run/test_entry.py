import os
import signal
import subprocess
import sys

import pytest

from training.run.config import ROOT

SCRIPT = """
import signal, sys, time
from training.run import entry
entry.begin()
print("importing", flush=True)
if "imports" in sys.argv: time.sleep(60)
def main():
    print("working", flush=True)
    if "works" in sys.argv: time.sleep(60)
    if "fails" in sys.argv: raise ValueError("Expected more.")
    return 3
entry.run(main, (ValueError,), "Interrupted; it goes on.")
"""


def started(*arguments, script=("-c", SCRIPT)):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # A process in the background has Ctrl-C ignored, and its children with it.
    return subprocess.Popen(
        [sys.executable, *script, *arguments], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("when", "lines", "said"), [("imports", 1, "Interrupted before it began.\n"), ("works", 2, "Interrupted; it goes on.\n")]
)
def test_ctrl_c_is_told_in_a_sentence(when, lines, said):
    process = started(when)
    for _ in range(lines):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, said)


def test_an_error_is_told_and_a_result_is_the_exit_code():
    process = started("fails")
    assert (process.communicate(timeout=60)[1], process.returncode) == ("Expected more.\n", 1)
    process = started()
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 3)


def test_a_process_in_the_background_ignores_it_still():
    script = SCRIPT.replace(
        "entry.begin()", "signal.signal(signal.SIGINT, signal.SIG_IGN); entry.begin(); signal.raise_signal(2)"
    )
    process = started(script=("-c", script))
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 3)


@pytest.mark.parametrize(
    "name", ["distill", "prepare", "sample", "export", "evaluate", "evaluate_clips", "evaluate_styles", "build_miniature"]
)
def test_every_command_begins_so_before_it_imports_anything_that_takes_seconds(name):
    lines = (ROOT / "training" / f"{name}.py").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.strip() == "entry.begin()")
    before = [line.strip() for line in lines[:first] if line.strip().startswith(("import ", "from "))]
    assert before == [
        b for b in before if b in ("import os", "import sys", "from pathlib import Path", "from training.run import entry")
    ]
    assert any("entry.run(main" in line for line in lines[-5:])


@pytest.mark.parametrize("seconds", [0.3, pytest.param(1.5, marks=pytest.mark.slow), pytest.param(4.0, marks=pytest.mark.slow)])
def test_the_real_command_in_its_first_seconds(seconds):
    process = started("--out", "nowhere", "--data.folder", "nowhere", script=(str(ROOT / "training" / "prepare.py"),))
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert len(errors.splitlines()) == 1 and "Traceback" not in errors
