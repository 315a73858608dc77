"""What a run would take: operations and memory, counted without data."""
