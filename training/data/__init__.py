"""What a run learns from: videos, their captions, their order, their latents, and clips that the teacher samples."""


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence that names its file or folder."""
