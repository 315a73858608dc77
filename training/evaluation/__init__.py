"""Measuring clips of the miniature world: the oracle, the metrics, the feature net and the pictures."""
