"""What a training's folder says meanwhile."""

import json
import os

import pytest
from PIL import Image


@pytest.fixture
def room(comfyui):
    return comfyui.pack("comfy_bridge.training_look")


def test_a_run_is_told_in_words(room):
    lines = [{"update": i, "seconds": 10.0 * i, "sdm": 0.5, "fake": 0.01 * i} for i in range(1, 11)]
    assert room.in_words(lines, 40) == "update 10 of 40, about 5 min to go\nsdm 0.500\nfake 0.100"
    assert room.in_words(lines[:1], 40) == "update 1 of 40\nsdm 0.500\nfake 0.010"
    assert room.in_words(lines, 5010) == "update 10 of 5010, about 14 h to go\nsdm 0.500\nfake 0.100"
    assert room.in_words([{"update": 40, "seconds": 1.0, "sdm": None}], 40) == "update 40 of 40"


def test_a_look_at_a_folder_takes_whole_lines_only(room, tmp_path):
    empty = room.Look(tmp_path)
    assert (empty.lines, empty.total, empty.sheet) == ([], None, None)
    first = {"update": 1, "seconds": 0.5}
    (tmp_path / "config.yaml").write_text("run: {updates: 30}\nwarmup: {updates: 12}\n")
    (tmp_path / "stats.jsonl").write_text(json.dumps(first) + '\n{"update": 2, "seconds": 1.0, "sd')
    (tmp_path / "samples").mkdir()
    for step in (50, 100):
        Image.new("RGB", (9, 9)).save(tmp_path / "samples" / f"update-{step:06d}.png")
    look = room.Look(tmp_path)
    assert (look.lines, look.total, look.sheet.name) == ([first], 42, "update-000100.png")
    assert room.picture(look.sheet)[1].size == (9, 9)
    whole = look.sheet.read_bytes()
    for spoilt in (whole[:20], b"no picture", whole[:45] + bytes(20) + whole[65:]):
        look.sheet.write_bytes(spoilt)
        assert room.picture(look.sheet) is None


def test_what_a_power_cut_leaves_says_nothing(room, tmp_path):
    good = {"update": 2, "seconds": 3.0}
    lines = [
        "",
        "no JSON",
        "5",
        "null",
        "{}",
        '{"update": "x", "seconds": 1}',
        '{"update": 1}',
        "[" * 100_000,
        '{"update": NaN, "seconds": 1}',
        '{"update": 1, "seconds": 1e999}',
        json.dumps(good),
    ]
    (tmp_path / "stats.jsonl").write_bytes("\n".join([*lines, ""]).encode() + b"\xff\xfe\n\0\0\0")
    assert room.Look(tmp_path).lines == [good]
    for content in (
        b"",
        b"5",
        b"run: 5",
        b"run: {updates: x}\nwarmup: {updates: 1}",
        b"[",
        b"\xff\xfe",
        b"a: " + b"[" * 3000,
        b"run: {updates: .inf}\nwarmup: {updates: 1}",
    ):
        (tmp_path / "config.yaml").write_bytes(content)
        assert room.Look(tmp_path).total is None, content
    (tmp_path / "stats.jsonl").unlink()
    os.mkfifo(tmp_path / "stats.jsonl")  # whoever opens it waits for ever
    assert room.Look(tmp_path).lines == []
    (tmp_path / "stats.jsonl").unlink()
    (tmp_path / "stats.jsonl").mkdir()
    assert room.Look(tmp_path).lines == []
