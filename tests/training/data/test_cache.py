import hashlib
import json
import os
import resource

import pytest
import torch
from safetensors.torch import save

from training.data import DataError
from training.data.cache import Cache, LatentClip, is_cache, write_cache
from training.data.unusable import Unusable

SPACE = {"vae": "a", "text_encoder": "b", "tokenizer": "c", "frames": 3, "height": 16, "width": 24, "stride": 2}
SOURCE = {"kind": "numbers"}
COUNT, SHARD, BAD = 11, 3, (1, 6, 7, 8)  # the third shard, 6 to 8, is left empty


def clip(i):
    generator = torch.Generator().manual_seed(i)
    latents, text = torch.randn(4, 3, 2, 3, generator=generator), torch.randn(5, 6, generator=generator)
    return Unusable(f"clip {i}", f"number {i} is bad") if i in BAD else LatentClip(f"clip {i}", f"Zahl „{i}“", latents, text)


class Maker:
    """Makes clips out of their numbers, and fails at one if told so."""

    def __init__(self, fails_at=None):
        self.fails_at, self.made = fails_at, []

    def __call__(self, parts):
        for i in (i for part in parts for i in part):
            if i == self.fails_at:
                raise KeyboardInterrupt
            self.made.append(i)
            yield clip(i)


def write(folder, make=None, space=SPACE, source=SOURCE):
    folder.mkdir(exist_ok=True)
    return write_cache(folder, space, source, COUNT, SHARD, make or Maker())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """What an unbroken writing leaves: {file: bytes}."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    write(folder)
    return contents(folder)


@pytest.fixture
def cache(whole, tmp_path):
    """A copy of it."""
    (tmp_path / "cache").mkdir()
    for name, data in whole.items():
        (tmp_path / "cache" / name).write_bytes(data)
    return tmp_path / "cache"


def test_what_was_written_is_read(tmp_path):
    assert not is_cache(tmp_path / "cache")
    usable, skipped = write(tmp_path / "cache")
    assert usable == 7 and skipped == [clip(i) for i in BAD] and is_cache(tmp_path / "cache")
    cache, good = Cache(tmp_path / "cache", SPACE), [clip(i) for i in range(COUNT) if i not in BAD]
    assert len(cache) == 7 and cache.captions == [c.caption for c in good]
    for i in (4, 0, 6, 3, 2, 5, 1):
        latents, text = cache.read(i)
        assert torch.equal(latents, good[i].latents) and torch.equal(text, good[i].text)


def test_a_writing_that_was_cut_short_goes_on_to_the_same_bytes(tmp_path, whole):
    for stop in range(COUNT):
        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            write(folder, Maker(fails_at=stop))
        with pytest.raises(DataError, match=r"cut short.*goes on"):
            Cache(folder, SPACE)
        (folder / ".shard-000000.safetensors.1.tmp").touch()  # what a kill leaves
        again = Maker()
        assert write(folder, again)[0] == 7
        assert again.made == list(range(stop // SHARD * SHARD, COUNT)) and contents(folder) == whole


def test_a_finished_cache_is_not_made_again(cache, whole):
    maker = Maker()
    assert write(cache, maker) == (7, [clip(i) for i in BAD])
    assert maker.made == [] and contents(cache) == whole


@pytest.mark.parametrize("change", ["torn", "altered", "missing"])
def test_a_shard_that_is_not_as_it_was_written_is_named_and_made_again(cache, whole, change):
    path = cache / "shard-000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data[: len(data) // 2] if change == "torn" else data)
    if change == "missing":
        path.unlink()
    word = "missing" if change == "missing" else "torn or altered"
    with pytest.raises(DataError, match=rf"shard-000001\.safetensors as it was written, found it {word}") as caught:
        Cache(cache, SPACE)
    assert "\n" not in str(caught.value)
    maker = Maker()
    write(cache, maker)
    assert maker.made == [3, 4, 5] and contents(cache) == whole


def test_a_shard_that_goes_bad_later(cache):
    opened = Cache(cache, SPACE)
    (cache / "shard-000003.safetensors").unlink()
    opened.read(0)
    with pytest.raises(DataError, match="shard-000003"):
        opened.read(6)


@pytest.mark.parametrize("key", SPACE)
def test_a_cache_of_another_space_is_refused(cache, key):
    with pytest.raises(DataError, match=f"found {key} {SPACE[key]} where this run has 99; prepare") as caught:
        Cache(cache, SPACE | {key: 99})
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=f"another {key}; set"):
        write(cache, space=SPACE | {key: 99})


def test_clips_that_no_stride_cut_fit_every_stride(tmp_path):
    write(tmp_path / "cache", space=SPACE | {"stride": None})
    assert len(Cache(tmp_path / "cache", SPACE)) == 7


def test_another_source_is_not_mixed_in(cache, whole):
    with pytest.raises(DataError, match="another kind; set"):
        write(cache, source={"kind": "letters"})
    assert contents(cache) == whole


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "damaged"),
        ("[]", "damaged"),
        ('{"format": 1}', "damaged"),
        ('{"format": 1, "shards": [{}]}', "damaged"),
        ('{"format": 1, "shards": [], "space": 3, "source": {}, "complete": true}', "damaged"),
        ('{"format": 2}', "format 1 or older.*found 2"),
        ("[" * 100_000, "damaged"),
        ('{"format": {}}', "damaged"),
        ('{"format": ' + "1" * 5000 + "}", "damaged"),
        *(
            (f'{{"format": 1, "shards": [{shard}], "space": {{}}, "source": {{}}, "complete": true}}', "damaged")
            for shard in (
                '{"number": {}, "clips": 3, "sha256": "x", "skipped": []}',
                '{"number": 0, "clips": true, "sha256": "x", "skipped": []}',
                '{"number": -1, "clips": 3, "sha256": "x", "skipped": []}',
                '{"number": 0, "clips": 3, "sha256": 5, "skipped": []}',
                '{"number": 0, "clips": 3, "sha256": "x", "skipped": true}',
                '{"number": 0, "clips": 3, "sha256": "x", "skipped": [["a"]]}',
                '{"number": 0, "clips": 3, "sha256": "x", "skipped": [], "rates": {"x": 1}}',
                '{"number": 0, "clips": 3, "sha256": "x", "skipped": [], "rates": 7}',
            )
        ),
    ],
)
def test_a_damaged_list_is_refused(cache, text, word):
    (cache / "cache.json").write_text(text)
    for use in (lambda: Cache(cache, SPACE), lambda: write(cache)):
        with pytest.raises(DataError, match=word) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_cache_without_clips_is_refused(tmp_path):
    tmp_path = tmp_path / "cache"
    tmp_path.mkdir()
    usable, skipped = write_cache(tmp_path, SPACE, SOURCE, 3, 3, lambda parts: (Unusable("x", "bad") for _ in range(3)))
    assert usable == 0 and len(skipped) == 3
    with pytest.raises(DataError, match="none could be used"):
        Cache(tmp_path, SPACE)


def test_no_room_loses_nothing(tmp_path, whole):
    """A file may not grow over the size of the list: the first shard does not fit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, before[1]))
    try:
        with pytest.raises(DataError, match="make room and give the command again") as caught:
            write(tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["cache.json"]
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["shards"] == []
    write(tmp_path / "cache")
    assert contents(tmp_path / "cache") == whole


# ---- shards that fit their hashes and are none ----


def with_shard(cache, number, data, **changes):
    """Puts other bytes in a shard's place and has the list say that they were written so."""
    path = cache / f"shard-{number:06d}.safetensors"
    path.write_bytes(data)
    listed = json.loads((cache / "cache.json").read_text())
    shard = next(shard for shard in listed["shards"] if shard["number"] == number)
    shard |= {"sha256": hashlib.sha256(data).hexdigest()} | changes
    (cache / "cache.json").write_text(json.dumps(listed))


def whole_shard(about, **tensors):
    return save({"latents": torch.zeros(3, 4, 3, 2, 3), "text": torch.zeros(3, 5, 6)} | tensors, about)


NAMED = json.dumps([["a", "b"]] * 3)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"no shard", whole_shard(None), whole_shard({"clips": "{"}), whole_shard({"clips": "[" * 100_000}),
        whole_shard({"clips": "[1, 2, 3]"}), whole_shard({"clips": json.dumps([["a", "b"]] * 2)}),
        whole_shard({"clips": NAMED}, latents=torch.zeros(2, 4, 3, 2, 3)), whole_shard({"clips": NAMED}, text=torch.zeros(())),
        save({"text": torch.zeros(3, 5, 6)}, {"clips": NAMED}),
    ],
)  # fmt: skip
def test_a_shard_of_another_kind_is_refused(cache, data):
    with_shard(cache, 1, data)
    with pytest.raises(DataError, match=r"a shard of clips in .*shard-000001\.safetensors, found .*; remove it") as caught:
        Cache(cache, SPACE)
    assert "\n" not in str(caught.value)


def test_more_clips_listed_than_a_shard_has_are_refused(cache):
    with_shard(cache, 1, whole_shard({"clips": NAMED}), clips=9)
    with pytest.raises(DataError, match="9 clips are listed"):
        Cache(cache, SPACE)


def test_a_pipe_in_the_place_of_a_shard_or_the_list_is_refused(cache):
    (cache / "shard-000001.safetensors").unlink()
    os.mkfifo(cache / "shard-000001.safetensors")
    with pytest.raises(DataError, match="found it no file"):
        Cache(cache, SPACE)
    (cache / "cache.json").unlink()
    os.mkfifo(cache / "cache.json")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        Cache(cache, SPACE)


def test_a_cache_says_what_was_left_out_and_at_what_rates(tmp_path):
    def make(parts):
        for i in (i for part in parts for i in part):
            good = clip(0)
            bad = Unusable(f"clip {i}", "no video", "damaged")
            yield bad if i == 4 else LatentClip(f"clip {i}", "x", good.latents, good.text, 8.0 if i % 2 else 24.0)

    (tmp_path / "cache").mkdir()
    before = [Unusable("x", "no caption", "without a caption")]
    write_cache(tmp_path / "cache", SPACE, SOURCE, 6, 3, make, before)
    cache = Cache(tmp_path / "cache", SPACE)
    assert cache.left_out == [*before, Unusable("clip 4", "no video", "damaged")]
    assert sorted(cache.rates) == [8.0, 8.0, 8.0, 24.0, 24.0]


def test_a_cache_of_before_is_read(cache):
    """Its list says of what was left out a name and a reason only, and nothing of frame rates."""
    listed = json.loads((cache / "cache.json").read_text())
    for shard in listed["shards"]:
        shard["skipped"] = [one[:2] for one in shard["skipped"]]
        shard.pop("rates", None)
    (cache / "cache.json").write_text(json.dumps(listed))
    opened = Cache(cache, SPACE | {"fps": None})
    assert len(opened) == 7 and [one.name for one in opened.left_out] == [f"clip {i}" for i in BAD] and opened.rates == []
    assert write(cache)[0] == 7
    with pytest.raises(DataError, match=r"found fps None where this run has 8\.0"):
        Cache(cache, SPACE | {"fps": 8.0})
