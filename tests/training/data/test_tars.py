import io
import logging
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
