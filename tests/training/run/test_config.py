import pytest
from pydantic import ValidationError

from training.run.config import RESUMABLE_CHANGES, ROOT, DistillConfig, fields, from_yaml, to_yaml, training_changes


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
