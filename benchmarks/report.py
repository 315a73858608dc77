"""Results as ratios, tables and plots; all of it made from what was measured, which is kept beside it as JSON."""

import json
import logging
import statistics
from collections.abc import Mapping
from pathlib import Path

from benchmarks.cost import STUDENT_STEPS, TEACHER_STEPS
from training.run.packages import MissingPackageError, needs

logger = logging.getLogger(__name__)

MISSING = "not measured"


def write_report(results: Mapping, folder: Path, name: str) -> Path:
    """Writes `name`.json, .md and, where there is something to plot, .png into a folder; the .md's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    plotted = bool(results.get("scaling"))
    if plotted:
        try:
            plot_scaling(results["scaling"], folder / f"{name}.png")
        except MissingPackageError as error:
            logger.warning("%s; the plot is left out.", error)
            plotted = False
    path = folder / f"{name}.md"
    path.write_text(markdown(results, f"{name}.png" if plotted else None), encoding="utf-8")
    return path


def chain_seconds(sampling: Mapping, name: str, clock: str = "wall") -> float:
    """Median seconds of all steps of a clip, from those of the steps that a repetition ran."""
    student = "student" in name
    whole, ran = (STUDENT_STEPS, sampling["student steps"]) if student else (TEACHER_STEPS, sampling["teacher steps"])
    return statistics.median(sampling["times"][name][clock]) * whole / ran


def clip_seconds(sampling: Mapping, name: str, decoder: str, clock: str = "wall") -> float | None:
    """Median seconds from embedding to frames: measured where it was, else of the chain and of the decoder together."""
    times = sampling["times"]
    measured = f"{name}, frames" + (" by TAESD" if decoder == "TAESD" else "")
    if measured in times:
        return statistics.median(times[measured][clock])
    if decoder not in times or sampling["whole"]:
        return None
    return chain_seconds(sampling, name, clock) + statistics.median(times[decoder][clock])


def ratios(sampling: Mapping, ceiling: Mapping[str, float], clock: str = "wall") -> dict[str, float | None]:
    """The figures that goals are stated in. `ceiling` is in operations a second of each clock."""
    counted = sampling["operations"]

    def over(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a / b

    vae, taesd = ([clip_seconds(sampling, by, decoder, clock) for by in ("teacher", "student")] for decoder in ("VAE", "TAESD"))
    found = {
        "teacher / student, UNet": over(*(chain_seconds(sampling, by, clock) for by in ("teacher", "student"))),
        "teacher / student, frames": over(*vae),
        "teacher / student, frames by TAESD": over(*taesd),
        "student's node / diffusers' pipeline": over(
            *(chain_seconds(sampling, by, clock) for by in ("student's node", "diffusers, student"))
        )
        if "student's node" in sampling["times"]
        else None,
        "student / diffusers' pipeline": over(
            *(chain_seconds(sampling, by, clock) for by in ("student", "diffusers, student"))
        ),
        "teacher / diffusers' pipeline": over(*(chain_seconds(sampling, by, clock) for by in ("teacher", "diffusers, teacher")))
        if "diffusers, teacher" in sampling["times"]
        else None,
        "student / its floor, UNet": chain_seconds(sampling, "student", clock) * ceiling[clock] / counted["student"],
        "student / its floor, frames": over(vae[1], (counted["student"] + counted["VAE"]) / ceiling[clock]),
    }
    return found


GOALS = {
    "teacher / student, UNet": "≥ 12",
    "teacher / student, frames": "≥ 8",
    "teacher / student, frames by TAESD": "≥ 11.5",
    "student / diffusers' pipeline": "≤ 1.0",
    "student's node / diffusers' pipeline": "≤ 1.0",
    "student / its floor, frames": "≤ 1.5 on a GPU",
}


def markdown(results: Mapping, plot: str | None) -> str:
    """The whole report."""
    about, ceiling = results["about"], results["ceiling"]
    parts = ["# How fast sampling and training are", "\n".join(f"- {key}: {value}" for key, value in about.items())]
    rates = ", ".join(f"{rate['wall'] / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in ceiling.items())
    parts.append(
        f"Ceiling, products of square matrices in the same run: {rates}. Times are medians, with the least and the most."
    )
    for sampling in results["sampling"]:
        parts.append(_sampling(sampling, ceiling.get(sampling.get("dtype")), about["device"]))
    parts += ["## Training, an update", _training(results["training"], ceiling)]
    if plot:
        parts += ["## Cost of an evaluation by size", f"![Cost of an evaluation]({plot})", _scaling(results["scaling"])]
    parts += ["## Counted: SD1.5 and AnimateDiff v3, 16 frames of 512x512", _counted(results["counted"])]
    parts += ["## Planned: memory of a run, one clip of it at a time", _planned(results["planned"])]
    return "\n\n".join(parts) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} s ({min(values):.3g}–{max(values):.3g})"


def _sampling(sampling: Mapping, ceiling: Mapping[str, float] | None, device: str) -> str:
    title = f"## Sampling: {sampling['subject']}, {sampling['frames']} frames of {sampling['side']}x{sampling['side']}"
    if MISSING in sampling:
        return f"{title}\n\n{MISSING}: {sampling[MISSING]}"
    clocks = ["wall"] if device.startswith("cuda") else ["wall", "cpu"]
    rows = [[name, *(_seconds(times[clock]) for clock in clocks)] for name, times in sampling["times"].items()]
    measured = table(["", "by the clock", "CPU time"][: len(clocks) + 1], rows)
    by_clock = [ratios(sampling, ceiling, clock) for clock in clocks]
    rows = [
        [name, *(MISSING if found[name] is None else f"{found[name]:.3g}" for found in by_clock), GOALS.get(name, "")]
        for name in by_clock[0]
    ]
    compared = table(["ratio", *["by the clock", "of CPU time"][: len(clocks)], "goal"], rows)
    counted = ", ".join(f"{name} {count / 1e12:.3g}" for name, count in sampling["operations"].items())
    steps = "" if sampling["whole"] else (
        f" A repetition ran {sampling['student steps']} step of the student's {STUDENT_STEPS} and {sampling['teacher steps']} of the "
        f"teacher's {TEACHER_STEPS}; ratios are of whole clips, by multiplication."
    )  # fmt: skip
    precision = f"UNets in {sampling['dtype']}, decoders in {sampling['decoder dtype']}.{steps}"
    return "\n\n".join([title, precision, measured, compared, f"Tera-operations of a clip: {counted}."])


def _training(modes: Mapping[str, Mapping], ceiling: Mapping[str, Mapping[str, float]]) -> str:
    rows = []
    for name, mode in modes.items():
        if MISSING in mode:
            rows.append([name, f"{MISSING}: {mode[MISSING]}", *[""] * 5])
            continue
        rate = mode["operations"] / statistics.median(mode["seconds"])
        peak = MISSING if mode["peak bytes"] is None else f"{mode['peak bytes'] / 2**30:.2f} GiB"
        size = f"{mode['batch']} clips, {mode['frames']} x {mode['side']}x{mode['side']}"
        share = f"{rate / ceiling[mode['dtype']]['wall']:.0%}"
        rows.append([
            name, size, _seconds(mode["seconds"]), f"{mode['operations'] / 1e12:.3g}", f"{rate / 1e12:.3g}", share, peak,
        ])  # fmt: skip
    head = ["mode", "batch", "an update", "tera-operations", "TFLOP/s", "of the ceiling (MFU)", "peak memory"]
    note = (
        "Operations are those that run, the second pass of checkpointing among them; memory is what building and training add."
    )
    return f"{table(head, rows)}\n\n{note}"


def _scaling(scaling: Mapping) -> str:
    rows = [
        [axis, str(point["at"]), _seconds(point["wall"]), f"{point['operations'] / 1e12:.3g}"]
        for axis, points in scaling["axes"].items()
        for point in points
    ]
    return table(["by", "", f"an evaluation by {scaling['subject']}'s student", "tera-operations"], rows)


def _counted(counted: Mapping[str, float]) -> str:
    return table(["", "tera-operations"], [[name, f"{count:.4g}"] for name, count in counted.items()])


def _planned(planned: Mapping[str, Mapping[str, int]]) -> str:
    names = list(dict.fromkeys(name for plan in planned.values() for name in plan))
    rows = [[name, *(f"{plan[name] / 2**30:.2f}" if name in plan else "" for plan in planned.values())] for name in names]
    return f"{table(['GiB', *planned], rows)}\n\nCounted on tensors without data, for a GPU; workspaces, VAE and text encoder left out."


def plot_scaling(scaling: Mapping, path: Path) -> None:
    """Saves a panel for each of frames, resolution and batch: seconds of an evaluation, and what the operations alone would give."""
    axes_of = scaling["axes"]
    figure = needs("matplotlib.figure", "to plot figures").Figure(
        figsize=(3.6 * len(axes_of), 3.2), dpi=120, layout="constrained"
    )
    for panel, (axis, points) in zip(figure.subplots(1, len(axes_of), squeeze=False)[0], axes_of.items(), strict=True):
        at = [point["at"] for point in points]
        medians = [statistics.median(point["wall"]) for point in points]
        low, high = ([f(point["wall"]) for point in points] for f in (min, max))
        rate = max(point["operations"] / median for point, median in zip(points, medians, strict=True))
        panel.fill_between(at, low, high, color="#3d6fb4", alpha=0.2, linewidth=0)
        panel.plot(at, medians, color="#3d6fb4", marker="o", markersize=4, label="measured")
        panel.plot(
            at, [p["operations"] / rate for p in points], color="#8a8a90", linestyle="--", label="operations at the best rate"
        )
        panel.set_xlabel(axis, fontsize=9)
        panel.set_xticks(at)
        panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#e5e5ea", linewidth=0.8)
        panel.set_axisbelow(True)
    figure.axes[0].set_ylabel("seconds of an evaluation", fontsize=9)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{scaling['subject']}'s student; else {scaling['else']}", fontsize=9)
    figure.savefig(path)
