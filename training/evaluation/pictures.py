"""Pictures of clips and figures: contact sheets, animations side by side, and bars with confidence intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.run.checkpoint import write_atomically
from training.run.packages import needs

_ZOOM = 2
_GAP = 4  # pixels between frames
_MARGIN = 16
_INK, _QUIET, _PAPER = (28, 28, 30), (110, 110, 116), (255, 255, 255)
_TEXT, _LABEL = 15, 13  # pixels


def contact_sheet(
    rows: Mapping[str, Sequence[np.ndarray]], captions: Sequence[str], path: str | Path, *, shown: int = 4
) -> None:
    """Saves a still: a group a caption, in it a row a method, in it `shown` frames from first to last.

    `rows` maps a method's name to its clips, uint8 (F, H, W, 3), one a caption. ValueError if the numbers differ.
    """
    _check(rows, captions)
    label = _label_width(rows)
    first = next(iter(rows.values()))[0]
    height, width = first.shape[1] * _ZOOM, first.shape[2] * _ZOOM
    heading = _TEXT + 10
    group = heading + len(rows) * (height + _GAP) + _MARGIN
    page_width = max(2 * _MARGIN + label + shown * (width + _GAP) - _GAP, *(2 * _MARGIN + _width(c, _TEXT) for c in captions))
    page = Image.new("RGB", (page_width, _MARGIN + len(captions) * group), _PAPER)
    draw = ImageDraw.Draw(page)
    for i, caption in enumerate(captions):
        y = _MARGIN + i * group
        draw.text((_MARGIN, y), caption, _INK, _font(_TEXT))
        for j, (name, clips) in enumerate(rows.items()):
            top = y + heading + j * (height + _GAP)
            draw.text((_MARGIN, top + height / 2), name, _QUIET, _font(_LABEL), anchor="lm")
            for k, f in enumerate(np.linspace(0, len(clips[i]) - 1, shown).round().astype(int)):
                page.paste(_zoomed(clips[i][f]), (_MARGIN + label + k * (width + _GAP), top))
    write_atomically(path, lambda temporary: page.save(temporary, format=_kind(path)))


def animated(
    rows: Mapping[str, Sequence[np.ndarray]],
    path: str | Path,
    *,
    captions: Sequence[str] | None = None,
    fps: int = 8,
) -> None:
    """Saves a looping animation (.webp or .gif, by the name): a row a method, its clips (F, H, W, 3) uint8 side by side.

    `captions`, one a column, stand above the columns. ValueError if methods or captions differ in number or clips in length.
    """
    columns = len(next(iter(rows.values())))
    _check(rows, [""] * columns if captions is None else captions)
    lengths = {len(clip) for clips in rows.values() for clip in clips}
    if len(lengths) > 1:
        raise ValueError(f"Expected clips of one length, found {sorted(lengths)} frames; cut them alike.")
    label = _label_width(rows)
    first = next(iter(rows.values()))[0]
    height, width = first.shape[1] * _ZOOM, first.shape[2] * _ZOOM
    texts = [] if captions is None else [wrap(c, max(width // 8, 8)) for c in captions]
    top = _MARGIN + max((len(t) for t in texts), default=0) * (_LABEL + 3) + (6 if texts else 0)
    size = (2 * _MARGIN + label + columns * (width + _GAP) - _GAP, top + len(rows) * (height + _GAP) - _GAP + _MARGIN)
    still = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(still)
    for i, lines in enumerate(texts):
        draw.multiline_text((_MARGIN + label + i * (width + _GAP), _MARGIN), "\n".join(lines), _INK, _font(_LABEL), spacing=3)
    for j, name in enumerate(rows):
        draw.text((_MARGIN, top + j * (height + _GAP) + height / 2), name, _QUIET, _font(_LABEL), anchor="lm")
    pages = []
    for f in range(lengths.pop()):
        page = still.copy()
        for j, clips in enumerate(rows.values()):
            for i, clip in enumerate(clips):
                page.paste(_zoomed(clip[f]), (_MARGIN + label + i * (width + _GAP), top + j * (height + _GAP)))
        pages.append(page)
    options = {"lossless": True} if _kind(path) == "WEBP" else {}
    options |= {"format": _kind(path), "save_all": True, "append_images": pages[1:], "duration": round(1000 / fps), "loop": 0}
    write_atomically(path, lambda temporary: pages[0].save(temporary, **options))


def plot_table(
    rows: Mapping[str, Mapping[str, tuple[float, float, float]]], path: str | Path, *, better: Mapping[str, str] | None = None
) -> None:
    """Saves bars with confidence intervals: a panel a metric, a bar a method.

    `rows` maps a method's name to {metric: (value, low, high)}; a metric that a method lacks leaves a gap. `better` may say 'higher'
    or 'lower' for a metric, which its title then says. ValueError if there is nothing to plot.
    """
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    if not metrics:
        raise ValueError("Expected at least one method with one metric, found none; measure first.")
    names = list(rows)
    columns = min(len(metrics), 3)
    lines = -(-len(metrics) // columns)
    figure = needs("matplotlib.figure", "to plot figures").Figure(
        figsize=(1.6 + 3.4 * columns, lines * (0.9 + 0.28 * len(names))), dpi=120, layout="constrained"
    )
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axis, metric in zip(axes.flat, metrics, strict=False):
        for y, name in enumerate(names):
            if metric in rows[name]:
                value, low, high = rows[name][metric]
                axis.barh(y, value, 0.68, color="#3d6fb4" if name.startswith("student") else "#a9b8cc")
                axis.plot([low, high], [y, y], color="#1c1c1e", linewidth=1.2, marker="|", markersize=5)
        arrow = {"higher": " (higher is better)", "lower": " (lower is better)"}.get((better or {}).get(metric, ""), "")
        axis.set_title(metric + arrow, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="#e5e5ea", linewidth=0.8)
        axis.set_axisbelow(True)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    _save_plot(figure, path)


def _save_plot(figure, path: str | Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=Path(path).suffix[1:]))


def _kind(path: str | Path) -> str:
    """The format that a name says, as PIL calls it: a temporary file's name does not."""
    return Image.registered_extensions()[Path(path).suffix.lower()]


def plot_gain(
    tables: Mapping[str, Mapping[str, Mapping[str, tuple[float, float, float]]]],
    path: str | Path,
    *,
    teacher: str,
    floor: str,
    metric: str = "Fréchet distance",
) -> None:
    """Saves a curve a row: its figure over its teacher's, a point for each of `tables` (a teacher's rows, as `plot_table`'s).

    `teacher` and `floor` name the rows of the teachers and of the best that can be reached. Below the diagonal a row passes its teacher.
    """
    tables = dict(sorted(tables.items(), key=lambda item: item[1][teacher][metric][0]))
    x = [rows[teacher][metric][0] for rows in tables.values()]
    figure = needs("matplotlib.figure", "to plot figures").Figure(figsize=(7.5, 5), dpi=120, layout="constrained")
    axis, best = figure.subplots(), [rows[floor][metric][0] for rows in tables.values()]
    axis.plot(x, x, color="#1c1c1e", linewidth=1.0, linestyle=":", label=teacher)
    axis.plot(x, best, color="#1c1c1e", linewidth=1.0, linestyle="--", label=floor)
    shared = [name for name in next(iter(tables.values())) if all(name in rows for rows in tables.values())]
    for name in shared:
        if name.startswith(("real clips", "teacher")):
            continue
        points = [rows[name][metric] for rows in tables.values()]
        values = [value for value, _, _ in points]
        (line,) = axis.plot(x, values, marker="o", markersize=4, linewidth=1.4, label=name)
        axis.vlines(x, [low for _, low, _ in points], [high for *_, high in points], color=line.get_color(), linewidth=1.0)
    for name, place in zip(tables, x, strict=True):
        axis.annotate(
            name, (place, 0), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points", fontsize=8
        )
    axis.set_xlabel(f"{metric} of the teacher (lower is better)", fontsize=9)
    axis.set_ylabel(f"{metric} of the student", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    _save_plot(figure, path)


def _check(rows: Mapping[str, Sequence[np.ndarray]], captions: Sequence[str]) -> None:
    counts = {name: len(clips) for name, clips in rows.items()}
    if not rows or set(counts.values()) != {len(captions)} or not captions:
        raise ValueError(f"Expected one clip a caption ({len(captions)}) in every row, found {counts}; give all methods alike.")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _width(text: str, size: int) -> int:
    return int(_font(size).getlength(text)) + 1


def _label_width(rows: Mapping[str, object]) -> int:
    return max(_width(name, _LABEL) for name in rows) + 12


def _zoomed(frame: np.ndarray) -> Image.Image:
    image = Image.fromarray(frame)
    return image.resize((image.width * _ZOOM, image.height * _ZOOM), Image.Resampling.NEAREST)
