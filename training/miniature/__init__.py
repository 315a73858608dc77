"""The miniature: a small real stack, trained on the rendered world."""
