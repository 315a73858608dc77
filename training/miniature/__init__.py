"""The miniature: a rendered world of captioned clips and the small real stack that is trained on it."""
