"""What the entry scripts say on the terminal."""

import logging
import warnings

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


def set_up() -> None:
    """Plain lines for our own messages; neither library's notes about its own defaults are for the reader."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
