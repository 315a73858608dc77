"""Distances between sets of clips, and intervals around what is measured on them: pure functions on arrays.

Features are float arrays (N, D), one row a clip; all sums are done in float64.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two feature sets (N, D) and (M, D) (Heusel et al. 2017).

    It is biased upwards by about 1/N: compare only sets of equal size. ValueError if the widths differ or a set has no two rows.
    """
    real, generated = _pair(real, generated)
    offset = real.mean(0) - generated.mean(0)
    cov_real, cov_generated = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (real, generated))
    # tr sqrt(A B) is the sum of the singular values of sqrt(A) sqrt(B): no root of a matrix that is not symmetric.
    roots = _symmetric_root(cov_real) @ _symmetric_root(cov_generated)
    overlap = np.linalg.svd(roots, compute_uv=False).sum()
    return float(max(offset @ offset + np.trace(cov_real) + np.trace(cov_generated) - 2 * overlap, 0.0))


def kernel_distance(
    real: np.ndarray, generated: np.ndarray, rng: np.random.Generator, *, subsets: int = 100, subset_size: int = 256
) -> tuple[float, float]:
    """Kernel distance (KID) of two feature sets (N, D) and (M, D), and its standard error (Bińkowski et al. 2018).

    The distance is the unbiased squared MMD with the kernel (x·y / D + 1)^3 on all rows, so it may be slightly negative. The error
    is the spread of the estimate over random subsets (of at most half the rows), scaled to the full size; between sets that
    hardly differ it comes out too large. ValueError as for the Fréchet distance, or with fewer than 4 rows.
    """
    real, generated = _pair(real, generated)
    full = min(len(real), len(generated))
    if full < 4:
        raise ValueError(f"Expected 4 rows or more in both sets, found {full}; give more clips.")
    size = min(subset_size, full // 2)
    kernels = _kernel(real, real), _kernel(generated, generated), _kernel(real, generated)
    estimates = []
    for _ in range(subsets):
        i = rng.choice(len(real), size, replace=False)
        j = rng.choice(len(generated), size, replace=False)
        estimates.append(_mmd(kernels[0][np.ix_(i, i)], kernels[1][np.ix_(j, j)], kernels[2][np.ix_(i, j)]))
    # Drawn without replacement, n of N rows vary by (1/n - 1/N) of a row's variance, where the whole set varies by 1/N.
    return float(_mmd(*kernels)), float(np.std(estimates, ddof=1) * np.sqrt(size / (full - size)))


def coverage_and_density(real: np.ndarray, generated: np.ndarray, *, neighbours: int = 5) -> tuple[float, float]:
    """Coverage (0..1) and density of generated features (M, D) among real ones (N, D) (Naeem et al. 2020).

    Around every real row lies a ball that reaches its k-th nearest real neighbour: coverage is the fraction of balls with a
    generated row in them, density the mean number of balls a generated row lies in, over k. ValueError also if N <= k.
    """
    return coverage_and_density_of(inside_balls(real, generated, neighbours), neighbours)


def inside_balls(real: np.ndarray, generated: np.ndarray, neighbours: int = 5) -> np.ndarray:
    """(N, M) bool: whether a generated row lies in the ball of a real one, of `coverage_and_density`."""
    real, generated = _pair(real, generated)
    if len(real) <= neighbours:
        raise ValueError(
            f"Expected more real rows than the {neighbours} neighbours, found {len(real)}; give more clips or lower `neighbours`."
        )
    within = _distances(real, real)
    np.fill_diagonal(within, 0.0)
    reach = np.partition(within, neighbours, axis=1)[:, neighbours]  # index 0 is the row itself
    return _distances(real, generated) <= reach[:, None]


def coverage_and_density_of(inside: np.ndarray, neighbours: int = 5) -> tuple[float, float]:
    """Coverage and density from `inside_balls`, any of whose columns may be drawn again."""
    return float(inside.any(1).mean()), float(inside.sum(0).mean() / neighbours)


def diversity(features: np.ndarray, prompts: Sequence[str]) -> float:
    """Mean distance between the features (N, D) of two clips of the same prompt, every prompt weighing the same.

    ValueError if no prompt has two clips, or there is not one prompt a row.
    """
    if len(features) != len(prompts):
        raise ValueError(f"Expected one prompt a clip, found {len(prompts)} for {len(features)}; pass them in the same order.")
    features = np.asarray(features, np.float64)
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    means = [_distances(features[i], features[i])[np.triu_indices(len(i), 1)].mean() for i in rows.values() if len(i) > 1]
    if not means:
        raise ValueError("Expected a prompt with two clips or more, found none; sample several seeds a prompt.")
    return float(np.mean(means))


def dynamic_degree(generated: np.ndarray, real: np.ndarray) -> float:
    """Mean speed of generated clips over that of real ones, from velocities (N, 2) and (M, 2) in pixels a frame.

    A row with NaN (no shape was tracked) counts as no motion. ValueError if the real clips do not move.
    """
    speeds = [np.nan_to_num(np.linalg.norm(v, axis=1)).mean() for v in (generated, real)]
    if speeds[1] == 0:
        raise ValueError("Expected real clips that move, found a mean speed of 0; measure against clips with motion.")
    return float(speeds[0] / speeds[1])


def bootstrap_interval(
    fn: Callable[..., float],
    arrays: Sequence[np.ndarray],
    samples: int,
    rng: np.random.Generator,
    level: float = 0.95,
    paired: bool = False,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of `fn(*arrays)`; the rows of every array are drawn with replacement.

    With `paired` the same rows are drawn from all arrays, which then must be equally long. Meant for means and their ratios: drawing
    a row twice shifts distances between sets (Fréchet, coverage) upwards or downwards.
    """
    arrays = [np.asarray(a) for a in arrays]
    if paired and len({len(a) for a in arrays}) > 1:
        raise ValueError(
            f"Expected paired arrays of one length, found {[len(a) for a in arrays]}; pass one row a clip in each."
        )
    values = []
    for _ in range(samples):
        if paired:
            rows = [rng.integers(0, len(arrays[0]), len(arrays[0]))] * len(arrays)
        else:
            rows = [rng.integers(0, len(a), len(a)) for a in arrays]
        values.append(fn(*(a[i] for a, i in zip(arrays, rows, strict=True))))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def proportion_interval(successes: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) of a proportion (Wilson 1927); stays within 0..1. ValueError unless 0 <= s <= n, n > 0."""
    if not 0 <= successes <= count or count == 0:
        raise ValueError(f"Expected between 0 and n > 0 successes, found {successes} of {count}; count again.")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return float(max(centre - half, 0.0)), float(min(centre + half, 1.0))


def _pair(real: np.ndarray, generated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1] or min(len(real), len(generated)) < 2:
        raise ValueError(
            f"Expected two feature sets (N, D) and (M, D) with 2 rows or more, found {real.shape} and {generated.shape}; "
            "take both from the same feature net."
        )
    return real, generated


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mmd(real: np.ndarray, generated: np.ndarray, across: np.ndarray) -> float:
    n, m = len(real), len(generated)
    within = (real.sum() - np.trace(real)) / (n * (n - 1)) + (generated.sum() - np.trace(generated)) / (m * (m - 1))
    return within - 2 * across.mean()


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.clip(squared, 0, None))
