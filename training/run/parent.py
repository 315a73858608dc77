"""The program that started this one, seen through standard input: when that ends, the program is gone or wants this one to end."""

import os
import signal
import sys
import threading
from collections.abc import Callable

GRACE = 120  # seconds that an update under way, its checkpoint and whatever else is running may take

Stop = Callable[[], bool]


class StoppedError(RuntimeError):
    """Training ended before its last update because it was asked to; the message says where it goes on."""


def never() -> bool:
    """For a run that nobody stops."""
    return False


def watch(descriptor: int | None = None, grace: float = GRACE) -> Stop:
    """A function that says whether `descriptor` (default: standard input) has ended.

    Training asks it between two updates, and stops with a checkpoint. As long as nothing has asked (the networks are still being
    loaded) the end interrupts this process at once, as Ctrl-C does; and whatever it is at, `grace` seconds later it is over: all files
    are written whole or not at all, so nothing is broken by that.
    """
    descriptor = sys.stdin.fileno() if descriptor is None else descriptor
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background has it ignored, and its children
    ended, asked = threading.Event(), threading.Event()

    def wait() -> None:
        while os.read(descriptor, 4096):  # not by sys.stdin, whose lock would be held when the interpreter shuts down
            pass
        ended.set()
        if not asked.is_set():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        threading.Event().wait(grace)
        os._exit(1)

    def stop() -> bool:
        asked.set()
        return ended.is_set()

    threading.Thread(target=wait, name="parent", daemon=True).start()
    return stop
