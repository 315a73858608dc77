"""How a run is held: settings, folder, checkpoints, processes, randomness, and what it takes."""
