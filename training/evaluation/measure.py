"""What is measured on a set of clips, and the figures of a row that follow from it.

Every row of a table shows the same prompts with the same seeds and is compared with the same reference: other real clips of these
prompts. The figures are those of the field but on a small video feature net of our own, so none of them is called FVD.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from tqdm import tqdm

from training.evaluation.feature_net import VideoFeatures
from training.evaluation.metrics import (
    bootstrap_interval,
    coverage_and_density_of,
    diversity,
    dynamic_degree,
    frechet_distance,
    inside_balls,
    kernel_distance,
    proportion_interval,
)
from training.run.packages import needs
from training.world.oracle import ATTRIBUTES, judge, motion_error, read_clip
from training.world.scenes import Content

Figure = tuple[float, float, float]  # value, lower and upper end of its 95% interval

# Which way a figure is better; those of neither way are shown without a verdict.
BETTER = {
    "style": "higher",
    "accuracy": "higher",
    "frame accuracy": "higher",
    **dict.fromkeys(ATTRIBUTES, "higher"),
    "motion error": "lower",
    "jitter": "lower",
    "KID": "lower",
    "Fréchet distance": "lower",
    "coverage": "higher",
    "density": "higher",
    "diversity": "higher",
}
PUBLIC_BETTER = {"FVD": "lower", "VideoMAE distance": "lower", "CLIPScore": "higher"}  # of `backbones`


def measure(
    frames: np.ndarray, contents: Sequence[Content], net: VideoFeatures, style: str | None = None
) -> dict[str, np.ndarray]:
    """What the figures need of clips (N, F, H, W, 3) uint8 of the given contents: one row a clip in every array.

    With a `style` also whether a clip is in it, stroke and palette.
    """
    needs("scipy", "to read clips of the miniature world")
    readings = [read_clip(clip) for clip in tqdm(frames, "reading", leave=False, mininterval=2)]
    verdicts = [judge(reading, content) for reading, content in zip(readings, contents, strict=True)]
    in_style = {} if style is None else {"style": np.array([reading.style == style for reading in readings])}
    return in_style | {
        "verdicts": np.array([[verdict[name] for name in (*ATTRIBUTES, "all")] for verdict in verdicts]),
        "motion_error": np.array([motion_error(r, c) for r, c in zip(readings, contents, strict=True)]),
        "velocity": np.array([reading.velocity for reading in readings]),
        "jerk": np.array([reading.jerk for reading in readings]),
        "features": net.features(frames).double().numpy(),
    }


def figures(
    row: dict[str, np.ndarray], real: dict[str, np.ndarray], prompts: Sequence[str], seed: int = 0
) -> dict[str, Figure]:
    """The figures of a measured row against the measured reference, with 95% intervals.

    Where the style was measured: the fraction of clips in it, and of those right in every attribute that a single frame shows.
    Proportions have Wilson's interval, means and ratios the percentile bootstrap's. For distances between sets, which a bootstrap
    shifts, the interval is the value -+ 1.96 bootstrap standard deviations (for KID: standard errors).
    """
    rng = np.random.default_rng(seed)
    result: dict[str, Figure] = {}
    verdicts = {"accuracy": row["verdicts"][:, -1]} | {name: row["verdicts"][:, i] for i, name in enumerate(ATTRIBUTES)}
    if "style" in row:
        looks = [i for i, name in enumerate(ATTRIBUTES) if name != "motion"]
        verdicts = {"style": row["style"], "frame accuracy": row["verdicts"][:, looks].all(1)} | verdicts
    for name, verdict in verdicts.items():
        right, count = int(verdict.sum()), len(verdict)
        result[name] = (right / count, *proportion_interval(right, count))
    jerk = row["jerk"][np.isfinite(row["jerk"])]
    for name, fn, arrays in (
        ("motion error", np.mean, [row["motion_error"]]),
        ("dynamic degree", dynamic_degree, [row["velocity"], real["velocity"]]),
        ("jitter", np.mean, [jerk]),
    ):
        if all(len(a) for a in arrays):
            result[name] = (float(fn(*arrays)), *bootstrap_interval(fn, arrays, 500, rng))
    kid, error = kernel_distance(real["features"], row["features"], rng)
    result["KID"] = (kid, kid - 1.96 * error, kid + 1.96 * error)
    result["Fréchet distance"] = spread(partial(frechet_distance, real["features"]), row["features"], rng)
    inside = inside_balls(real["features"], row["features"]).T  # a row for each generated clip
    for i, name in enumerate(("coverage", "density")):
        result[name] = spread(lambda rows, i=i: coverage_and_density_of(rows.T)[i], inside, rng)
    if len(set(prompts)) < len(prompts):
        result["diversity"] = _clustered_diversity(row["features"], prompts, rng)
    return result


def spread(fn: Callable[[np.ndarray], float], generated: np.ndarray, rng: np.random.Generator) -> Figure:
    """The value of `fn` with the spread that redrawing the generated clips, one a row, gives it."""
    value = fn(generated)
    draws = [fn(generated[rng.integers(0, len(generated), len(generated))]) for _ in range(40)]
    return value, value - 1.96 * float(np.std(draws)), value + 1.96 * float(np.std(draws))


def _clustered_diversity(features: np.ndarray, prompts: Sequence[str], rng: np.random.Generator) -> Figure:
    """Diversity within prompts; the bootstrap draws prompts, since a clip drawn twice would lie at distance 0 of itself."""
    groups = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    means = np.array([diversity(features[i], [""] * len(i)) for i in groups.values() if len(i) > 1])
    return float(means.mean()), *bootstrap_interval(np.mean, [means], 500, rng)
