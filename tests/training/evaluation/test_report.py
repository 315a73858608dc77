import errno
import json
import os

import pytest

from training.evaluation.measure import BETTER, PUBLIC_BETTER
from training.evaluation.report import QUESTIONS, markdown_table, tables_by_question, write_report

ROWS = {
    "real clips": {"accuracy": (1.0, 0.97, 1.0), "Fréchet distance": (1.234, 1.0, 1.5)},
    "student": {"accuracy": (0.5, 0.4, 0.6), "KID": (-0.0012, -0.002, 0.0004)},
}
COSTS = {"student": {"evaluations": 4, "seconds": 0.25}}


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_table_is_markdown_with_every_figure_and_its_interval():
    head, rule, real, student = cells(markdown_table(ROWS, COSTS))
    assert head == ["", "accuracy ↑", "Fréchet distance ↓", "KID ↓", "evaluations", "seconds"]
    assert set(rule) == {"---"} and len(rule) == len(head)
    assert real == ["real clips", "100.0% (97.0–100.0)", "1.23 (1.00–1.50)", "–", "–", "–"]
    assert student == ["student", "50.0% (40.0–60.0)", "–", "-0.001 (-0.002–0.000)", "4", "0.250"]


def test_tables_by_question_hold_every_cell_of_the_wide_table_once():
    said = {}
    for part in tables_by_question(ROWS, COSTS).split("### ")[1:]:
        question, table = part.split("\n\n", 1)
        head, _, *rows = cells(table.strip())
        said |= {(question, row[0], key): cell for row in rows for key, cell in zip(head[1:], row[1:], strict=True)}
    assert said == {
        ("Quality", "real clips", "accuracy ↑"): "100.0% (97.0–100.0)",
        ("Quality", "student", "accuracy ↑"): "50.0% (40.0–60.0)",
        ("Distances and diversity", "real clips", "KID ↓"): "–",
        ("Distances and diversity", "real clips", "Fréchet distance ↓"): "1.23 (1.00–1.50)",
        ("Distances and diversity", "student", "KID ↓"): "-0.001 (-0.002–0.000)",
        ("Distances and diversity", "student", "Fréchet distance ↓"): "–",
        ("Cost", "student", "evaluations"): "4",
        ("Cost", "student", "seconds"): "0.250",
    }


def test_every_figure_has_its_question():
    asked = [key for columns in QUESTIONS.values() for key in columns]
    assert BETTER.keys() | PUBLIC_BETTER.keys() | {"dynamic degree"} <= set(asked) and len(asked) == len(set(asked))
    with pytest.raises(ValueError, match="question that asks for sharpness, found 0"):
        tables_by_question({"student": {"sharpness": (1.0, 1.0, 1.0)}}, {})


def test_the_report_says_the_same_as_json(tmp_path):
    write_report(tmp_path, "A title", ROWS, COSTS, {"clips a row": 8, "spacing": "trailing"})
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["title"] == "A title" and report["clips a row"] == 8
    assert report["rows"]["real clips"]["accuracy"] == {"value": 1.0, "low": 0.97, "high": 1.0}
    assert report["rows"]["student"]["evaluations"] == 4
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# A title\n") and "- spacing: trailing\n" in text and text.endswith(markdown_table(ROWS, COSTS))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_not_finite_leaves_the_json_valid(tmp_path, value):
    write_report(tmp_path, "t", {"a": {"KID": (value, 0.0, 1.0)}}, {}, {})

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)


def test_a_report_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    write_report(tmp_path, "before", ROWS, COSTS, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"report.json", "report.md"}

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_report(tmp_path, "after", ROWS, COSTS, {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
