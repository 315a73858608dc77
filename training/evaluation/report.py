"""Tables of figures as JSON and Markdown."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.evaluation.measure import BETTER, PUBLIC_BETTER, Figure
from training.run.checkpoint import write_text_atomically
from training.world.oracle import ATTRIBUTES

_DIGITS = {"KID": 3, "Fréchet distance": 2, "motion error": 2, "jitter": 2, "diversity": 2, "seconds": 3, "training seconds": 0}
_PERCENT = {
    "style",
    "accuracy",
    "frame accuracy",
    "size",
    "colour",
    "shape",
    "motion",
    "background",
    "coverage",
    "dynamic degree",
}

# The tables of a page: which figures and costs answer which question.
QUESTIONS = {
    "Quality": ("style", "accuracy", "frame accuracy", *ATTRIBUTES, "CLIPScore"),
    "Motion": ("motion error", "dynamic degree", "jitter"),
    "Distances and diversity": ("KID", "Fréchet distance", "coverage", "density", "diversity", "FVD", "VideoMAE distance"),
    "Cost": ("evaluations", "image evaluations", "seconds", "training seconds"),
}


def write_report(
    folder: Path, title: str, rows: Mapping[str, Mapping[str, Figure]], costs: Mapping[str, dict], about: dict
) -> None:
    """Writes `report.json` and `report.md` into a folder, each whole or not at all.

    `rows` maps a row's name to its figures (value, low, high), `costs` to plain values such as evaluations and seconds; `about` says
    what was measured and with what.
    """
    keys = ("value", "low", "high")
    table = {
        name: {key: dict(zip(keys, map(_finite, figure), strict=True)) for key, figure in row.items()} | costs.get(name, {})
        for name, row in rows.items()
    }
    facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
    said = json.dumps({"title": title, **about, "rows": table}, indent=1, ensure_ascii=False)
    write_text_atomically(folder / "report.json", said + "\n")
    write_text_atomically(folder / "report.md", f"# {title}\n\n{facts}\n\n{markdown_table(rows, costs)}")


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def markdown_table(rows: Mapping[str, Mapping[str, Figure]], costs: Mapping[str, dict]) -> str:
    """A Markdown table, a line a row; intervals stand behind the figures."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    cost_keys = list(dict.fromkeys(key for cost in costs.values() for key in cost))
    arrows, better = {"higher": " ↑", "lower": " ↓"}, BETTER | PUBLIC_BETTER
    head = ["", *(key + arrows.get(better.get(key, ""), "") for key in keys), *cost_keys]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, row in rows.items():
        cells = [_cell(key, row.get(key)) for key in keys]
        cells += [_plain(key, costs.get(name, {}).get(key)) for key in cost_keys]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def tables_by_question(rows: Mapping[str, Mapping[str, Figure]], costs: Mapping[str, dict]) -> str:
    """The same rows as Markdown tables that fit a page: one a question, under a heading of its own; rows without an answer are left out.

    ValueError for a figure that no question, or more than one, asks for: none is left out in silence.
    """
    asked = [key for columns in QUESTIONS.values() for key in columns]
    for key in dict.fromkeys(key for row in (*rows.values(), *costs.values()) for key in row):
        if asked.count(key) != 1:
            raise ValueError(
                f"Expected one question that asks for {key}, found {asked.count(key)}; put it into one of QUESTIONS."
            )
    parts = []
    for question, columns in QUESTIONS.items():
        answers, prices = (_columns(table, columns) for table in (rows, costs))
        answers = {name: answers[name] for name in rows if answers[name] or prices.get(name)}
        if answers:
            parts.append(f"### {question}\n\n{markdown_table(answers, prices)}")
    return "\n".join(parts)


def _columns(table: Mapping[str, Mapping], columns: Sequence[str]) -> dict[str, dict]:
    return {name: {key: row[key] for key in columns if key in row} for name, row in table.items()}


def _cell(key: str, figure: Figure | None) -> str:
    if figure is None:
        return "–"
    value, low, high = figure
    if key in _PERCENT:
        return f"{100 * value:.1f}% ({100 * low:.1f}–{100 * high:.1f})"
    digits = _DIGITS.get(key, 2)
    return f"{value:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _plain(key: str, value) -> str:
    return "–" if value is None else f"{value:.{_DIGITS.get(key, 2)}f}" if isinstance(value, float) else str(value)
