import pytest

from training.data.clips import find_clips
from training.data.video import write_video
from training.world.scenes import render_split

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
