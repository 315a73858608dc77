import pytest

from training.evaluation.feature_net import load_features_of
from training.evaluation.rows import Bench, Method
from training.evaluation.table import Table, require_page
from training.run.folder import RunFolderError


def test_a_row_of_several_seeds_is_their_mean_and_range(stack, tmp_path):
    bench = Bench(stack, load_features_of(stack), 6)
    table = Table(bench, tmp_path)
    real = [bench.real_clips(draw) for draw in (1, 2)]
    methods = [Method(f"seed {i}", lambda *_: None, 4) for i in range(2)]
    bench.sample = lambda method: (real[int(method.name[-1])], 0.25)
    for i in range(2):
        table.add(f"alone {i}", lambda i=i: real[i])
    table.add_runs("both", methods, [10.0, 20.0])
    alone = [table.rows[f"alone {i}"]["jitter"][0] for i in range(2)]
    assert table.rows["both"]["jitter"] == (pytest.approx(sum(alone) / 2), min(alone), max(alone))
    assert table.costs["both"] == {"evaluations": 4, "seconds": 0.25, "training seconds": 15.0}
    assert "seed 0" not in table.rows


def test_a_table_goes_into_its_section_of_a_page(stack, tmp_path):
    bench = Bench(stack, load_features_of(stack), 6)
    table, page = Table(bench, tmp_path), tmp_path / "results.md"
    real = bench.real_clips(1)
    bench.sample = lambda method: (real, 0.25)
    table.add_method(Method("student 4 steps", lambda *_: None, 4))
    page.write_text("<!-- a -->\n<!-- end of a -->\nbetween\n<!-- b -->\nold\n<!-- end of b -->\n")
    table.write({"student": "a.safetensors", "date": "2026-01-01"}, page, "b")
    first, second = page.read_text().split("between")
    assert first == "<!-- a -->\n<!-- end of a -->\n" and "old" not in second
    assert "| student 4 steps |" in second and "student: a.safetensors; date: 2026-01-01" in second


def test_a_page_without_a_place_for_the_tables_is_refused(tmp_path):
    """Without the second line all that stands below would go."""
    page = tmp_path / "page.md"
    for text in ("", "<!-- a -->\nbelow", "<!-- end of a -->\n<!-- a -->"):
        page.write_text(text)
        with pytest.raises(RunFolderError, match="the lines <!-- a --> and <!-- end of a -->, found not both"):
            require_page(page, ["a"])
    page.write_text("<!-- a -->\n<!-- end of a -->")
    require_page(page, ["a"])
