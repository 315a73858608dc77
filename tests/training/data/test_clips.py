import logging

import pytest
import torch

from tests.training.data.conftest import CLIPS, beside
from training.data import DataError, video
from training.data.clips import ClipFolder, Entry, find_clips, needs_clips, write_clips
from training.data.video import VideoError, write_video

# ---- bad files ----


def test_bad_files_are_named_skipped_and_counted(folder, caplog):
    data = (folder / "b.mp4").read_bytes()
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    (folder / "text.mp4").write_text("no video" * 100)
    write_video(folder / "short.mp4", CLIPS[0][0][:5], 8)
    rows = [f"{n}.mp4,x" for n in ("a", "b", "c", "empty", "cut", "text", "short", "missing")]
    (folder / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    with caplog.at_level(logging.WARNING):
        clips = ClipFolder(folder, 8, 64, 64)
    assert len(clips) == 3
    reasons = dict(clips.skipped)
    assert list(reasons) == ["cut.mp4", "empty.mp4", "missing.mp4", "short.mp4", "text.mp4"]
    assert "found 5" in reasons["short.mp4"] and "found nothing" in reasons["missing.mp4"] and "empty" in reasons["empty.mp4"]
    assert all(name in caplog.text for name in reasons)


def test_all_bad_is_refused(folder):
    beside(folder, a="a", b="b", c="c")
    with pytest.raises(DataError, match=r"3 that cannot be used.*at least 99 frames"):
        ClipFolder(folder, 99, 64, 64)


def test_no_clips_is_refused(tmp_path):
    with pytest.raises(DataError, match="no videos"):
        ClipFolder(tmp_path, 8, 64, 64)
    with pytest.raises(DataError, match="found nothing"):
        ClipFolder(tmp_path / "gone", 8, 64, 64)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="found a file"):
        find_clips(tmp_path / "file")


def test_a_file_that_goes_bad_later(folder):
    beside(folder, a="a")
    clips = ClipFolder(folder, 8, 64, 64)
    (folder / "a.mp4").unlink()
    with pytest.raises(VideoError, match=r"a\.mp4"):
        clips.read(0)


@pytest.mark.parametrize("size", [0, 1, 2**16, 3 * 2**16, 3 * 2**16 + 1, 2**20])
def test_a_fingerprint_is_of_size_beginning_middle_and_end(tmp_path, size):
    data, path = bytearray(size), tmp_path / "a.mp4"

    def fingerprint(span=None):
        path.write_bytes(data)
        return Entry("a.mp4", path, "a", span).fingerprint()

    seen = {fingerprint()}
    places = {0, size // 2, size - 1} if size else set()
    for place in places:
        data[place] ^= 1
        seen.add(fingerprint())
        data[place] ^= 1
    assert len(seen) == 1 + len(places) and fingerprint() in seen
    whole = fingerprint()
    data[:0], data[len(data) :] = b"tar", b"more"
    assert fingerprint((3, size)) == whole and fingerprint() not in seen
    path.unlink()
    assert Entry("a.mp4", path, "a").fingerprint() == ""


# ---- frames ----


def test_read(folder):
    beside(folder, a="a", b="b", c="c")
    clip = ClipFolder(folder, 8, 64, 64).read(1)
    assert clip.shape == (8, 64, 64, 3) and clip.dtype == torch.uint8
    assert (clip.float() - torch.from_numpy(CLIPS[1][0]).float()).abs().mean() < 4
    clip = ClipFolder(folder, 3, 32, 48, stride=3).read(1)
    assert clip.shape == (3, 32, 48, 3)


# ---- what is told ----


def test_the_summary_says_how_many_of_what(folder, caplog):
    beside(folder, a="a", b="b")
    (folder / "b.mp4").write_text("no video" * 100)
    with caplog.at_level(logging.INFO):
        clips = ClipFolder(folder, 8, 64, 64)
    assert {one.name: one.kind for one in clips.left_out} == {"b.mp4": "damaged", "c.mp4": "without a caption"}
    assert "1 clip is used, 2 skipped: 1 damaged, 1 without a caption" in caplog.text
    with pytest.raises(DataError, match=r"data\.strict.*2 skipped: .*; first b\.mp4: Expected a read") as caught:
        ClipFolder(folder, 8, 64, 64, strict=True)
    assert "\n" not in str(caught.value)
    (folder / "b.mp4").unlink()
    (folder / "c.mp4").unlink()
    assert len(ClipFolder(folder, 8, 64, 64, strict=True)) == 1


@pytest.mark.parametrize(
    "error", [UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), MemoryError(), ValueError("odd\nlines"), KeyError(1)]
)
def test_whatever_the_decoder_raises_costs_one_clip(folder, monkeypatch, error):
    beside(folder, a="a", b="b", c="c")
    moving = video._moving

    def sometimes(container, path):
        if path.name == "b.mp4":
            raise error
        return moving(container, path)

    monkeypatch.setattr(video, "_moving", sometimes)
    clips = ClipFolder(folder, 8, 64, 64)
    assert clips.captions == ["a", "c"] and clips.left_out[0].name == "b.mp4" and "\n" not in clips.left_out[0].reason


def test_clips_of_several_rates(folder, tmp_path, caplog):
    beside(folder, a="a", b="b", c="c")
    ClipFolder(folder, 8, 64, 64)
    assert "frame rates" not in caplog.text
    write_video(folder / "c.mp4", CLIPS[2][0], 24)
    ClipFolder(folder, 8, 64, 64)
    assert "several frame rates: 8 (2), 24 (1)." in caplog.text and "set data.fps" in caplog.text
    caplog.clear()
    clips = ClipFolder(folder, 2, 64, 64, fps=8)
    assert "frame rates" not in caplog.text
    assert torch.equal(clips.read(2), ClipFolder(folder, 2, 64, 64, stride=3).read(2))


# ---- writing ----


def test_written_clips_are_read_back(tmp_path):
    assert needs_clips(tmp_path / "set")
    write_clips(tmp_path / "set", CLIPS, 8)
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["00000.mp4", "00001.mp4", "00002.mp4", "captions.jsonl"]
    assert ClipFolder(tmp_path / "set", 8, 64, 64).captions == [caption for _, caption in CLIPS]
    assert not needs_clips(tmp_path / "set")
    with pytest.raises(DataError, match="in use"):
        write_clips(tmp_path / "set", CLIPS, 8)


def test_an_unfinished_folder_is_recognised_and_written_again(tmp_path):
    def cut_short():
        yield from CLIPS
        raise KeyboardInterrupt

    folder = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        write_clips(folder, cut_short(), 8)
    assert needs_clips(folder) and not (folder / "captions.jsonl").exists()
    with pytest.raises(DataError, match="cut short"):
        ClipFolder(folder, 8, 64, 64)
    write_clips(folder, CLIPS[:2], 8)
    clips = ClipFolder(folder, 8, 64, 64)
    assert len(clips) == 2 and not clips.skipped and not (folder / "00002.mp4").exists()


def test_somebodys_folder_is_not_written_into(folder):
    before = sorted(folder.iterdir())
    assert not needs_clips(folder)
    with pytest.raises(DataError, match="in use"):
        write_clips(folder, CLIPS, 8)
    assert sorted(folder.iterdir()) == before


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="Not a directory"):
        write_clips(tmp_path / "file" / "set", CLIPS, 8)
