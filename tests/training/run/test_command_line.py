import os
from pathlib import Path

import pytest

from training.run.command_line import DEFAULT_FILE, load_config
from training.run.config import ROOT, ConfigError, DistillConfig, fields


def refused(load, *arguments):
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    return str(caught.value).splitlines()


def test_the_main_job_needs_no_arguments(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = load_config([])
    assert config.run.folder == ROOT / "runs" / "miniature" and config.model.teacher == ROOT / "miniature"
    assert config.student.steps == (999, 749, 499, 249)
    assert DEFAULT_FILE == ROOT / "training" / "configs" / "miniature.yaml"


def test_layers(load):
    config = load("run: {seed: 3, batch: 4}\nsdm:\nadm:\n  lr: 1e-3", "--run.seed", "5", "--warmup.updates=0")
    assert (config.run.seed, config.run.batch, config.run.updates, config.warmup.updates) == (5, 4, 150, 0)
    assert config.adm.lr == 1e-3 and config.sdm == DistillConfig().sdm


def test_an_empty_file_is_the_defaults(load):
    assert load("# nothing\n") == DistillConfig()


def test_the_environment_does_not_bear(load, monkeypatch):
    monkeypatch.setenv("CRITIC_WARMUP", "99")
    monkeypatch.setenv("RUN", '{"seed": 99}')
    assert load("") == DistillConfig()


@pytest.mark.parametrize(
    ("arguments", "get", "value"),
    [
        (["--student.steps", "999,499"], lambda c: c.student.steps, (999, 499)),
        (["--student.steps=[999, 499]"], lambda c: c.student.steps, (999, 499)),
        (["--student.steps", "999"], lambda c: c.student.steps, (999,)),
        (["--adm.betas", "0.1,0.9"], lambda c: c.adm.betas, (0.1, 0.9)),
        (["--data.render", "null"], lambda c: c.data.render, None),
        (["--run.threads", "2"], lambda c: c.run.threads, 2),
        (["--model.motion", "/m/motion"], lambda c: c.model.motion, Path("/m/motion")),
        (["--model.share_base", "true", "--model.train", "motion+lora"], lambda c: c.model.share_base, True),
        (["--student.lr", "1e-5"], lambda c: c.student.lr, 1e-5),
        (["--run.device", "cuda:1"], lambda c: c.run.device, "cuda:1"),
    ],
)
def test_values_on_the_command_line(load, arguments, get, value):
    assert get(load("data: {render: 5}", *arguments)) == value


def test_paths(load, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = load("data: {folder: clips}\nmodel: {teacher: /t}", "--run.folder", "here", "--model.motion", "~/m")
    assert config.data.folder == ROOT / "clips"
    assert config.run.folder == Path(os.path.abspath("here"))
    assert config.model.teacher == Path("/t")
    assert config.model.motion == Path.home() / "m"


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("run.sed", "run.seed"),
        ("updates", "run.updates"),
        ("sdm.cfg_guidance", "sdm.guidance"),
        ("student.learning_lr", "student.lr"),
    ],
)
def test_an_unknown_key_names_the_nearest(load, typo, meant):
    (line,) = refused(load, "", f"--{typo}", "1")
    assert f"--{typo};" in line and f"--{meant}," in line
    section, _, key = typo.rpartition(".")
    text = f"{section}: {{{key}: 1}}" if section else f"{key}: 1"
    (line,) = refused(load, text)
    assert f"unknown setting {typo};" in line and f"nearest is {meant}." in line and "my.yaml" in line


def test_an_unknown_section(load):
    (line,) = refused(load, "modle: {train: all}")
    assert "unknown setting modle; the nearest is model." in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run.seed", "x"], ["run.seed", "'x'"]),
        (["--run.seed", "1.5"], ["run.seed", "1.5"]),
        (["--run.updates=-1"], ["run.updates", "'-1'"]),
        (["--run.updates", "0", "--warmup.updates", "0"], ["run.updates", "warmup.updates"]),
        (["--run.seed"], ["--run.seed", "nothing"]),
        (["--run.seed", "--run.batch", "2"], ["--run.seed", "--run.batch"]),
        (["--run.folder="], ["--run.folder", "nothing"]),
        (["stray"], ["'stray'", "--section.key"]),
        (["--run", "{}"], ["--run;"]),
        (["--student.lr", "nan"], ["student.lr", "finite"]),
        (["--student.lr=-1e-3"], ["student.lr", "greater than 0"]),
        (["--student.ema", "1"], ["student.ema", "less than 1"]),
        (["--student.steps", "999,1200"], ["student.steps", "1200"]),
        (["--student.steps", "249,999"], ["student.steps", "descending"]),
        (["--student.steps", "999,999"], ["student.steps", "descending"]),
        (["--student.steps", "[]"], ["student.steps", "none"]),
        (["--student.steps", "fast"], ["student.steps", "'fast'"]),
        (["--adm.betas", "0.9"], ["adm.betas"]),
        (["--model.train", "some"], ["model.train", "'some'", "motion+lora"]),
        (["--run.device", "tpu"], ["run.device", "'tpu'"]),
        (["--run.precision", "half"], ["run.precision", "'half'"]),
        (["--data.height", "60"], ["data.height", "multiple of 8"]),
        (["--sdm.weight", "0", "--adm.weight", "0"], ["sdm.weight", "adm.weight"]),
        (["--model.share_base", "true"], ["model.share_base", "model.train"]),
        (["--sdm.t_min", "980"], ["sdm.t_min", "sdm.t_max"]),
        (["--adm.t_max", "20"], ["adm.t_min", "adm.t_max"]),
        (["--sdm.frames", "9"], ["sdm.frames", "data.frames"]),
        (["--run.accumulate", "3"], ["run.batch", "run.accumulate"]),
        (["--run.accumulate", "0"], ["run.accumulate", "at least 1, or auto", "'0'"]),
        (["--model.gradient_checkpointing", "some"], ["model.gradient_checkpointing", "true, false or auto", "'some'"]),
    ],
)
def test_wrong_values_are_one_sentence(load, arguments, words):
    (line,) = refused(load, "", *arguments)
    assert all(word in line for word in words), line
    assert line.endswith(".") and ("expected" in line.lower() or "unknown" in line)


def test_all_problems_at_once_each_with_its_place(load):
    lines = refused(load, "run: {seed: x}\nstudent: {ema: 2, foo: 1}", "--sdm.lr", "0")
    assert len(lines) == 4
    assert sum("my.yaml" in line for line in lines) == 3
    assert sum(line.startswith("command line: sdm.lr") for line in lines) == 1


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("run: [1", "YAML"),
        ("- 1", "sections"),
        ("just text", "sections"),
        ("run: 3", "section with keys"),
        ("run: {folder: ''}", "a path"),
        ("run: {folder: null}", "a path"),
        ("run: {seed: null}", "null"),
        ("1: 2", "unknown setting 1"),
    ],
)
def test_broken_files(load, text, word):
    (line,) = refused(load, text)
    assert word in line and "my.yaml" in line


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"run: \xff")
    for file in (tmp_path / "gone.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ConfigError, match=file.name):
            load_config(["--config", str(file)])


def test_help_shows_every_setting_with_its_description(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["--run.sede", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section, key, field in fields():
        assert f"--{section}.{key} ".replace("--.", "--") in text
        assert field.description and "\n" not in field.description and field.description in text
    assert "--config FILE" in text


@pytest.mark.parametrize("name", sorted(path.name for path in DEFAULT_FILE.parent.glob("*.yaml")))
def test_the_configurations_that_ship_are_valid(name):
    if name.startswith("style"):  # which style is for the command line to say
        load_config(["--config", str(DEFAULT_FILE.parent / name), "--model.score_unet", "unet"])
    else:
        load_config(["--config", str(DEFAULT_FILE.parent / name)])
