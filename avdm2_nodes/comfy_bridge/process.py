"""A long job as a process of its own, which never outlives this one: it ends when its standard input does."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import SentenceError

PATIENCE = 150  # seconds that a job may take to put down what it has; somewhat more than it gives itself
TAIL = 2**14  # bytes of its log that are looked at


class ProcessError(SentenceError, RuntimeError):
    """A job that failed; the message is its own last words."""


class Process:
    """`with Process(command, log) as job:` runs a Python script until the end of the block, its output in the file `log`.

    Leaving the block, whether at its end or by an error, closes the job's input, which asks it to end, and waits for it. The
    operating system does the same for a program that is killed: nobody else holds the other end.
    """

    def __init__(self, command: Sequence[str | Path], log: Path):
        self.command, self.log = [sys.executable, *map(str, command)], Path(log)

    def __enter__(self) -> "Process":
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("wb") as log:
                # A session of its own, so that Ctrl-C in the server's terminal asks it in the same way.
                self._job = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
                )
        except OSError as error:
            raise ProcessError(
                f"Expected to start {Path(self.command[1]).name} with its log at {self.log}, found: {error.strerror}; make room there."
            ) from error
        return self

    def __exit__(self, *_) -> None:
        self._job.stdin.close()
        try:
            self._job.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._job.kill()
            self._job.wait()

    def wait(self, seconds: float) -> bool:
        """True once the job has ended well, False where it goes on after so many seconds. ProcessError where it failed."""
        until = time.monotonic() + seconds
        while (code := self._job.poll()) is None:
            if time.monotonic() >= until:
                return False
            time.sleep(min(0.1, seconds))
        if code < 0:
            raise ProcessError(
                f"Expected {Path(self.command[1]).name} to end by itself, found it killed by {_signal(-code)}, as a system does that runs "
                "out of memory; the same command goes on from the last checkpoint."
            )
        if code:
            raise ProcessError(self.last_words() or f"Expected {self.command[1]} to end well, found exit code {code}.")
        return True

    def last_words(self) -> str:
        """The last line of its output; of a progress bar, which is one line drawn again and again, as it stands now."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, self.log.stat().st_size - TAIL))
                text = log.read().decode("utf-8", errors="replace")
        except OSError:  # taken away meanwhile
            return ""
        lines = [line.strip() for line in text.replace("\r", "\n").splitlines()]
        return next((line for line in reversed(lines) if line), "")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
