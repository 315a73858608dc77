import pytest

from training.evaluation.feature_net import load_features_of
from training.evaluation.rows import Bench, Method
from training.evaluation.table import Table


def test_a_row_of_several_seeds_is_their_mean_and_range(stack, tmp_path):
    bench = Bench(stack, load_features_of(stack), 6)
    table = Table(bench, tmp_path)
    real = [bench.real_clips(draw) for draw in (1, 2)]
    methods = [Method(f"seed {i}", lambda *_: None, 4) for i in range(2)]
    bench.sample = lambda method: (real[int(method.name[-1])], 0.25)
    for i in range(2):
        table.add(f"alone {i}", lambda i=i: real[i])
    table.add_runs("both", methods)
    alone = [table.rows[f"alone {i}"]["jitter"][0] for i in range(2)]
    assert table.rows["both"]["jitter"] == (pytest.approx(sum(alone) / 2), min(alone), max(alone))
    assert table.costs["both"] == {"evaluations": 4, "seconds": 0.25}
    assert "seed 0" not in table.rows


def test_rows_of_ablations_have_a_section_of_their_own(stack, tmp_path):
    bench = Bench(stack, load_features_of(stack), 6)
    table, page = Table(bench, tmp_path), tmp_path / "results.md"
    real = bench.real_clips(1)
    bench.sample = lambda method: (real, 0.25)
    table.add_method(Method("student 4 steps", lambda *_: None, 4))
    table.add_runs("both, short", [Method("both, seed 0", lambda *_: None, 4)])
    page.write_text("<!-- results -->\n<!-- end of results -->\nbetween\n<!-- ablations -->\n<!-- end of ablations -->\n")
    table.write({"student": "a.safetensors", "date": "2026-01-01"}, page)
    results, ablations = page.read_text().split("between")
    assert "| student 4 steps |" in results and "short" not in results and "student: a.safetensors; date" in results
    assert "| both, short |" in ablations and "student 4 steps" not in ablations and "a.safetensors" not in ablations
    assert "date: 2026-01-01" in ablations
