import json

import pytest
import torch

from benchmarks.report import MISSING, chain_seconds, clip_seconds, markdown, ratios, write_report
from benchmarks.run import lacks_room
from training.run.timing import interleaved, peak_bytes, resident_bytes


def times(*seconds):
    return {"wall": list(seconds), "cpu": [2 * s for s in seconds]}


@pytest.fixture
def whole():
    """A subject whose clips were run whole."""
    return {
        "subject": "one", "frames": 8, "side": 64, "dtype": "bfloat16", "decoder dtype": "float32", "whole": True,
        "student steps": 4, "teacher steps": 25, "operations": {"student": 2e12, "teacher": 25e12, "VAE": 1e12},
        "times": {
            "student": times(1, 2, 9), "teacher": times(26, 26, 30), "diffusers, student": times(4), "diffusers, teacher": times(52),
            "VAE": times(1), "student, frames": times(3), "teacher, frames": times(27),
        },
    }  # fmt: skip


@pytest.fixture
def parts():
    """One that ran a step of each."""
    return {
        "subject": "other", "frames": 8, "side": 256, "dtype": "bfloat16", "decoder dtype": "float32", "whole": False,
        "student steps": 1, "teacher steps": 1, "operations": {"student": 2e12, "teacher": 25e12, "VAE": 1e12, "TAESD": 1e11},
        "times": {
            "student": times(1), "teacher": times(2), "diffusers, student": times(2), "student's node": times(3),
            "VAE": times(6), "TAESD": times(1),
        },
    }  # fmt: skip


CEILING = {"wall": 1e12, "cpu": 0.5e12}


def test_ratios_of_whole_clips(whole):
    found = ratios(whole, CEILING)
    assert found["teacher / student, UNet"] == 13 and found["teacher / student, frames"] == 9
    assert found["student / diffusers' pipeline"] == 0.5 and found["teacher / diffusers' pipeline"] == 0.5
    assert found["student / its floor, UNet"] == 1 and found["student / its floor, frames"] == 1
    assert found["teacher / student, frames by TAESD"] is None
    assert ratios(whole, CEILING, "cpu") == found


def test_ratios_from_one_step_of_each(parts):
    assert chain_seconds(parts, "student") == 4 and chain_seconds(parts, "teacher") == 50
    assert clip_seconds(parts, "student", "VAE") == 10 and clip_seconds(parts, "teacher", "TAESD") == 51
    found = ratios(parts, CEILING)
    assert found["teacher / student, UNet"] == 12.5 and found["teacher / student, frames"] == 5.6
    assert found["teacher / student, frames by TAESD"] == 51 / 5
    assert found["student / diffusers' pipeline"] == 0.5 and found["student / its floor, frames"] == 10 / 3
    assert found["student's node / diffusers' pipeline"] == 1.5 and found["teacher / diffusers' pipeline"] is None


def test_the_report_says_what_was_measured_and_what_was_not(whole, parts, tmp_path):
    points = [{"at": at, "wall": [at / 10, at / 9, at / 8], "operations": at * 10**9} for at in (2, 4)]
    mode = {
        "seconds": [2.0, 4.0, 3.0], "CPU seconds": [2.0], "operations": 3 * 10**11, "peak bytes": None, "batch": 4, "frames": 8,
        "side": 64, "dtype": "bfloat16",
    }  # fmt: skip
    results = {
        "about": {"date": "2026-01-31", "device": "cpu"},
        "ceiling": {"bfloat16": CEILING},
        "sampling": [whole, parts, {"subject": "SD1.5", "frames": 16, "side": 512, MISSING: "needs a GPU"}],
        "training": {"one mode": mode, "another": {MISSING: "needs a GPU"}},
        "scaling": {"subject": "one", "else": "8 frames", "axes": {"frames": points, "batch": points}},
        "counted": {"a part": 12.345678},
        "planned": {"one.yaml": {"heads": 3 * 2**29, "all at once": 2**31}, "other.yaml": {"all at once": 2**32}},
    }
    path = write_report(results, tmp_path / "new", "some-day")
    text = path.read_text()
    assert json.loads((tmp_path / "new" / "some-day.json").read_text()) == results
    assert (tmp_path / "new" / "some-day.png").stat().st_size > 5000
    assert "| student | 2 s (1–9) | 4 s (2–18) |" in text
    assert "| teacher / student, UNet | 13 | 13 | ≥ 12 |" in text
    assert "| teacher / student, frames by TAESD | not measured | not measured | ≥ 11.5 |" in text
    assert "SD1.5, 16 frames of 512x512\n\nnot measured: needs a GPU" in text
    assert "1 step of the student's 4 and 1 of the teacher's 25" in text
    assert "| one mode | 4 clips, 8 x 64x64 | 3 s (2–4) | 0.3 | 0.1 | 10% | not measured |" in text
    assert "| another | not measured: needs a GPU |" in text
    assert "| heads | 1.50 |  |" in text and "| all at once | 2.00 | 4.00 |" in text
    assert "| a part | 12.35 |" in text and "(some-day.png)" in text
    on_gpu = markdown(results | {"about": {"device": "cuda, a GPU"}}, None)
    assert "| student | 2 s (1–9) |\n" in on_gpu and "CPU time" not in on_gpu and "png" not in on_gpu


def test_subjects_take_turns_after_one_to_warm_up():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    found = interleaved(runs, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * 4
    assert all(len(t.wall) == len(t.cpu) == 3 and min(t.wall) >= 0 for t in found.values())


def test_memory_is_this_process_s():
    held, peak = resident_bytes(), peak_bytes(torch.device("cpu"))
    if held is not None:
        assert held > 2**20 and held < 1.5 * peak < 2**40
    assert lacks_room(torch.device("cpu")) is None or "GiB" in lacks_room(torch.device("cpu"))
