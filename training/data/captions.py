"""Captions of videos and images: a table in the folder, or a text beside each file."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from training.data import DataError

TABLES = ("captions.csv", "captions.jsonl")
_FILE_KEYS, _CAPTION_KEYS = ("file", "video", "path"), ("caption", "text")


def caption_in(row: dict) -> str:
    """The caption of a table's row or of a JSON object; "" where it has none."""
    caption = _pick(row, _CAPTION_KEYS)
    return words(caption) if isinstance(caption, str) else ""


def caption_beside(path: Path) -> str:
    """The text in the .txt beside a file; "" where there is none that can be read."""
    try:
        return words(path.with_suffix(".txt").read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError):
        return ""


def read_table(folder: Path) -> dict[str, str]:
    """{path in the folder: caption} of the folder's table; {} if it has none. DataError for one that cannot be used."""
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
        if str(place) in captions:
            raise DataError(f"Expected each file once in {table}, found {name!r} again in line {line}; remove one.")
        captions[str(place)] = caption_in(row)
    return captions


def _rows(table: Path) -> Iterator[tuple[int, dict]]:
    """Yields (line number, row as a dict)."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".csv":
                reader = csv.DictReader(file)
                if not set(reader.fieldnames or ()) & set(_FILE_KEYS) or not set(reader.fieldnames) & set(_CAPTION_KEYS):
                    raise DataError(
                        f"Expected a first line with the columns file,caption in {table}, found {reader.fieldnames}; add it."
                    )
                for row in reader:
                    yield reader.line_num, row
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DataError(
                            f"Expected a JSON object with file and caption in line {number} of {table}, "
                            f"found {line.strip()[:60]!r}; correct it."
                        )
                    yield number, row
    except json.JSONDecodeError as error:
        raise DataError(
            f"Expected one JSON object a line in {table}, found in line {number}: {error.msg}; correct it."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"Expected {table} in UTF-8, found another encoding; save it as UTF-8.") from error
    except (csv.Error, OSError) as error:
        raise DataError(f"Expected a readable table of captions at {table}, found: {error}.") from error


def _pick(row: dict, keys: tuple[str, ...]):
    return next((row[key] for key in keys if row.get(key) is not None), None)


def words(text: str) -> str:
    """A text in one line, its words one space apart."""
    return " ".join(text.split())
