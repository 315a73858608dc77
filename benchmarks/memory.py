"""What a run would take, before it is begun: `python benchmarks/memory.py [--config FILE] [--section.key VALUE ...]`.

Memory tensor by tensor and operations part by part, of one clip at a time through SD1.5 with AnimateDiff's v3, counted without numbers.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository in place of this folder: runs from anywhere

from training.cost.memory_plan import in_words, memory_plan
from training.cost.operations import count_parts, meta_inputs, meta_roles, phases, update_cost
from training.run.command_line import load_config
from training.run.config import ConfigError


def main(argv: list[str] | None = None) -> None:
    config = load_config(argv)
    data = config.data
    print(f"{data.frames} frames of {data.width}x{data.height}, model.train {config.model.train}")
    print(in_words(memory_plan(config)))
    parts = count_parts(*meta_roles(config), meta_inputs(config))
    counts, whole = phases(config), 0.0
    for phase, updates in counts.items():
        cost = update_cost(config, parts, phase)
        together = sum(cost.values())
        whole += updates * together
        words = ["warm-up", "distribution matching"][phase.matching] + ("" if phase.critics else ", without critics")
        if phase.matching and config.adm.weight > 0 and not phase.adm:
            words += ", without ADM"
        print(f"\nOperations for a clip and update of the {words} ({updates} updates):")
        print("\n".join(f"{n / 1e12:8.1f} T  {name}" for name, n in (cost | {"together": together}).items()))
    print(f"\n{whole / counts.total() / 1e12:8.1f} T  mean of the whole run")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(str(error))
