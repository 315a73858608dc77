"""How a command begins and ends: its errors and Ctrl-C told in a sentence, from the first line of its script on.

A script imports this before the packages that take seconds.
"""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT  # as shells count it


def _end(signum: int, frame: FrameType | None) -> None:
    os.write(2, b"Interrupted before it began.\n")
    os._exit(INTERRUPTED)


def begin() -> None:
    """Until `run`, Ctrl-C ends the process at once with a sentence: while packages are imported nothing is at stake.

    A process in the background, which has it ignored, goes on ignoring it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def run(
    main: Callable[[], int | None],
    errors: tuple[type[BaseException], ...] = (),
    interrupted: str = "Interrupted; give the command again.",
) -> None:
    """Runs `main` and exits with what it returns; with 1 after one of `errors`, whose message is told, and 130 after Ctrl-C."""
    try:
        if signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(main())
    except errors as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one while it ends would be a traceback
        print(interrupted, file=sys.stderr)
        sys.exit(INTERRUPTED)
