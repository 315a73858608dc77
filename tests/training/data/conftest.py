from pathlib import Path

import av
import numpy as np
import pytest

from training.data.clips import find_clips
from training.data.video import write_video
from training.world.scenes import render_split

FILES = Path(__file__).parent / "files"
CLIPS = [(clip.frames, clip.content.caption) for clip in render_split(3, style="plain", held_out=False, seed=0)]


@pytest.fixture
def folder(tmp_path):
    """Three videos a, b, c; captions are each test's own."""
    for name, (frames, _) in zip("abc", CLIPS, strict=True):
        write_video(tmp_path / f"{name}.mp4", frames, 8)
    return tmp_path


def beside(folder, **captions):
    for name, caption in captions.items():
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")


def found(folder):
    return {entry.path.name: entry.caption for entry in find_clips(folder)}


def encode_planes(path, planes, fmt, codec, matrix=1, curve=1, frames=3):
    """Writes a video of a still, (3, H, W) of video range in a 4:4:4 format, with the numbers of H.273 for its matrix and curve."""
    declared = {"colorspace": matrix, "color_trc": curve, "color_primaries": 9 if curve in (16, 18) else 1, "color_range": 1}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options={"crf": "1", "x265-params": "log-level=none"})
        stream.height, stream.width, stream.pix_fmt = *planes.shape[1:], fmt
        for name, value in declared.items():
            setattr(stream.codec_context, name, value)
        # PyAV takes 8 bits as planes, 16 bits as pixels.
        pixels = planes if planes.dtype == np.uint8 else np.ascontiguousarray(np.moveaxis(planes, 0, -1))
        for _ in range(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format=fmt)
            for name, value in declared.items():
                setattr(frame, name, value)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
