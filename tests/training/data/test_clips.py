import io
import json
import logging
import tarfile

import pytest
import torch
import webdataset

from training.data.clips import (
    ClipFolder,
    DataError,
    Entry,
    cover,
    epoch_order,
    find_clips,
    indices,
    needs_clips,
    rank_places,
    write_clips,
)
from training.data.video import VideoError, write_video
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


# ---- tar shards ----


@pytest.fixture
def shards(folder, tmp_path_factory):
    """The videos a, b, c in two shards, as WebDataset writes them; captions "clip a", ..., the second's as JSON."""
    place = tmp_path_factory.mktemp("shards")
    for number, names in enumerate(["ab", "c"]):
        with webdataset.TarWriter(str(place / f"train-{number}.tar")) as tar:
            for name in names:
                caption = {"json": {"caption": f"clip {name}"}} if number else {"txt": f"clip {name}"}
                tar.write({"__key__": name, "mp4": (folder / f"{name}.mp4").read_bytes(), **caption})
    return place


def test_tar_shards_hold_the_clips_of_the_folder(folder, shards):
    beside(folder, **{name: f"clip {name}" for name in "abc"})
    plain, packed = ClipFolder(folder, 8, 64, 64), ClipFolder(shards, 8, 64, 64)
    assert packed.captions == plain.captions and not packed.skipped
    assert [entry.name for entry in packed.entries] == ["train-0.tar/a.mp4", "train-0.tar/b.mp4", "train-1.tar/c.mp4"]
    assert all(torch.equal(packed.read(i), plain.read(i)) for i in range(3))
    assert [e.fingerprint() for e in packed.entries] == [e.fingerprint() for e in plain.entries]


def test_tar_shards_hold_the_samples_that_webdataset_reads(shards):
    read = webdataset.WebDataset(sorted(map(str, shards.glob("*.tar"))), shardshuffle=False)
    for sample, entry in zip(read, find_clips(shards), strict=True):
        data = entry.path.read_bytes()[entry.span[0] : sum(entry.span)]
        assert entry.name == f"{sample['__url__'].rpartition('/')[2]}/{sample['__key__']}.mp4" and data == sample["mp4"]


def test_a_pattern_and_a_file_name_tar_shards(shards):
    assert len(find_clips(shards / "train-*.tar")) == 3 and len(find_clips(shards / "*-1.tar")) == 1
    assert len(find_clips(shards / "train-0.tar")) == 2
    assert not needs_clips(shards / "*.tar") and not needs_clips(shards / "none-*.tar")
    with pytest.raises(DataError, match="found nothing"):
        find_clips(shards / "none-*.tar")
    (shards / "notes.md").touch()
    with pytest.raises(DataError, match=r"found notes\.md"):
        find_clips(shards / "*")


def test_bad_samples_of_a_tar_shard_are_named_skipped_and_counted(shards, caplog):
    good = find_clips(shards)[0]
    good = good.path.read_bytes()[good.span[0] : sum(good.span)]
    with webdataset.TarWriter(str(shards / "train-2.tar")) as tar:
        tar.write({"__key__": "cut", "mp4": good[: len(good) // 2], "txt": "x"})
        tar.write({"__key__": "empty", "mp4": b"", "txt": "x"})
        tar.write({"__key__": "mute", "mp4": good})
        tar.write({"__key__": "odd", "mp4": good, "json": ["no", "object"]})
        tar.write({"__key__": "still", "jpg": b"", "txt": "x"})
    with caplog.at_level(logging.WARNING):
        clips = ClipFolder(shards, 8, 64, 64)
    assert len(clips) == 3
    assert [name for name, _ in clips.skipped] == [f"train-2.tar/{n}.mp4" for n in ("cut", "empty", "mute", "odd")]
    assert all(name in caplog.text for name, _ in clips.skipped)


def test_broken_tar_shards_are_refused(shards):
    path = shards / "train-0.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        second = [member.offset for member in tar][2]
    torn = [data[: len(data) // 2], data[:700], data[:second], b"no tar" * 500, b""]
    for broken in torn:
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"uncompressed tar shard at .*train-0\.tar") as caught:
            ClipFolder(shards, 8, 64, 64)
        assert "\n" not in str(caught.value)
    with tarfile.open(path, "w") as tar:
        for name in ("a.mp4", "a.mp4"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(DataError, match=r"duplicate .*train-0\.tar|train-0\.tar.* duplicate"):
        find_clips(path)


def test_videos_beside_tar_shards_are_refused(folder, shards):
    (shards / "train-0.tar").rename(folder / "train-0.tar")
    with pytest.raises(DataError, match="keep one kind"):
        find_clips(folder)


def test_a_tar_shard_that_goes_bad_later(shards):
    clips = ClipFolder(shards, 8, 64, 64)
    (shards / "train-0.tar").write_bytes(b"")
    with pytest.raises(VideoError, match=r"train-0\.tar/a\.mp4"):
        clips.read(0)
    (shards / "train-0.tar").unlink()
    with pytest.raises(VideoError, match=r"train-0\.tar"):
        clips.read(0)


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


@pytest.mark.parametrize("length", [1, 5, 12, 13, 40])
@pytest.mark.parametrize(("batch", "ranks"), [(1, 1), (4, 1), (4, 2), (6, 3), (12, 4)])
def test_ranks_take_disjoint_parts_and_no_clip_twice_in_a_pass(length, batch, ranks):
    passes = [[] for _ in range(-(-10 * batch // length))]
    for step in range(10):
        parts = [rank_places(step * batch, batch, rank, ranks) for rank in range(ranks)]
        assert [place for part in parts for place in part] == list(range(step * batch, (step + 1) * batch))
        assert len({len(part) for part in parts}) == 1
        for part in parts:
            for place, sample in zip(part, indices(part.start, len(part), length, 7), strict=True):
                passes[place // length].append(sample)
    assert all(len(set(seen)) == len(seen) for seen in passes)
    assert all(sorted(seen) == list(range(length)) for seen in passes[:-1])


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="3 processes share equally, found 8"):
        rank_places(0, 8, 0, 3)
    with pytest.raises(ValueError, match="from 0 to 1, found 2"):
        rank_places(0, 8, 2, 2)


def test_the_order_is_pinned():
    """A run that is resumed under another release of NumPy needs the same stream."""
    assert epoch_order(8, 0, 0) == [2, 4, 3, 6, 5, 0, 1, 7]
