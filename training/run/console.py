"""What commands say on the terminal, and the kinds of numbers that they take from it."""

import argparse
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from training.run.reading import require_path


def set_up() -> None:
    """Plain lines for our own messages; neither library's notes about its own defaults are for the reader."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def path(text: str) -> Path:
    """A type for argparse: a path that a file can have."""
    try:
        return require_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, found {text[:80]!r}") from error


def prompt(text: str) -> str:
    """A type for argparse: text that can be written down, which bytes of another encoding than the terminal's are not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"expected text in UTF-8, found {text!r}") from error
    return text


def between(low: int, high: int) -> Callable[[str], int]:
    """A type for argparse."""

    def whole_number(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, found {text!r}")
        return int(text)

    return whole_number


def scale(text: str) -> float:
    """A type for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number from 0, found {text!r}")
    return value
