"""Builds the miniature from nothing, in stages that resume: `python training/build_miniature.py [--stages vae image …]`."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository in place of this folder: runs from anywhere
    from training.run import entry

    entry.begin()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from training.miniature.build import main
from training.run import console

if __name__ == "__main__":
    console.set_up()
    entry.run(main, interrupted="Interrupted; the same command goes on.")
