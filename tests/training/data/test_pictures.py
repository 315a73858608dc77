import csv
import io
import logging
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.training.data.conftest import FILES
from training.data import DataError
from training.data.pictures import find_images, read_image, read_pictures

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    for i, size in enumerate([(64, 64), (80, 100), (70, 64)]):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size, 3), np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.txt").write_text("a red circle")
    return tmp_path


def plain(path):
    """As it is, where nothing is resized."""
    height, width = np.array(Image.open(path)).shape[:2]
    return read_image(path, height, width).numpy()


# ---- found ----


def test_captions_of_images(folder, tmp_path):
    images, left_out = find_images(folder)
    assert [caption for _, caption in images] == ["", "a red circle", ""] and not left_out
    place = tmp_path / "other"
    place.mkdir()
    (place / "x.jpg").write_bytes(b"no image")
    with (place / "captions.csv").open("w") as file:
        csv.writer(file).writerows([["file", "caption"], ["x.jpg", "a dog"]])
    assert find_images(place) == ([(place / "x.jpg", "a dog")], [])
    with pytest.raises(DataError, match="Expected an image at"):
        read_image(place / "x.jpg", 8, 8)
    assert read_image(folder / "1.png", 64, 64).shape == (64, 64, 3)


def test_hidden_folders_are_left_out(folder):
    for name in (".thumbnails", ".ipynb_checkpoints", ".Trash-1000/files"):
        (folder / name).mkdir(parents=True)
        (folder / name / "old.png").write_bytes((folder / "0.png").read_bytes())
    assert len(find_images(folder)[0]) == 3


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le"])
def test_a_picture_whose_caption_is_in_another_encoding_is_named(folder, caplog, encoding):
    (folder / "2.txt").write_bytes("a man’s café".encode(encoding))
    with caplog.at_level(logging.INFO):
        pixels, captions = read_pictures(folder, 16, 16)
    assert pixels.shape == (2, 16, 16, 3) and captions == ["", "a red circle"]
    assert "2.txt, found another encoding than UTF-8" in caplog.text
    assert "2 pictures are used, 1 skipped: 1 with a caption that cannot be read" in caplog.text
    with pytest.raises(DataError, match=r"data\.strict.*first 2\.png"):
        read_pictures(folder, 16, 16, strict=True)


def test_a_damaged_picture_costs_itself_alone(folder, caplog):
    data = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(data[: len(data) // 2])
    (folder / "captions.csv").write_text("file,caption\n1.png,one\ngone.png,lost\n")
    pixels, captions = read_pictures(folder, 16, 16)
    assert len(pixels) == 2 and captions == ["one", ""]
    assert "Skipped 0.png: " in caplog.text and "Skipped gone.png: Expected an image at" in caplog.text
    assert "2 skipped: 1 damaged, 1 missing" in caplog.text
    for name in ("1.png", "2.png"):
        (folder / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"pictures that can be used .*4 skipped") as caught:
        read_pictures(folder, 16, 16)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_costs_itself_alone(folder, caplog):
    os.mkfifo(folder / "pipe.png")  # whoever opens it waits for ever
    (folder / "loop.jpg").symlink_to("loop.jpg")
    assert len(read_pictures(folder, 16, 16)[0]) == 3
    assert "pipe.png, found neither a file nor a folder" in caplog.text and "loop.jpg, found nothing" in caplog.text


# ---- read ----


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_a_picture(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(PIXELS).save(tmp_path / "x.png", exif=exif)
    want = np.array(ImageOps.exif_transpose(Image.open(tmp_path / "x.png")))
    assert np.array_equal(read_image(tmp_path / "x.png", *want.shape[:2]).numpy(), want)


@pytest.mark.parametrize("name", ["exif_repr.png", "rawexif.png"])
def test_damaged_exif_leaves_the_picture_as_it_is_stored(name):
    assert np.array_equal(plain(FILES / name), np.array(Image.open(FILES / name).convert("RGB")))


@pytest.mark.parametrize(
    "damage",
    [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0" + bytes(30), b"junk"],
)
def test_other_damaged_exif(tmp_path, damage):
    whole = io.BytesIO()
    Image.fromarray(PIXELS).save(whole, "jpeg", quality=100)
    data = whole.getvalue()
    (tmp_path / "x.jpg").write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(damage) + 2) + damage + data[2:])
    whole.seek(0)
    assert np.array_equal(plain(tmp_path / "x.jpg"), np.array(Image.open(whole)))


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_what_is_transparent_is_white(tmp_path, suffix):
    alpha = np.linspace(0, 255, 240).reshape(12, 20, 1).astype(np.uint8)
    Image.fromarray(np.concatenate([PIXELS, alpha], 2)).save(tmp_path / f"x.{suffix}", lossless=True, exact=True)
    want = PIXELS * (alpha / 255) + 255 * (1 - alpha / 255)
    assert np.abs(plain(tmp_path / f"x.{suffix}") - want).max() <= 1


def test_other_kinds_of_transparency(tmp_path):
    grey = np.arange(240, dtype=np.uint8).reshape(12, 20)
    Image.fromarray(np.stack([grey, np.full_like(grey, 0)], 2), "LA").save(tmp_path / "la.png")
    assert (plain(tmp_path / "la.png") == 255).all()
    palette = Image.fromarray(grey % 4, "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.array_equal(plain(tmp_path / "p.png")[0, :4], [[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]])
    Image.fromarray(grey).save(tmp_path / "l.png", transparency=7)
    assert plain(tmp_path / "l.png")[0, 6:9, 0].tolist() == [6, 255, 8]
    Image.fromarray(np.uint16(257) * grey.astype(np.uint16)).save(tmp_path / "i.png")
    assert np.array_equal(plain(tmp_path / "i.png")[..., 0], grey)


def test_sixteen_bits_are_read_by_value(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    read = read_image(tmp_path / "x.png", 64, 64).float()
    assert abs(read.mean() - 127.5) < 0.5 and (read[..., 0] - torch.from_numpy(ramp / 257).float()).abs().max() <= 0.51


def test_other_modes(tmp_path):
    palette = Image.fromarray(PIXELS).quantize(16)
    palette.save(tmp_path / "p.png")
    assert np.array_equal(plain(tmp_path / "p.png"), np.array(palette.convert("RGB")))
    smooth = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    Image.fromarray(smooth).convert("CMYK").save(tmp_path / "c.jpg", quality=100)
    assert np.abs(plain(tmp_path / "c.jpg").astype(int) - smooth).max() <= 3
    Image.fromarray(PIXELS[..., 0] > 127).save(tmp_path / "b.png")
    assert np.array_equal(plain(tmp_path / "b.png")[..., 1], np.where(PIXELS[..., 0] > 127, 255, 0))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_of_no_known_range_are_refused(tmp_path, kind):
    Image.fromarray(PIXELS[..., 0].astype(kind)).save(tmp_path / "x.png", "tiff")
    with pytest.raises(DataError, match="whose range it does not say"):
        read_image(tmp_path / "x.png", 8, 8)


def test_an_ordinary_picture_is_read_as_before(folder):
    assert np.array_equal(read_image(folder / "0.png", 64, 64).numpy(), np.array(Image.open(folder / "0.png").convert("RGB")))
