import numpy as np
import pytest
import torch

from training.evaluation.feature_net import load_features
from training.evaluation.measure import BETTER, figures, measure
from training.evaluation.rows import Bench, Method, kept, student_method, teacher_method
from training.world import scenes

CLIPS = 12


@pytest.fixture(scope="module")
def net(stack_folder):
    return load_features(stack_folder / "feature_net.safetensors")


@pytest.fixture
def bench(stack, net):
    return Bench(stack, net, CLIPS, precision="float32")


@pytest.fixture(scope="module")
def real(net):
    """Measured: two draws of real clips of the same prompts."""
    contents = scenes.draw_contents(CLIPS, held_out=True, seed=0)
    draws = [[scenes.render(c, "plain", np.random.default_rng([d, i])) for i, c in enumerate(contents)] for d in range(2)]
    rows = [measure(np.stack([clip.frames for clip in clips]), contents, net) for clips in draws]
    return draws, rows, [content.caption for content in contents]


# ---- measuring ----


def test_real_clips_are_measured_as_what_they_are(real):
    draws, (row, other), prompts = real
    assert row["verdicts"].shape == (CLIPS, 6) and row["verdicts"].dtype == bool
    np.testing.assert_allclose(row["velocity"], [clip.velocity for clip in draws[0]], atol=0.2)
    said = figures(other, row, prompts)
    for name in ("accuracy", "size", "colour", "shape", "motion", "background"):
        assert said[name][0] == 1.0 and said[name][1] < 1.0
    assert said["motion error"][0] < 0.1 and said["jitter"][0] < 1.0
    assert said["dynamic degree"][0] == pytest.approx(1.0, abs=0.1)
    assert all(low <= value <= high for value, low, high in said.values())
    assert set(BETTER) - {"diversity", "style", "frame accuracy"} | {"dynamic degree"} == set(said)  # each prompt is there once


def test_a_row_is_at_no_distance_of_itself(real):
    _, (row, _), prompts = real
    said = figures(row, row, prompts)
    assert said["Fréchet distance"][0] == pytest.approx(0, abs=1e-6)
    assert said["coverage"][0] == 1.0 and said["dynamic degree"][0] == pytest.approx(1.0)
    assert said["KID"][0] <= 0  # unbiased, so below 0 where both sets are one


def test_the_style_is_a_figure_where_it_is_asked_for(real, net):
    draws, (row, _), prompts = real
    contents = [clip.content for clip in draws[0]]
    plain = np.stack([clip.frames for clip in draws[0]])
    neon = np.stack([scenes.render(c, "neon", np.random.default_rng(i)).frames for i, c in enumerate(contents)])
    half = np.concatenate([neon[: CLIPS // 2], plain[CLIPS // 2 :, ::-1]])  # half of them in the style, half of them backwards
    said = figures(measure(half, contents, net, "neon"), row, prompts)
    assert said["style"][0] == 0.5 and said["frame accuracy"][0] == 1.0 and said["accuracy"][0] < 1.0
    assert figures(measure(half, contents, net, "plain"), row, prompts)["style"][0] == 0.5


def test_clips_that_stand_still_or_run_backwards_lose_their_motion(real, net):
    draws, (row, _), prompts = real
    contents = [clip.content for clip in draws[0]]
    moving = np.array([content.direction is not None for content in contents])
    for change in (lambda f: f[::-1], lambda f: f[:1].repeat(8, 0)):
        row_of = measure(np.stack([change(clip.frames) for clip in draws[0]]), contents, net)
        said = figures(row_of, row, prompts)
        assert said["motion"][0] == pytest.approx(1 - moving.mean()) == said["accuracy"][0] and said["colour"][0] == 1.0
    assert said["dynamic degree"][0] == pytest.approx(0, abs=0.02)


def test_diversity_is_told_where_prompts_repeat(real):
    _, (row, other), prompts = real
    both = {name: np.concatenate([row[name], other[name]]) for name in row}
    value, low, high = figures(both, row, prompts * 2)["diversity"]
    expected = np.linalg.norm(row["features"] - other["features"], axis=1).mean()
    assert value == pytest.approx(expected, rel=1e-6) and low < value < high


# ---- rows ----


def test_prompts_are_held_out_and_the_same_for_all(bench):
    assert len(bench.prompts) == CLIPS and all(scenes.parse_caption(prompt).held_out for prompt in bench.prompts)
    assert np.array_equal(bench.real_clips(0), bench.real_clips(0))
    assert not np.array_equal(bench.real_clips(0), bench.real_clips(1))


def test_the_floor_is_real_clips_through_the_vae(bench):
    expected = bench.stack.decode_clips(bench.stack.encode_clips(torch.from_numpy(bench.real_clips(1)))).numpy()
    assert np.abs(bench.floor_clips().astype(int) - expected).max() <= 1


def test_whoever_samples_starts_from_the_same_noise_however_many_are_asked_for(bench):
    seen = []

    def sample(noise, text, generators):
        seen.append((noise, text, torch.stack([torch.randn(3, generator=g) for g in generators])))
        return noise

    some, _ = bench.sample(Method("some", sample, 1), 3)
    clips, seconds = bench.sample(Method("all", sample, 1))
    assert clips.shape == (CLIPS, 8, 64, 64, 3) and clips.dtype == np.uint8 and seconds > 0
    for few, many in zip(*seen, strict=True):
        torch.testing.assert_close(few, many[:3], rtol=1e-4, atol=1e-5)
    assert np.abs(some.astype(int) - clips[:3]).max() <= 1


def test_a_methods_evaluations_are_counted(stack):
    calls = []

    def predictor(x_t, t, text):
        calls.append(len(x_t))
        return x_t

    noise, text, generators = torch.randn(2, 4, 8, 8, 8), torch.zeros(2, 32, 32), [torch.Generator(), torch.Generator()]
    for method, evaluations in (
        (student_method("student", predictor, [999, 499]), 2),
        (teacher_method("guided", predictor, stack, 3, 3.0), 6),
        (teacher_method("plain", predictor, stack, 3, 1.0), 3),
    ):
        calls.clear()
        method.sample(noise, text, generators)
        assert method.evaluations == evaluations == sum(calls) / 2


def test_a_row_is_measured_once(tmp_path):
    calls = []

    def make():
        calls.append(None)
        return {"verdicts": np.array([[True, False]]), "features": np.arange(6.0).reshape(2, 3).T}

    first, second = (kept(tmp_path / "rows" / "a.safetensors", make) for _ in range(2))
    assert len(calls) == 1 and first.keys() == second.keys()
    for name in first:
        assert np.array_equal(first[name], second[name]) and first[name].dtype == second[name].dtype
