"""Cases run in a child with bounds on time and memory, so that what hangs, crashes or fills the memory ends as a line of a report."""

import faulthandler
import json
import os
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

SECONDS, WALL = 10, 300  # of the processor's time, and of the clock on a busy machine (what waits for ever takes no processor)
ROOM = 2**30  # bytes that a case may take
BLOCK = 200  # cases for which children are made, one for each processor
LIMIT = 4 * ROOM  # and beyond which it is refused them


class Said(NamedTuple):
    """What running a case says, and what it took: seconds of the processor, bytes."""

    words: str
    seconds: float = 0.0
    taken: int = 0


Run = Callable[[object], Callable[[], str]]  # makes a case, out of bounds; what it gives runs it, within


def run_bounded(cases: Sequence, run: Run, children: int = 1, seconds: int = SECONDS) -> list[tuple[object, Said]]:
    """(case, what running it says and takes) for each; "killed by signal 14" and the like where the child did not live to say it."""
    said, shares = [], [list(cases[i::children]) for i in range(children)]
    while shares := [share for share in shares if share]:
        started = [_start(share, run, seconds) for share in shares]
        found = [_answers(share, *child) for share, child in zip(shares, started, strict=True)]
        said += [answer for answers in found for answer in answers]
        shares = [share[len(answers) :] for share, answers in zip(shares, found, strict=True)]
    return said


def run_numbered(count: int, run: Run) -> dict[object, Said]:
    """`run_bounded` of the cases 0, 1, … on all processors, a block after the other."""
    said = []
    for start in range(0, count, BLOCK):
        said += run_bounded(range(start, min(start + BLOCK, count)), run, os.cpu_count() or 1)
    return dict(said)


def unexpected(case: str, error: BaseException) -> str:
    """The line of a case that raised what no reader may."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
    return f"VIOLATION: {case}: {what}"


def _start(cases: Sequence, run: Run, seconds: int) -> tuple[int, int]:
    """A child that runs the cases: its id, and the pipe in which it says a line of each."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read)
            _answer(cases, run, write, seconds)
        finally:
            os._exit(0)
    os.close(write)
    return child, read


def _answers(cases: Sequence, child: int, read: int) -> list[tuple[object, Said]]:
    with os.fdopen(read) as answers:
        said = [Said(*json.loads(line)) for line in answers]
    _, status = os.waitpid(child, 0)
    found = list(zip(cases, said, strict=False))
    if len(said) < len(cases):
        signed = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {status}"
        found.append((cases[len(said)], Said(f"VIOLATION: killed by {signed} (14: waits for ever, 27: too long)")))
    return found


def _answer(cases: Sequence, run: Run, write: int, seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + LIMIT,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # what ends a case is told by its signal
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for case in cases:
        made = run(case)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, WALL)
        before, started = _reset_peak(), time.process_time()
        answer = made()
        taken, spent = _memory("VmHWM") - before, time.process_time() - started
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if taken > ROOM:
            answer = f"VIOLATION: {taken / 2**20:.0f} MB taken; {answer}"
        os.write(write, (json.dumps([answer, spent, taken]) + "\n").encode())


def _reset_peak() -> int:
    """The memory in use, from which the system counts its peak anew."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _memory("VmRSS")


def _memory(line: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(text.split()[1]) * 1024 for text in file if text.startswith(line + ":"))


def report(name: str, said: dict[object, Said]) -> None:
    """Prints what was said how often and what it took at most; an AssertionError with every case that left its bounds."""
    counts = Counter(one.words.split(":")[0] for one in said.values())
    seconds, taken = max(one.seconds for one in said.values()), max(one.taken for one in said.values())
    print(f"\n{name}: {dict(counts)}; at most {seconds:.1f} s and {taken / 2**20:.0f} MB")
    violations = [f"case {case}: {one.words}" for case, one in said.items() if one.words.startswith("VIOLATION")]
    assert not violations, "\n" + "\n".join(violations)
