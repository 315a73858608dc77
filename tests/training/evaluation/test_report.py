import json

import pytest

from training.evaluation.report import markdown_table, write_report

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
