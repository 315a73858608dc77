import subprocess
import sys

import torch

from training.run.config import ROOT
from training.run.randomness import chain_steps, draw_frames, draw_timesteps, keyed_generator, sample_generators


def drawn(generator):
    return torch.randn(4, generator=generator).tolist()


def test_a_key_is_a_stream_and_another_key_another():
    keys = [(0, "student", 1), (0, "student", 2), (1, "student", 1), (0, "sdm", 1), (0, "student")]
    streams = [drawn(keyed_generator(*key)) for key in keys]
    assert streams == [drawn(keyed_generator(*key)) for key in keys]
    assert len({tuple(stream) for stream in streams}) == len(keys)


def test_streams_do_not_depend_on_the_process():
    code = (
        "import torch; from training.run.randomness import *; print(torch.randn(4, generator=keyed_generator(3, 'a')).tolist())"
    )
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(drawn(keyed_generator(3, "a")))


def test_a_sample_draws_the_same_in_every_slicing():
    whole = [drawn(g) for g in sample_generators(range(4, 10), 0, "adm")]
    parts = [drawn(g) for samples in (range(4, 5), range(5, 8), range(8, 10)) for g in sample_generators(samples, 0, "adm")]
    assert whole == parts and len({tuple(stream) for stream in whole}) == 6


def test_timesteps_are_uniform_and_inclusive():
    generators = sample_generators(range(3), 0)
    draws = torch.stack([draw_timesteps(generators, torch.tensor([20, 20, 22]), 24) for _ in range(1000)])
    assert draws.shape == (1000, 3) and draws.dtype == torch.long
    counts = torch.bincount(draws[:, :2].flatten())
    assert counts[:20].sum() == 0 and len(counts) == 25
    assert ((counts[20:] - 400).abs() < 80).all()  # 400 +- 18
    assert draws[:, 2].min() == 22 and draws[:, 2].max() == 24


def test_a_chain_s_steps_come_equally_often_and_in_random_order():
    steps = chain_steps(range(4000), 4, 0)
    assert torch.bincount(steps).tolist() == [1000] * 4 and (steps.unflatten(0, (-1, 4)).sort().values == torch.arange(4)).all()
    orders = {tuple(order) for order in steps.unflatten(0, (-1, 4)).tolist()}
    assert len(orders) == 24 and not torch.equal(steps, chain_steps(range(4000), 4, 1))
    assert torch.equal(chain_steps(range(6, 13), 4, 0), steps[6:13])


def test_frames_are_different_and_any():
    rows = draw_frames(sample_generators(range(200), 0), 6, 3)
    assert rows.shape == (200, 3) and all(len(set(row)) == 3 for row in rows.tolist())
    assert set(rows.flatten().tolist()) == set(range(6))
