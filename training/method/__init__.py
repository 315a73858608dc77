"""The method: what learns, by which losses, in which order."""
