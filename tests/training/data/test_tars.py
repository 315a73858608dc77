import io
import logging
import os
import tarfile

import pytest
import torch
import webdataset

from tests.training.data.conftest import beside
from training.data import DataError
from training.data.clips import ClipFolder, find_clips, needs_clips
from training.data.video import VideoError


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


def packed(path, files, links=()):
    """A tar of (name, bytes), then of (name, kind, target)."""
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    return path


@pytest.fixture
def clip(folder):
    return (folder / "a.mp4").read_bytes()


def test_names_with_dots_are_read(clip, tmp_path):
    files = [
        ("clip.0001.mp4", clip),
        ("clip.0001.txt", b"one"),
        ("clip.0002.mp4", clip),
        ("clip.0002.json", b'{"caption": "two"}'),
    ]
    files += [("v1.5.final.mp4", clip), ("v1.5.final.txt", b"three"), ("x/y.z.MP4", clip), ("x/y.z.TXT", b"four")]
    found = find_clips(packed(tmp_path / "t.tar", files))
    assert [(entry.name, entry.caption) for entry in found] == [
        ("t.tar/clip.0001.mp4", "one"), ("t.tar/clip.0002.mp4", "two"), ("t.tar/v1.5.final.mp4", "three"), ("t.tar/x/y.z.mp4", "four"),
    ]  # fmt: skip
    assert all(entry.path.read_bytes()[entry.span[0] : sum(entry.span)] == clip for entry in found)


def test_a_second_video_of_a_sample_is_named(clip, tmp_path):
    clips = ClipFolder(packed(tmp_path / "t.tar", [("a.mp4", clip), ("a.proxy.mp4", clip), ("a.txt", b"a")]), 8, 64, 64)
    assert clips.captions == ["a"] and [name for name, _ in clips.skipped] == ["t.tar/a.proxy.mp4"]


@pytest.mark.parametrize("text", ["a man’s café".encode("cp1252"), "a dog".encode("utf-16"), "a dog".encode("utf-16-be")])
@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_captions_in_other_encodings_are_named(clip, tmp_path, text, suffix):
    clips = ClipFolder(
        packed(tmp_path / "t.tar", [("a.mp4", clip), (f"a.{suffix}", text), ("b.mp4", clip), ("b.txt", b"b")]), 8, 64, 64
    )
    assert clips.captions == ["b"] and clips.left_out[0].kind == "with a caption that cannot be read"
    assert f"t.tar/a.{suffix}, found another encoding than UTF-8" in clips.left_out[0].reason


@pytest.mark.parametrize("text", [b"{", b"[" * 100_000, b'{"caption": "\\ud800"}', b'{"caption": "a", "caption": "b"}'])
def test_captions_that_are_no_json_are_named(clip, tmp_path, text):
    clips = ClipFolder(
        packed(tmp_path / "t.tar", [("a.mp4", clip), ("a.json", text), ("b.mp4", clip), ("b.txt", b"b")]), 8, 64, 64
    )
    assert clips.captions == ["b"] and "t.tar/a.json" in clips.left_out[0].reason and "\n" not in clips.left_out[0].reason


def test_links_in_a_tar_shard(clip, tmp_path):
    """A hard link is the file it names, which tar writes for a second name of one file; another link cannot be followed."""
    links = [("b.mp4", tarfile.LNKTYPE, "a.mp4"), ("b.txt", tarfile.LNKTYPE, "a.txt"), ("c.mp4", tarfile.SYMTYPE, "a.mp4")]
    clips = ClipFolder(packed(tmp_path / "t.tar", [("a.mp4", clip), ("a.txt", b"a")], links), 8, 64, 64)
    assert clips.captions == ["a", "a"] and torch.equal(clips.read(0), clips.read(1))
    assert "t.tar/c.mp4, found a link" in dict(clips.skipped)["t.tar/c.mp4"]


def test_hidden_folders_of_a_tar_shard_are_left_out(clip, tmp_path):
    files = [("./a.mp4", clip), ("./a.txt", b"a"), (".thumbs/b.mp4", clip), (".thumbs/b.txt", b"b"), ("x/.y/c.mp4", clip)]
    clips = ClipFolder(packed(tmp_path / "t.tar", files), 8, 64, 64)
    assert clips.captions == ["a"] and not clips.skipped


def test_a_pipe_in_the_place_of_a_tar_shard_is_refused(tmp_path):
    os.mkfifo(tmp_path / "t.tar")
    with pytest.raises(DataError, match=r"t\.tar, found: no file"):
        find_clips(tmp_path)
