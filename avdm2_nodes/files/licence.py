"""The licence that a model's folder states, in a few words for the files that are made of it."""

import contextlib
import re
from pathlib import Path

from .paths import is_file
from .sentences import one_line

SD15 = "CreativeML OpenRAIL-M"
_APACHE = re.compile(r"\s*Apache License\s+Version 2\.0", re.IGNORECASE)
_READ = 4096  # bytes; a licence's name comes first


def licence_of(folder: Path) -> str:
    """What the first line with a word in the folder's LICENSE says, Apache's own text by its short name; SD1.5's where it states none.

    Never fails: signs that are not UTF-8 are replaced, and a file that cannot be read states nothing.
    """
    path, text = Path(folder) / "LICENSE", ""
    if is_file(path):
        with contextlib.suppress(OSError), path.open("rb") as file:
            text = file.read(_READ).decode("utf-8-sig", "replace")
    if _APACHE.match(text):
        return "Apache-2.0"
    return next((one_line(line.strip()) for line in text.splitlines() if line.strip()), SD15)
