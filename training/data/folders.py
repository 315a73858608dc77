"""The files of a folder and its subfolders, found alike wherever clips or pictures are looked for."""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from training.data import DataError
from training.run.reading import printable


def files_below(folder: Path) -> dict[str, Path]:
    """{its path in the folder, with /: file} of all files that are not hidden, nor in a hidden folder.

    Linked subfolders are followed: each folder is visited once, first those that lie in it, then what links lead to, so that a link to
    itself or to a neighbour adds nothing. DataError for a folder that cannot be read.
    """
    found: dict[str, Path] = {}
    seen, links = {_identity(folder)}, []
    _collect(folder, folder, found, seen, links)
    while links:
        link = links.pop(0)
        if _identity(link) not in seen:
            seen.add(_identity(link))
            _collect(folder, link, found, seen, links)
    return found


def _collect(top: Path, start: Path, found: dict[str, Path], seen: set, links: list[Path]) -> None:
    def told(error: OSError) -> None:
        raise DataError(
            f"Expected to read the folder {error.filename}, found: {error.strerror}; open it or take it out."
        ) from error

    for here, folders, files in os.walk(start, onerror=told):  # of its own it follows no links
        inside = sorted(Path(here) / name for name in folders if not name.startswith("."))
        links += [path for path in inside if path.is_symlink()]
        own = [path for path in inside if not path.is_symlink()]
        own = [path for path in own if start == top or _identity(path) not in seen]
        seen.update(map(_identity, own))
        folders[:] = [path.name for path in own]
        for name in files:
            if not name.startswith("."):
                path = Path(here) / name
                found[printable(path.relative_to(top).as_posix())] = path


def _identity(folder: Path) -> tuple[int, int]:
    try:
        stat = folder.stat()
    except OSError as error:
        raise DataError(f"Expected to read the folder {folder}, found: {error.strerror}; open it or take it out.") from error
    return stat.st_dev, stat.st_ino


def same_name(text: str) -> str:
    """What all spellings of a name have in common: some systems write é as one character, others as e with an accent behind it."""
    return unicodedata.normalize("NFC", text)


def twins(path: Path) -> Iterator[Path]:
    """The files beside that have the path's name in another spelling."""
    if path.name.isascii():
        return
    try:
        names = os.listdir(path.parent)
    except OSError:
        return
    yield from (path.parent / name for name in sorted(names) if name != path.name and same_name(name) == same_name(path.name))
