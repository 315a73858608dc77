import json
import logging

import pytest
import torch

from training.data import ClipFolder, DataError, cover, epoch_order, find_clips, indices, needs_clips, write_clips
from training.miniature.world import render_split
from training.video import VideoError, write_video

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


# ---- captions ----


@pytest.mark.parametrize("header", ["file,caption", "path,text", "video,caption", "caption,file"])
def test_csv(folder, header):
    row = '"one, two",{}.mp4' if header.startswith("caption") else '{}.mp4,"one, two"'
    (folder / "captions.csv").write_text("\n".join([header, *(row.format(n) for n in "cab")]), encoding="utf-8")
    assert found(folder) == {f"{n}.mp4": "one, two" for n in "abc"}
    assert [entry.path.name for entry in find_clips(folder)] == ["a.mp4", "b.mp4", "c.mp4"]


def test_csv_saved_by_a_spreadsheet(folder):
    (folder / "captions.csv").write_bytes("file,caption\r\na.mp4,Äpfel\r\nb.mp4,b\r\nc.mp4,c\r\n".encode("utf-8-sig"))
    assert found(folder)["a.mp4"] == "Äpfel"


@pytest.mark.parametrize(("file", "caption"), [("file", "caption"), ("video", "text"), ("path", "caption")])
def test_jsonl(folder, file, caption):
    lines = [json.dumps({file: f"{n}.mp4", caption: f"clip {n}"}) for n in "abc"]
    (folder / "captions.jsonl").write_text("\n\n".join(lines))
    assert found(folder) == {f"{n}.mp4": f"clip {n}" for n in "abc"}


def test_text_beside_and_subfolders(folder):
    beside(folder, a=" first\nline ", b="b")
    (folder / "more").mkdir()
    (folder / "c.mp4").rename(folder / "more" / "c.MP4")
    beside(folder / "more", c="c")
    assert found(folder) == {"a.mp4": "first line", "b.mp4": "b", "c.MP4": "c"}


def test_a_missing_caption_is_named_skipped_and_counted(folder, caplog):
    beside(folder, a="a", b=" ")
    with caplog.at_level(logging.WARNING):
        clips = ClipFolder(folder, 8, 64, 64)
    assert clips.captions == ["a"] and len(clips) == 1
    assert [name for name, _ in clips.skipped] == ["b.mp4", "c.mp4"]
    assert "b.mp4" in caplog.text and "c.mp4" in caplog.text and "1 clips are used, 2 skipped" in caplog.text


def test_hidden_files_and_other_files_are_no_clips(folder):
    beside(folder, a="a", b="b", c="c")
    (folder / "._a.mp4").write_bytes(b"resource fork")
    (folder / "notes.md").write_text("notes")
    assert len(found(folder)) == 3 and not ClipFolder(folder, 8, 64, 64).skipped


@pytest.mark.parametrize("name", ["../a.mp4", "x/../../a.mp4", "/etc/a.mp4", "C:/a.mp4", "..\\\\a.mp4"])
@pytest.mark.parametrize("table", ["captions.csv", "captions.jsonl"])
def test_a_table_that_leaves_the_folder_is_refused(folder, name, table):
    text = f"file,caption\n{name},x\n" if table.endswith("csv") else json.dumps({"file": name, "caption": "x"})
    (folder / table).write_text(text)
    with pytest.raises(DataError, match=f"inside .*{table}"):
        find_clips(folder)


@pytest.mark.parametrize(
    ("table", "text", "word"),
    [
        ("captions.csv", "", "columns file,caption"),
        ("captions.csv", "a.mp4,hello\n", "columns file,caption"),
        ("captions.csv", "file,caption\n,hello\n", "line 2"),
        ("captions.csv", "file,caption\na.mp4,x\na.mp4,y\n", "again in line 3"),
        ("captions.csv", b"file,caption\na.mp4,\xff\xfe\n", "UTF-8"),
        ("captions.jsonl", '{"file": "a.mp4", "caption": "x"}\n{"file": ', "line 2"),
        ("captions.jsonl", "[1]", "line 1"),
        ("captions.jsonl", '{"file": 3, "caption": "x"}', "line 1"),
    ],
)
def test_a_broken_table_is_refused(folder, table, text, word):
    (folder / table).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=word) as caught:
        find_clips(folder)
    assert table in str(caught.value) and "\n" not in str(caught.value)


def test_two_tables_are_refused(folder):
    (folder / "captions.csv").write_text("file,caption\n")
    (folder / "captions.jsonl").write_text("")
    with pytest.raises(DataError, match="keep one"):
        find_clips(folder)


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


# ---- frames ----


def test_read(folder):
    beside(folder, a="a", b="b", c="c")
    clip = ClipFolder(folder, 8, 64, 64).read(1)
    assert clip.shape == (8, 64, 64, 3) and clip.dtype == torch.uint8
    assert (clip.float() - torch.from_numpy(CLIPS[1][0]).float()).abs().mean() < 4
    clip = ClipFolder(folder, 3, 32, 48, stride=3).read(1)
    assert clip.shape == (3, 32, 48, 3)


@pytest.mark.parametrize("sides", [(48, 96), (96, 48), (200, 130), (30, 31), (64, 64)])
def test_cover_cuts_the_centre(sides):
    h, w = sides
    frames = torch.zeros(2, h, w, 3, dtype=torch.uint8)
    frames[:, h // 2 - h // 8 : h // 2 + h // 8, w // 2 - w // 8 : w // 2 + w // 8] = 255
    cut = cover(frames, 64, 64)
    assert cut.shape == (2, 64, 64, 3) and cut.dtype == torch.uint8
    rows, columns = (cut[0, ..., 0] > 127).nonzero(as_tuple=True)
    assert abs(rows.float().mean() - 31.5) < 1.5 and abs(columns.float().mean() - 31.5) < 1.5


def test_cover_is_antialiased():
    checks = (torch.arange(256)[:, None] + torch.arange(256)) % 2 * 255
    cut = cover(checks.to(torch.uint8)[None, :, :, None].expand(1, 256, 256, 3), 64, 64)
    assert (cut.float() - 127.5).abs()[:, 2:-2, 2:-2].max() < 4


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


# ---- order ----


def test_every_pass_is_a_fresh_permutation():
    passes = [epoch_order(50, 3, epoch) for epoch in range(4)]
    assert all(sorted(order) == list(range(50)) for order in passes)
    assert len({tuple(order) for order in passes}) == 4
    assert epoch_order(50, 3, 2) == passes[2] != epoch_order(50, 4, 2)


def test_indices_are_slices_of_one_stream():
    stream = [i for epoch in range(5) for i in epoch_order(7, 1, epoch)]
    assert indices(0, 35, 7, 1) == stream
    assert [i for p in range(0, 32, 4) for i in indices(p, 4, 7, 1)] == stream[:32]
    ranks = [indices(8 + rank * 2, 2, 7, 1) for rank in range(2)]
    assert ranks[0] + ranks[1] == indices(8, 4, 7, 1)
    assert indices(5, 3, 1, 1) == [0, 0, 0]


def test_the_order_is_pinned():
    """A run that is resumed under another release of NumPy needs the same stream."""
    assert epoch_order(8, 0, 0) == [2, 4, 3, 6, 5, 0, 1, 7]
