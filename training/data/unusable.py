"""What happens to a clip, a caption or a picture that is not as it should be: it is named, left out and counted, by one rule for all."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from avdm2_nodes.files.sentences import one_line
from training.data import DataError

log = logging.getLogger(__name__)

# Kinds, as they are counted: "2 damaged, 1 without a caption".
DAMAGED, MISSING, SHORT, NO_CAPTION, ENCODING, COLOURS = (
    "damaged", "missing", "too short", "without a caption", "with a caption that cannot be read", "in colours that are not read",
)  # fmt: skip

_LONGEST = 1500  # characters of a line in the log


@dataclass(frozen=True)
class Unusable:
    """A clip or a picture that is left out, a sentence that says why, and the kind that it is counted under."""

    name: str
    reason: str
    kind: str = DAMAGED


def counted(left_out: Sequence[Unusable]) -> str:
    """ "3 skipped: 2 damaged, 1 without a caption"."""
    kinds = Counter(one.kind for one in left_out).most_common()
    return f"{len(left_out)} skipped" + (": " if kinds else "") + ", ".join(f"{count} {kind}" for kind, count in kinds)


def named(left_out: Sequence[Unusable]) -> None:
    """A line in the log for each."""
    for one in left_out:
        log.warning("Skipped %s: %s", one_line(one.name), one_line(one.reason, _LONGEST))


def told(place: Path | str, used: int, what: str, left_out: Sequence[Unusable]) -> None:
    """The summary in the log, a warning where anything was left out."""
    level = logging.WARNING if left_out else logging.INFO
    many = f"{what.removesuffix('s')} is" if used == 1 else f"{what} are"
    log.log(level, "%s: %d %s used, %s.", place, used, many, counted(left_out))


def require_none(left_out: Sequence[Unusable], place: Path | str, strict: bool) -> None:
    """DataError where data.strict is set and anything was left out."""
    if strict and left_out:
        raise DataError(
            f"Expected all of {place} to be usable (data.strict), found {counted(left_out)}; first {left_out[0].name}: "
            f"{left_out[0].reason.rstrip('.')}; mend them, take them out, or set data.strict false."
        )
