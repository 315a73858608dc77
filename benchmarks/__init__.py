"""How fast sampling and training are, on the machine that this runs on: `python benchmarks/run.py`."""
