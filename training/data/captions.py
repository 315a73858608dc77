"""Captions of videos and pictures: a table in the folder, or a text beside each file."""

import csv
import io
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from avdm2_nodes.files.sentences import one_line
from training.data import DataError
from training.data.folders import files_below, same_name, twins
from training.data.unusable import ENCODING
from training.run.reading import UnreadableError, parsed, printable, read_text, require_path

TABLES = ("captions.csv", "captions.jsonl")
_CSV = {"end of data": "a quote that is not closed", "expected after": "text after a closing quote"}  # the csv module's words
_FILE_KEYS, _CAPTION_KEYS = ("file", "video", "path"), ("caption", "text")


class CaptionError(ValueError):
    """A caption that cannot be read; the message is one sentence that names its file."""

    kind = ENCODING


class Captioned(NamedTuple):
    """A file and what it shows, in words; or, where those cannot be read, why."""

    name: str  # its path in the folder
    path: Path
    caption: str  # "" where it has none
    problem: str = ""


def caption_in(row: dict) -> str:
    """The caption of a table's row or of a JSON object; "" where it has none."""
    caption = _pick(row, _CAPTION_KEYS)
    return words(caption) if isinstance(caption, str) else ""


def caption_beside(path: Path) -> str:
    """The text in the .txt beside a file; "" where there is none. CaptionError for one that cannot be read, or is in another encoding."""
    text = path.with_suffix(".txt")
    if not text.exists():
        text = next(twins(text), text)
        if not text.exists():
            return ""
    try:
        return words(read_text(text))
    except UnreadableError as error:
        place = printable(str(text))
        raise CaptionError(
            f"Expected a caption in UTF-8 in {place}, found {error}; save it as UTF-8, or take it out."
        ) from error


def captioned(folder: Path, suffixes: Collection[str]) -> list[Captioned]:
    """The files of a folder and its subfolders with one of the suffixes, and those that its table names, sorted, with their captions.

    DataError for a table that cannot be used.
    """
    table, found = read_table(folder), files_below(folder)
    matched = _matched(table, found, folder)
    files = {name: path for name, path in found.items() if path.suffix.lower() in suffixes}
    files |= {name: found.get(name, folder / name) for name in matched}
    every = []
    for name, path in sorted(files.items()):
        try:
            every.append(Captioned(name, path, matched.get(name, "") or caption_beside(path)))
        except CaptionError as error:
            every.append(Captioned(name, path, "", str(error)))
    return every


def _matched(table: dict[str, str], found: Collection[str], folder: Path) -> dict[str, str]:
    """The table with its names spelt as the files are, where there is one file of that name."""
    if all(name.isascii() for name in table) or not table.keys() - found:
        return table
    spelt: dict[str, list[str]] = {}
    for name in found:
        spelt.setdefault(same_name(name), []).append(name)
    matched = {}
    for name, caption in table.items():
        others = spelt.get(same_name(name), [])
        own = others[0] if name not in found and len(others) == 1 else name
        if own in matched:
            raise DataError(f"Expected each file once in the table of {folder}, found {name!r} in two spellings; remove one.")
        matched[own] = caption
    return matched


def read_table(folder: Path) -> dict[str, str]:
    """{path in the folder: caption} of the folder's table; {} if it has none. DataError for one that cannot be used, with the line."""
    tables = [folder / name for name in TABLES if (folder / name).exists()]
    if not tables:
        return {}
    if len(tables) > 1:
        raise DataError(f"Expected one table of captions in {folder}, found {' and '.join(TABLES)}; keep one of them.")
    table = tables[0]
    captions = {}
    for line, row in _rows(table):
        name = _pick(row, _FILE_KEYS)
        if not isinstance(name, str) or not name.strip():
            raise DataError(
                f"Expected a file's name under {_FILE_KEYS[0]!r} in line {line} of {table}, found {name!r}; add it."
            )
        place = PurePosixPath(name.strip())
        if place.is_absolute() or ".." in place.parts or re.match(r"[A-Za-z]:|.*\\", str(place)):
            raise DataError(
                f"Expected a path inside {folder} in line {line} of {table}, found {name!r}; write it relative to that, with /."
            )
        try:
            require_path(folder / place)
        except ValueError as error:
            raise DataError(
                f"Expected a file's name in line {line} of {table}, found {one_line(repr(name))}: {error}; correct it."
            ) from error
        if str(place) in captions:
            raise DataError(f"Expected each file once in {table}, found {name!r} again in line {line}; remove one.")
        captions[str(place)] = caption_in(row)
    return captions


def _rows(table: Path) -> Iterator[tuple[int, dict]]:
    """(line number, row) of each row."""
    try:
        text = read_text(table)
    except UnreadableError as error:
        raise DataError(f"Expected a table of captions in UTF-8 at {table}, found {error}; save it as UTF-8.") from error
    return _csv_rows(table, text) if table.suffix == ".csv" else _json_rows(table, text)


def _json_rows(table: Path, text: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.strip():
            continue
        try:
            row = parsed(line)
        except UnreadableError as error:
            raise DataError(
                f"Expected one JSON object a line in {table}, found in line {number}: {error}; correct it."
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"Expected a JSON object with file and caption in line {number} of {table}, "
                f"found {line.strip()[:60]!r}; correct it."
            )
        yield number, row


def _csv_rows(table: Path, text: str) -> Iterator[tuple[int, dict]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            cause = next((ours for theirs, ours in _CSV.items() if theirs in str(error)), str(error))
            raise DataError(
                f"Expected readable rows in {table}, found in line {first}: {cause}; put quotes around a caption that has quotes or "
                'commas, and write " in it as "".'
            ) from error
        if columns is None:
            columns = _columns(table, row)
        elif row is None:
            return
        elif row:
            _require_whole(table, first, row, columns)
            yield first, dict(zip(columns, row, strict=False))


def _columns(table: Path, row: list[str] | None) -> list[str]:
    if not set(row or ()) & set(_FILE_KEYS) or not set(row) & set(_CAPTION_KEYS):
        raise DataError(f"Expected a first line with the columns file,caption in {table}, found {row}; add it.")
    if twice := [name for name in row if name and row.count(name) > 1]:
        raise DataError(f"Expected each column once in line 1 of {table}, found {twice[0]!r} twice; name or remove one.")
    return row


def _require_whole(table: Path, line: int, row: list[str], columns: list[str]) -> None:
    """DataError for a row of more columns than the first, which an unquoted comma makes, and one that has swallowed others."""
    if len(row) > len(columns):
        raise DataError(
            f"Expected {len(columns)} columns in line {line} of {table}, found {len(row)}; put quotes around a caption with commas."
        )
    for cell in row:
        lines = cell.splitlines()
        if any(map(_BEGINS.match, lines[1:])) or any(map(_ENDS.search, lines[:-1])):
            raise DataError(
                f"Expected one clip in line {line} of {table}, found a caption that goes on over the next rows; close its quote, and "
                'write " in a caption as "".'
            )


# A line that begins or ends with a file's name, as a swallowed row does.
_NAME = r"[^,]*\.(mp4|mov|mkv|webm|avi|png|jpe?g|webp|bmp)\s*"
_BEGINS, _ENDS = re.compile(rf"(?i){_NAME},"), re.compile(rf"(?i),{_NAME}$")


def _pick(row: dict, keys: tuple[str, ...]):
    return next((row[key] for key in keys if row.get(key) is not None), None)


def cut_by(tokenizer, captions: Iterable[str]) -> list[str]:
    """The captions that are longer than a text encoder takes: what is beyond its tokenizer's length is not seen."""
    most = tokenizer.model_max_length
    # A token is a byte at least, so that short ones need no counting; two mark beginning and end.
    long = [caption for caption in dict.fromkeys(captions) if len(caption.encode()) + 2 > most]
    return [caption for caption in long if len(tokenizer(caption).input_ids) > most]


def words(text: str) -> str:
    """A text in one line, its words one space apart."""
    return " ".join(text.split())
