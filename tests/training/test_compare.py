import json
import shutil

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from training import compare
from training.distill import distil
from training.evaluation.rows import Bench
from training.run.command_line import load_config
from training.run.folder import RunFolder


@pytest.fixture
def recipe(stack_folder, tmp_path):
    """A recipe of few updates on the tiny stack, beside which another teacher stands."""
    folder = tmp_path / "stack"
    shutil.copytree(stack_folder, folder)
    other = folder / "teachers" / "other" / "diffusion_pytorch_model.safetensors"
    shutil.copytree(folder / "motion_adapter", other.parent)
    settings = {
        "run": {"updates": 1, "batch": 4, "threads": 1},
        "data": {"folder": str(tmp_path / "data"), "render": 8},
        "model": {"teacher": str(folder)},
        "warmup": {"updates": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def run(recipe, tmp_path, monkeypatch):
    """run(options): the command on six clips a row, with a short teacher; the folder that it leaves."""
    full = compare.teacher_method
    monkeypatch.setattr(compare, "teacher_method", lambda name, p, s, steps, g: full(name, p, s, min(steps, 2), g))

    def inner(*options):
        compare.main(["--config", str(recipe), "--clips", "6", "--out", str(tmp_path / "out"), *options])
        return tmp_path / "out"

    return inner


@pytest.mark.slow
def test_every_way_is_trained_on_every_teacher_and_goes_into_table_plot_and_page(run, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    sections = [f"<!-- comparison {name} -->\nold\n<!-- end of comparison {name} -->\n" for name in ("own", "other")]
    page.write_text("before\n" + "between\n".join(sections) + "after\n")
    rows = ["ADM only", "AVDM2, 1 step"]
    options = ["--teachers", "own", "other", "--seeds", "1", "--rows", *rows, "--page", str(page)]
    out = run(*options)
    own, other = page.read_text().split("between")
    for text in (own, other):
        assert (
            all(f"| {name} |" in text for name in ("teacher 25 steps, guided", "real clips, another draw", *rows))
            and "old" not in text
        )
        assert "seed 0" not in text and "training: 3 updates of 4 clips" in text
    report = json.loads(next((out / "own").glob("*/report.json")).read_text())["rows"]
    assert [report[name]["evaluations"] for name in rows] == [4, 1]
    assert all(report[name]["training seconds"] > 0 for name in rows)
    runs = out / "own" / "runs"
    updates = [
        len((runs / name / "stats.jsonl").read_text().splitlines())
        for name in ("warm-up-only-0", "ADM-only-0", "AVDM2--1-step-0")
    ]
    assert updates == [2, 3, 3]
    assert Image.open(out / "gain.png").width > 500

    monkeypatch.setattr(Bench, "sample", lambda *_: pytest.fail("a row was sampled again"))
    monkeypatch.setattr(compare, "distil", lambda *_, **__: pytest.fail("a student was trained again"))
    run(*options)


def test_a_row_that_goes_on_from_the_shared_warm_up_is_what_its_own_run_would_be(recipe, tmp_path):
    options = ["--config", str(recipe)]
    mine = compare.run_of("ADM only", "own", options, 3, tmp_path)
    assert [json.loads(line)["update"] for line in (mine.parent / "stats.jsonl").read_text().splitlines()] == [1, 2, 3]
    with RunFolder(tmp_path / "alone") as held:
        alone = [*options, "--run.folder", str(tmp_path / "alone"), "--run.seed", "3", "--sdm.weight", "0"]
        own = load_file(distil(load_config(alone), held, report=False))
    ours, before = load_file(mine), load_file(tmp_path / "own" / "runs" / "warm-up-only-3" / "student.safetensors")
    assert all(torch.equal(ours[name], own[name]) for name in own)
    assert any(not torch.equal(ours[name], before[name]) for name in own)


def test_a_teachers_name_does_not_leave_its_folder(capsys):
    with pytest.raises(SystemExit):
        compare.main(["--teachers", "../other"])
    assert "expected the name of a folder, found '../other'" in capsys.readouterr().err
