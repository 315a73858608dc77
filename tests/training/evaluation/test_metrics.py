import numpy as np
import pytest
from scipy.linalg import sqrtm

from training.evaluation import metrics


def gaussian(rng, count, width, scale=1.0, shift=0.0):
    return rng.normal(size=(count, width)) * scale + shift


def test_frechet_of_one_dimension_is_the_closed_form():
    rng = np.random.default_rng(0)
    a, b = gaussian(rng, 500, 1), gaussian(rng, 400, 1, 2.5, 1.0)
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_with_correlated_features_agrees_with_the_matrix_root():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12))
    b = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)) + 0.3
    ca, cb = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_tends_to_that_of_the_true_gaussians():
    rng = np.random.default_rng(2)
    a, b = gaussian(rng, 40000, 4), gaussian(rng, 40000, 4, 2.0, 0.5)
    assert metrics.frechet_distance(a, b) == pytest.approx(4 * 0.25 + 4 * 1.0, rel=0.03)


def test_frechet_of_a_set_with_itself_is_zero_even_when_degenerate():
    a = np.random.default_rng(3).normal(size=(10, 96)).astype(np.float32)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def brute_mmd(a, b):
    def k(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    n, m = len(a), len(b)
    same_a = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    same_b = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return same_a + same_b - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


def test_kernel_distance_is_the_double_loop():
    rng = np.random.default_rng(4)
    a, b = gaussian(rng, 12, 5), gaussian(rng, 9, 5, 1.2, 0.4)
    assert metrics.kernel_distance(a, b, rng)[0] == pytest.approx(brute_mmd(a, b), rel=1e-10)


def test_kernel_distance_is_unbiased_and_its_error_has_the_right_size():
    rng = np.random.default_rng(5)
    same, apart, errors = [], [], []
    for _ in range(60):
        a, b, c = gaussian(rng, 200, 8), gaussian(rng, 200, 8), gaussian(rng, 200, 8, 1.0, 0.5)
        same.append(metrics.kernel_distance(a, b, rng, subsets=2)[0])
        value, error = metrics.kernel_distance(a, c, rng, subsets=40, subset_size=64)
        apart.append(value)
        errors.append(error)
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(60)
    assert np.mean(errors) == pytest.approx(np.std(apart), rel=0.4)


def test_coverage_and_density_are_the_brute_force_ones():
    rng = np.random.default_rng(6)
    real, fake = gaussian(rng, 40, 3), gaussian(rng, 30, 3, 0.7, 0.3)
    covered, density = 0, 0
    for i, x in enumerate(real):
        reach = sorted(np.linalg.norm(x - y) for j, y in enumerate(real) if j != i)[4]
        hits = sum(np.linalg.norm(x - y) <= reach for y in fake)
        covered += hits > 0
        density += hits
    expected = (covered / 40, density / (5 * 30))
    assert metrics.coverage_and_density(real, fake) == pytest.approx(expected)


def test_coverage_falls_when_modes_are_dropped():
    rng = np.random.default_rng(7)
    real = np.concatenate([gaussian(rng, 100, 4), gaussian(rng, 100, 4, shift=20)])
    assert metrics.coverage_and_density(real, gaussian(rng, 200, 4))[0] < 0.55
    both = np.concatenate([gaussian(rng, 100, 4), gaussian(rng, 100, 4, shift=20)])
    assert metrics.coverage_and_density(real, both)[0] > 0.9


def test_diversity_is_measured_within_prompts():
    features = np.array([[0.0, 0], [3, 4], [100, 0], [100, 0], [7, 7]])
    assert metrics.diversity(features, ["a", "a", "b", "b", "c"]) == pytest.approx(2.5)
    with pytest.raises(ValueError, match="several seeds"):
        metrics.diversity(features[:2], ["a", "b"])
    with pytest.raises(ValueError, match="one prompt a clip"):
        metrics.diversity(features, ["a"])


def test_dynamic_degree_counts_lost_shapes_as_motionless():
    real = np.array([[3.0, 0], [0, 1]])
    assert metrics.dynamic_degree(np.array([[0.0, -2], [np.nan, np.nan]]), real) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="that move"):
        metrics.dynamic_degree(real, np.zeros((2, 2)))


def test_bootstrap_covers_a_known_mean_and_width():
    rng = np.random.default_rng(8)
    inside, widths = 0, []
    for _ in range(200):
        low, high = metrics.bootstrap_interval(np.mean, [rng.normal(2, 1, 100)], 200, rng)
        inside += low <= 2 <= high
        widths.append(high - low)
    assert 0.88 <= inside / 200 <= 0.99
    assert np.mean(widths) == pytest.approx(2 * 1.96 / 10, rel=0.08)


def test_paired_bootstrap_keeps_rows_together():
    rng = np.random.default_rng(9)
    a = rng.normal(size=50)
    low, high = metrics.bootstrap_interval(lambda x, y: (x - y).mean(), [a, a - 1], 50, rng, paired=True)
    assert (low, high) == pytest.approx((1, 1))
    with pytest.raises(ValueError, match="one length"):
        metrics.bootstrap_interval(lambda x, y: 0.0, [a, a[:3]], 5, rng, paired=True)


def test_proportion_interval_is_wilsons():
    assert metrics.proportion_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    low, high = metrics.proportion_interval(128, 128)
    assert high == pytest.approx(1) and 0.96 < low < 1
    with pytest.raises(ValueError, match="between 0 and n"):
        metrics.proportion_interval(3, 2)


@pytest.mark.parametrize("fn", [metrics.frechet_distance, metrics.coverage_and_density])
def test_refuses_features_of_different_nets(fn):
    with pytest.raises(ValueError, match="same feature net"):
        fn(np.zeros((5, 3)), np.zeros((5, 4)))


def test_refuses_too_few_rows():
    with pytest.raises(ValueError, match="more real rows"):
        metrics.coverage_and_density(np.zeros((5, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="4 rows"):
        metrics.kernel_distance(np.zeros((3, 2)), np.zeros((3, 2)), np.random.default_rng(0))
