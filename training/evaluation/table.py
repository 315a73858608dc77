"""A table of rows, each measured once and kept on disk: a command goes on where it was stopped."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from avdm2_nodes.files.paths import is_file, lies_at
from training.evaluation.measure import BETTER, PUBLIC_BETTER, Figure
from training.evaluation.pictures import animated, contact_sheet, plot_table
from training.evaluation.report import tables_by_question, write_report
from training.evaluation.rows import Bench, Method, VideoBench, kept
from training.run.checkpoint import write_text_atomically
from training.run.folder import RunFolderError, require_writable, told_of_disk

logger = logging.getLogger(__name__)

PLOTTED = ("accuracy", "Fréchet distance", "KID", "motion error", "coverage", "diversity", *PUBLIC_BETTER)
SHOWN = 4  # prompts in the pictures


class Table:
    """Rows, each measured once and kept in `folder`."""

    def __init__(self, bench: Bench | VideoBench, folder: Path):
        self.bench, self.folder = bench, folder
        self.rows: dict[str, dict[str, Figure]] = {}
        self.costs: dict[str, dict] = {}
        self.shown: dict[str, list[np.ndarray]] = {}
        self.reference = kept(self._path("reference"), bench.reference)

    def add(self, name: str, make: Callable[[], np.ndarray]) -> None:
        """A row of the clips that `make` gives."""
        self._add(name, lambda: (make(), 0.0))

    def add_method(self, method: Method, of: str = "") -> None:
        """A row of the clips that a method samples, with its cost; `of` says what else than the name its clips depend on."""
        seconds = self._add(method.name, lambda: self.bench.sample(method), of)
        of_images = {"image evaluations": method.image_evaluations} if method.image_evaluations else {}
        self.costs[method.name] = {"evaluations": method.evaluations, **of_images, "seconds": seconds}

    def add_runs(self, name: str, methods: list[Method], training: list[float]) -> None:
        """One row for several training seeds: the mean of each figure, and the range of the seeds as its interval.

        `training` are the seconds that each took.
        """
        for method in methods:
            self.add_method(method)
        runs = [self.rows.pop(method.name) for method in methods]
        sampling = {key: self.costs[methods[0].name][key] for key in ("evaluations", "seconds")}
        self.costs[name] = sampling | {"training seconds": float(np.mean(training))}
        self.shown[name] = self.shown[methods[0].name]
        for method in methods:
            del self.costs[method.name], self.shown[method.name]
        values = {key: [run[key][0] for run in runs] for key in runs[0]}
        self.rows[name] = {key: (float(np.mean(v)), min(v), max(v)) for key, v in values.items()}

    def write(self, about: dict, page: Path | None, section: str = "results") -> None:
        """report.json, report.md, clips.png, clips.webp, plot.png; and the tables into a section of `page`, between its markers.

        RunFolderError where one cannot be written.
        """
        with told_of_disk(self.folder):
            self._write(about)
        if page is not None:
            insert(page, section, tables_by_question(self.rows, self.costs), about)

    def _write(self, about: dict) -> None:
        write_report(self.folder, "What distillation buys", self.rows, self.costs, about)
        captions = self.bench.prompts[:SHOWN]
        contact_sheet(self.shown, captions, self.folder / "clips.png")
        animated(self.shown, self.folder / "clips.webp", captions=captions)
        plotted = {name: {key: row[key] for key in PLOTTED if key in row} for name, row in self.rows.items()}
        plot_table(plotted, self.folder / "plot.png", better=BETTER | PUBLIC_BETTER)

    def _add(self, name: str, make: Callable[[], tuple[np.ndarray, float]], of: str = "") -> float:
        def measured() -> dict[str, np.ndarray]:
            logger.info("Measuring: %s", name)
            clips, seconds = make()
            return self.bench.measure(clips) | {"shown": clips[:SHOWN], "seconds": np.array([seconds])}

        row = kept(self._path(f"{name} {of}".rstrip()), measured)
        self.shown[name] = list(row["shown"])
        self.rows[name] = self.bench.figures(row, self.reference)
        return float(row["seconds"][0])

    def _path(self, name: str) -> Path:
        return self.folder / "rows" / ("".join(c if c.isalnum() else "-" for c in name) + ".safetensors")


def require_page(page: Path | None, sections: Sequence[str] = ("results",)) -> None:
    """RunFolderError where `insert` could not write, or would find no place to: to be told so before hours of measuring."""
    if page is None:
        return
    if not is_file(page):
        raise RunFolderError(f"Expected a page for the tables at {page}, found {lies_at(page)}; name another with --page.")
    require_writable(page.parent, "--page")
    with told_of_disk(page.parent):
        text = page.read_text(encoding="utf-8", errors="replace")
    for section in sections:
        begin, end = _markers(section)
        if not 0 <= text.find(begin) < text.find(end):
            raise RunFolderError(
                f"Expected in {page} the lines {begin} and {end}, found not both of them; write them where the tables are to go."
            )


def _markers(section: str) -> tuple[str, str]:
    return f"<!-- {section} -->", f"<!-- end of {section} -->"


def insert(page: Path, section: str, tables: str, about: dict) -> None:
    """Puts tables and what they were measured with between a section's markers, `<!-- section -->` and `<!-- end of section -->`.

    RunFolderError where it cannot be written.
    """
    begin, end = _markers(section)
    head, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, tail = rest.partition(end)
    facts = "; ".join(f"{key}: {value}" for key, value in about.items())
    with told_of_disk(page.parent):
        write_text_atomically(page, f"{head}{begin}\n{tables}\n{facts}.\n{end}{tail}")
