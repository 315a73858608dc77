import pytest
from pydantic import ValidationError

from training.run.config import (
    RESUMABLE_CHANGES,
    ROOT,
    ConfigError,
    DistillConfig,
    fields,
    from_yaml,
    to_yaml,
    training_changes,
)


def test_yaml_round_trip(load):
    config = load("", "--student.steps", "999,1", "--run.folder", "/elsewhere/run", "--sdm.lr", "1e-6")
    text = to_yaml(config)
    assert from_yaml(text) == config and load(text) == config
    assert str(ROOT) not in to_yaml(DistillConfig())


def test_settings_are_frozen():
    config = DistillConfig()
    with pytest.raises(ValidationError):
        config.run.seed = 1
    with pytest.raises(ValidationError):
        config.warmup.updates = 1


def test_training_changes(load):
    earlier = to_yaml(load(""))
    assert training_changes(earlier, load("")) == []
    harmless = load("", "--run.updates", "9", "--run.folder", "x", "--run.threads", "1", "--evaluation.clips", "8")
    assert training_changes(earlier, harmless) == []
    assert training_changes(earlier, load("", "--sdm.weight", "1", "--model.motion", "/m")) == [
        "model.motion '/m', was null",
        "sdm.weight 1.0, was 0.5",
    ]
    unknown_then = earlier.replace("shared_noise: false", "")  # a setting that is newer than the run
    assert unknown_then != earlier
    assert training_changes(unknown_then, load("")) == []
    assert training_changes(unknown_then, load("", "--sdm.shared_noise", "true")) == ["sdm.shared_noise true, was false"]
    assert {f"{section}.{key}" for section, key, _ in fields()} >= RESUMABLE_CHANGES


NESTED = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (NESTED, "aliases that stand for more than"),
        ("a: &a [*a]", "aliases that stand for more than"),
        ("run: {seed: " + "9" * 5000 + "}", "digits"),
        ("run: " + "[" * 20_000, "nested too deep|expected"),
        ("run: {seed: 2020-99-99}", "month"),
        ("run: [", "expected"),
    ],
    ids=["billions", "itself", "long", "deep", "date", "open"],
)
def test_yaml_that_cannot_be_is_refused_in_a_sentence(text, word):
    with pytest.raises(ConfigError, match=word) as caught:
        from_yaml(text, "x.yaml")
    assert "x.yaml" in str(caught.value) and len(str(caught.value)) < 5000


def test_a_few_aliases_are_as_good_as_what_they_stand_for():
    assert from_yaml("sdm: &all {t_min: 7, t_max: 900}\nadm: *all") == from_yaml(
        "sdm: {t_min: 7, t_max: 900}\nadm: {t_min: 7, t_max: 900}"
    )
    assert from_yaml("") == from_yaml("# nothing") == DistillConfig()


@pytest.mark.parametrize("path", ["x" * 256, "a/" + "é" * 128, "a\\0b", "a/" * 2100])
def test_paths_that_no_file_can_have_are_refused(path):
    with pytest.raises(ConfigError, match="expected a path of names up to 255 bytes"):
        from_yaml(f'data: {{folder: "{path}"}}')
    assert from_yaml(f'data: {{folder: "{"x" * 255}"}}').data.folder.name == "x" * 255


def test_a_refusal_is_text_that_can_be_printed():
    with pytest.raises(ConfigError) as caught:
        from_yaml("run: {seed: 1}\nadm: {\ufeffbetas: 1, lr: [}")
    assert all(line.isprintable() for line in str(caught.value).splitlines())
