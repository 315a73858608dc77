"""The GPU's table: it runs small on a CPU, says what failed or found no time, and goes on."""

import json
import time

import pytest
import torch

from benchmarks import on_gpu
from benchmarks.gpu_parts import FULL, SMALL, Row, Session
from benchmarks.kernels import kernels_of
from benchmarks.on_gpu import CONFIGURATIONS, PARTS, SECONDS, cells, measure, ratios

CPU = torch.device("cpu")


def test_a_part_that_fails_or_takes_too_long_is_told_and_the_next_one_begins(monkeypatch):
    def fails(session):
        yield Row("fails", "first", 1.0)
        raise ValueError("no\nluck")

    def waits(session):
        yield Row("waits", "first", 1.0)
        while True:
            time.sleep(0.01)

    def works(session):
        yield Row("works", "all", 1.0)

    parts = {"fails": (fails, 99, 0), "waits": (waits, 3, 0), "works": (works, 99, 9), "late": (works, 99, 100)}
    monkeypatch.setattr(on_gpu, "PARTS", parts)
    reports = []
    rows = measure(Session(CPU, FULL), ["fails", "waits", "works"], 600, lambda rows, kernels: reports.append(len(rows)))
    assert [(row.part, row.what) for row in rows] == [
        ("fails", "first"), ("fails", "the rest"), ("waits", "first"), ("waits", "the rest"), ("works", "all"),
    ]  # fmt: skip
    assert rows[1].note == "failed: ValueError: no luck" and rows[3].note == "left out: its 3 seconds were over"
    assert reports == [2, 4, 5], "what there is, is written after each part"
    rows = measure(Session(CPU, SMALL), ["works", "late"], 50, lambda *_: None)
    assert [row.note for row in rows] == ["left out: its 0 seconds were over", ""], "seconds are kept for later parts"


def test_every_part_has_its_time_and_all_of_them_fit():
    assert sum(least for _, _, least in PARTS.values()) <= SECONDS < 300
    assert all(0 < least <= most for _, most, least in PARTS.values())
    assert set(CONFIGURATIONS) < set(PARTS)


def test_rows_become_shares_of_the_ceiling_and_goals():
    row = Row("sd15.yaml", "SDM and ADM", 2.0, 8e12, 10e12, 5000, 1.5, 3 * 2**30, 4 * 2**30, "two parts")
    assert cells(row) == ["SDM and ADM", "2", "8", "4", "40%", "5,000", "1.5", "3.0 (4.0)", "two parts"]
    sampled = [
        Row("sampling", "student", 1.0),
        Row("sampling", "teacher", 13.0),
        Row("sampling", "student, frames", 2.0, 1e12, 1e12),
    ]
    assert ratios([row, *sampled]) == [
        ["teacher / student, UNet", "13", "≥ 12"],
        ["student to frames / its floor", "2", "≤ 2.5"],
        ["sd15.yaml, SDM and ADM, of the ceiling", "40%", "≥ 35%"],
    ]


def test_kernels_are_counted_by_name():
    x, layer = torch.ones(8, 8), torch.nn.Linear(8, 8)
    found = kernels_of(lambda: [layer(x).relu() for _ in range(3)], CPU)
    assert {name: count for name, (_, count) in found.by_name.items()} == {"aten::linear": 3, "aten::relu": 3}
    assert found.count == 6 and found.seconds == pytest.approx(sum(s for s, _ in found.by_name.values()))
    assert len(found.largest(1)) == 1


def test_it_runs_small_on_a_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = ["ceilings", "sampling", "an evaluation", "decoders"]
    assert on_gpu.main(["--small", "--out", str(tmp_path), "--seconds", "600", "--parts", *names]) == 0
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = {row["what"]: row for row in found["rows"]}
    assert not any("failed" in row["note"] or "left out" in row["note"] for row in found["rows"]), rows
    expected = {
        "student",
        "diffusers, student",
        "teacher",
        "VAE",
        "TAESD",
        "student, frames",
        "an evaluation",
        "VAE, channels_last",
    }
    assert expected < rows.keys()
    assert rows["teacher"]["operations"] == rows["student"]["operations"] == 4 * rows["an evaluation"]["operations"]
    assert 0 < rows["an evaluation"]["launches"] < 1000 and {"an evaluation", "the VAE"} == found["kernels"].keys()
    assert path.with_suffix(".md").read_text(encoding="utf-8").strip() in capsys.readouterr().out


@pytest.mark.slow  # minutes: compilers, and processes of training
def test_all_of_it_runs_small_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu.main(["--small", "--out", str(tmp_path), "--seconds", "3000"]) == 0
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert not [row for row in rows if "failed" in row["note"] or "left out" in row["note"]]
    assert {row["part"] for row in rows} >= PARTS.keys() - {"an evaluation", "decoders", "the teacher, compiled"}
    phases = [row for row in rows if row["part"] in CONFIGURATIONS]
    assert len(phases) == 4 * len(CONFIGURATIONS) and all(row["launches"] and row["planned"] for row in phases)
