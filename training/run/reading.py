"""Small files that people and programs wrote, read whole: text in UTF-8, and JSON. One rule says what is wrong with one."""

import json
import os
from pathlib import Path
from typing import Any

_LONGEST_NAME = 255  # bytes, of every file system in use
_MARKS = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class UnreadableError(ValueError):
    """A file or a text that cannot be read; the message says in a few words what was found in its place."""


def read_bytes(path) -> bytes:
    """What a file holds. UnreadableError for what is no file: nothing, a folder, a pipe (which would wait for ever); no right to read."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UnreadableError("a folder" if path.is_dir() else "neither a file nor a folder")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableError(error.strerror or type(error).__name__) from error
    except UnreadableError:
        raise
    except ValueError as error:  # of a name with a NUL, or one that no file can have
        raise UnreadableError(f"a path that no file can have ({error})") from error


def decoded(data: bytes) -> str:
    """UTF-8 as text. UnreadableError for another encoding.

    UTF-16 is known by its mark or its NULs, ISO 2022 by its escapes, the rest by UTF-8's own rules.
    """
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            raise UnreadableError(f"another encoding than UTF-8 ({name})")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError("another encoding than UTF-8") from error
    if "\0" in text or "\x1b" in text:
        raise UnreadableError("another encoding than UTF-8" + (" (such as UTF-16)" if "\0" in text else ""))
    return text


def read_text(path) -> str:
    """A file's text. UnreadableError as `read_bytes` and `decoded`."""
    return decoded(read_bytes(path))


def parsed(text: str | bytes) -> Any:
    """What a text in JSON says. UnreadableError for no JSON, nested too deep, a number too long, a key twice or half a character."""
    try:
        value = json.loads(decoded(text) if isinstance(text, bytes) else text, object_pairs_hook=_once)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnreadableError:
        raise
    except json.JSONDecodeError as error:
        raise UnreadableError(f"no JSON ({error.msg})") from error
    except RecursionError as error:
        raise UnreadableError("JSON that is nested too deep") from error
    except UnicodeEncodeError as error:
        raise UnreadableError("half a character (a lone surrogate)") from error
    except ValueError as error:  # of a number with thousands of digits
        raise UnreadableError("a number that is too long") from error


def _once(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise UnreadableError(f"{next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def read_json(path) -> Any:
    """What a file of JSON says. UnreadableError as `read_text` and `parsed`."""
    return parsed(read_text(path))


def require_path(path: str | os.PathLike) -> Path:
    """The path. ValueError for one that no file can have: empty, with a NUL, a name of more than 255 bytes, or half a character in it."""
    path = Path(path)
    if path == Path():
        raise ValueError("expected a path")
    try:
        longest = max(len(os.fsencode(part)) for part in path.parts)
    except UnicodeEncodeError:
        raise ValueError("expected a path that can be written down") from None
    if "\0" in str(path) or longest > _LONGEST_NAME or len(os.fsencode(path)) >= os.pathconf("/", "PC_PATH_MAX"):
        raise ValueError(f"expected a path of names up to {_LONGEST_NAME} bytes, without NUL")
    return path


def printable(text: str) -> str:
    """A name from the disk as text that can be written down: bytes that are no UTF-8 as \\xe9."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
