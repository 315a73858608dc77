"""What a file, a path, a number or a text may raise, told as one sentence of this room."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import SentenceError

_LONGEST = 1500  # characters of a sentence; a path alone may have a thousand
_DIGITS = 9  # of a number in a name or a text: Python itself refuses to read one of 4,301


class FileError(SentenceError, ValueError):
    """A file that cannot be read, written or used; the message is one sentence, on one line and of bounded length."""

    def __init__(self, message: str = ""):
        super().__init__(one_line(message, _LONGEST))


class FileFormatError(FileError):
    """A model file that cannot be read, written or used; the message is one sentence that names it."""


def one_line(text: object, longest: int = 200) -> str:
    """A text with its line breaks, and signs that no terminal can write, spelt out; of a longer one the middle is left out."""
    line = _cut(str(text), longest).encode("utf-8", "backslashreplace").decode()
    return _cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in line), longest)


def _cut(text: str, longest: int) -> str:
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


def reason(error: BaseException) -> str:
    """Why something failed, in a few words without a full stop: the system's, else the first line of the error's own."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    words = getattr(error, "strerror", None) or next((line for line in str(error).splitlines() if line.strip()), "")
    return one_line(words or type(error).__name__).rstrip(".")


@contextlib.contextmanager
def told(path: Path, expected: str, remedy: str = "check or replace it") -> Iterator[None]:
    """FileFormatError in place of whatever the system, a path, a number or a text raises; a FileError passes as it is."""
    try:
        yield
    except FileError:
        raise
    except (
        OSError,
        RecursionError,
        MemoryError,
        OverflowError,
        ValueError,
    ) as error:  # of texts and paths: UnicodeError is a ValueError
        raise FileFormatError(f"Expected {expected} at {path}, found: {reason(error)}; {remedy}.") from error


@contextlib.contextmanager
def told_writing(place: Path, kind: type[FileError] = FileFormatError) -> Iterator[None]:
    """An error of this kind in place of what the system raises where something is written; a FileError passes as it is."""
    try:
        yield
    except FileError:
        raise
    except (OSError, ValueError) as error:  # ValueError: of a name that no file can have
        raise kind(
            f"Expected room and the right to write {place}, found: {reason(error)}; name another place or make room."
        ) from error


def is_text(text: str) -> bool:
    """True for whole characters, which UTF-8 can write; False where half of one stands (a lone surrogate)."""
    return not any("\ud800" <= sign <= "\udfff" for sign in text)


def whole_number(text: str) -> int | None:
    """The number that a text of plain digits says; None for any other, and for one too long to be meant."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _DIGITS else None
