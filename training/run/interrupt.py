"""Ctrl-C told in a sentence, from a command's first line on: it imports this before anything that takes seconds."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

CODE = 128 + signal.SIGINT  # as shells count it


def ends_imports(sentence: str = "Interrupted before it began.") -> None:
    """From now on Ctrl-C ends the process at once with a sentence: while packages are imported nothing is at stake.

    A process in the background, which has it ignored, goes on ignoring it.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        os.write(2, f"{sentence}\n".encode())
        os._exit(CODE)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
        _ends.append(end)


_ends: list = []


def told(command: Callable[[], object], sentence: str = "Interrupted; give the command again.") -> None:
    """Runs the command and exits with what it returns; Ctrl-C, which is KeyboardInterrupt from here on, ends it with a sentence."""
    try:
        if signal.getsignal(signal.SIGINT) in _ends:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(command())
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one while it ends would be a traceback
        print(f"\n{sentence}", file=sys.stderr)
        sys.exit(CODE)
