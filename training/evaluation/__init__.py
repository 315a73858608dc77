"""Measuring clips: the metrics, the feature net, the tables and the pictures."""
