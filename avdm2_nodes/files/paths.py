"""What lies at a path, whatever the path is, and small texts there; nothing here waits or fails on a path that no file can have."""

import json
import os
import stat
from pathlib import Path

from .sentences import FileFormatError, reason, told

_TEXT_LIMIT = 16 * 2**20  # bytes of a configuration; real ones have some thousand


def is_file(path: Path) -> bool:
    """True for a file, also by a link; False, never an error, for all else: a pipe, a device, a loop of links, an impossible name."""
    return _mode(path, stat.S_ISREG)


def is_folder(path: Path) -> bool:
    """True for a folder, also by a link; never an error."""
    return _mode(path, stat.S_ISDIR)


def _mode(path: Path, is_one) -> bool:
    try:
        return is_one(os.stat(path).st_mode)
    except (OSError, ValueError):  # ValueError: a NUL in it, or signs that no name has
        return False


def lies_at(path: Path) -> str:
    """What lies where a file was expected, in words: "nothing", "a folder", "a link to nothing", …"""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "a link to nothing" if os.path.islink(path) else "nothing"
    except (OSError, ValueError) as error:
        return f"none ({reason(error)})"
    return "a folder" if stat.S_ISDIR(mode) else "a file" if stat.S_ISREG(mode) else "a pipe or a device"


def require_file(path: Path, expected: str = "a model file") -> None:
    """FileFormatError unless a file lies there."""
    if not is_file(path):
        raise FileFormatError(f"Expected {expected} at {path}, found {lies_at(path)}; check the path.")


def read_text(path: Path, expected: str = "a text") -> str:
    """A small text in UTF-8. FileFormatError for anything else."""
    require_file(path, expected)
    with told(path, expected):
        size = path.stat().st_size
        if size > _TEXT_LIMIT:
            raise FileFormatError(f"Expected {expected} at {path}, found a file of {size} bytes; check or replace it.")
        return path.read_text(encoding="utf-8-sig")


def read_json(path: Path, expected: str = "JSON") -> object:
    """What a small JSON file says. FileFormatError for anything else."""
    text = read_text(path, expected)
    with told(path, expected):
        return json.loads(text)
