import errno
import os

import numpy as np
import pytest
from PIL import Image

from training.evaluation import pictures

CAPTIONS = ["a red circle", "a blue square"]


def solid(*colours, frames=8):
    return [np.full((frames, 64, 64, 3), c, np.uint8) for c in colours]


ROWS = {"real": solid((200, 0, 0), (0, 0, 200)), "student, 4 steps": solid((0, 180, 0), (180, 180, 0))}


def pixels(image, colour):
    return int((np.asarray(image.convert("RGB")) == colour).all(-1).sum())


def test_contact_sheet_shows_every_clip_enlarged(tmp_path):
    pictures.contact_sheet(ROWS, CAPTIONS, tmp_path / "sheet.png", shown=3)
    image = Image.open(tmp_path / "sheet.png")
    for clips in ROWS.values():
        for clip in clips:
            assert pixels(image, clip[0, 0, 0]) == 3 * 128 * 128
    assert image.getpixel((1, 1)) == (255, 255, 255)
    assert pixels(image, (28, 28, 30)) > 50  # captions


@pytest.mark.parametrize("suffix, kind", [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_a_sheet_is_of_the_kind_that_its_name_says_and_nothing_else_is_left(tmp_path, suffix, kind):
    pictures.contact_sheet(ROWS, CAPTIONS, tmp_path / f"sheet.{suffix}", shown=3)
    with Image.open(tmp_path / f"sheet.{suffix}") as sheet:
        assert sheet.format == kind
    assert [path.name for path in tmp_path.iterdir()] == [f"sheet.{suffix}"]


def test_contact_sheet_shows_frames_in_order(tmp_path):
    clip = np.zeros((8, 64, 64, 3), np.uint8) + np.arange(0, 80, 10, dtype=np.uint8)[:, None, None, None]
    pictures.contact_sheet({"a": [clip]}, ["caption"], tmp_path / "sheet.png", shown=2)
    image = np.asarray(Image.open(tmp_path / "sheet.png"))
    row = image[-40]
    assert np.flatnonzero((row == 0).all(-1)).max() < np.flatnonzero((row == 70).all(-1)).min()


@pytest.mark.parametrize("name", ["clip.webp", "clip.gif"])
def test_animation_has_all_frames_and_the_speed(name, tmp_path):
    clip = np.stack([np.full((64, 64, 3), 30 * i, np.uint8) for i in range(8)])
    pictures.animated({"real": [clip], "student": [clip]}, tmp_path / name, captions=["a caption that wraps"], fps=8)
    image = Image.open(tmp_path / name)
    assert image.n_frames == 8
    for i in (0, 5):
        image.seek(i)
        image.load()
        assert image.info["duration"] in (120, 125)  # GIF counts in hundredths of a second
        assert pixels(image, (30 * i,) * 3) >= 2 * 128 * 128


def test_plot_of_a_table_with_gaps(tmp_path):
    rows = {"teacher": {"accuracy": (0.9, 0.88, 0.92), "KID": (0.4, 0.3, 0.5)}, "student": {"accuracy": (0.95, 0.93, 0.97)}}
    pictures.plot_table(rows, tmp_path / "bars.png", better={"accuracy": "higher", "KID": "lower"})
    image = Image.open(tmp_path / "bars.png")
    assert image.width > image.height
    assert pixels(image, (61, 111, 180)) > 500 and pixels(image, (169, 184, 204)) > 1000


def test_plot_of_what_ways_make_of_their_teachers(tmp_path):
    def rows(teacher, student):
        values = {"taught": teacher, "real": 0.6, "way": student}
        return {name: {"Fréchet distance": (value, value - 0.1, value + 0.1)} for name, value in values.items()}

    tables = {"well": rows(1.0, 0.8), "little": rows(4.0, 1.5), "some": rows(2.0, 1.0) | {"alone": rows(2.0, 9.0)["way"]}}
    pictures.plot_gain(tables, tmp_path / "gain.png", teacher="taught", floor="real")
    with_all = Image.open(tmp_path / "gain.png")
    assert with_all.width > with_all.height and pixels(with_all, (31, 119, 180)) > 200  # the first colour of a curve


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="one clip a caption"):
        pictures.contact_sheet(ROWS, CAPTIONS[:1], tmp_path / "a.png")
    with pytest.raises(ValueError, match="one length"):
        pictures.animated({"a": solid((0, 0, 0)), "b": solid((0, 0, 0), frames=4)}, tmp_path / "a.webp")
    with pytest.raises(ValueError, match="measure first"):
        pictures.plot_table({"a": {}}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_picture_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    table = {"teacher": {"accuracy": (0.9, 0.88, 0.92)}}
    writers = {
        "sheet.png": lambda path: pictures.contact_sheet(ROWS, CAPTIONS, path),
        "clip.webp": lambda path: pictures.animated(ROWS, path),
        "clip.gif": lambda path: pictures.animated(ROWS, path),
        "bars.png": lambda path: pictures.plot_table(table, path),
    }
    for name, write in writers.items():
        write(tmp_path / name)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == writers.keys()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for name, write in writers.items():
        with pytest.raises(OSError, match="No space left on device"):
            write(tmp_path / name)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
