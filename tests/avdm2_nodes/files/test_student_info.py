import json
from dataclasses import replace

import pytest
import torch

from avdm2_nodes.files.student import read_student
from avdm2_nodes.files.student_info import FORMAT_VERSION, StudentInfo, StyleUse
from tests.avdm2_nodes.files.students import edited, refusal

torch.set_num_threads(1)


def test_metadata_round_trip_without_what_is_optional(info, lora_info):
    for one in (info, lora_info, replace(info, score_name=None, score_hash=None)):
        metadata = one.to_metadata()
        assert all(isinstance(value, str) for value in metadata.values())
        assert StudentInfo.from_metadata(metadata, "x") == one


def test_metadata_has_the_modelspec_keys(info):
    metadata = info.to_metadata()
    keys = "sai_model_spec", "architecture", "implementation", "title", "date", "license", "usage_hint"
    assert all(metadata[f"modelspec.{key}"] for key in keys)
    assert metadata["modelspec.license"] == "Apache-2.0"
    assert "999, 749, 499, 249" in metadata["modelspec.usage_hint"]
    assert metadata["avdm2.training_config"] == info.training_config


def test_styles_in_its_weights_are_on_record(whole, info, path):
    """Without any, the file is as before there were styles."""
    uses = tuple(StyleUse(name=f"style – {i}", hash=f"{i}" * 64, mode="transplant", strength=0.5 * i) for i in range(3))
    styled = replace(info, styles=uses)
    assert StudentInfo.from_metadata(styled.to_metadata(), path) == styled
    assert "avdm2.styles" not in info.to_metadata()
    said = json.dumps([{"name": "a", "hash": "0" * 64, "mode": "by magic", "strength": 1.0}])
    assert "styles.0.mode 'by magic'" in refusal(read_student, edited(whole, styles=said))


def test_newer_format(whole):
    message = refusal(read_student, edited(whole, format_version=str(FORMAT_VERSION + 1), holds="what is not known yet"))
    assert f"found {FORMAT_VERSION + 1}" in message and "update" in message


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("holds", "half", "holds 'half'"),
        ("holds", None, "no holds"),
        ("format_version", "one", "format_version 'one'"),
        ("timesteps", "[1, 2]", "descending"),
        ("timesteps", "[]", "descending"),
        ("timesteps", "[1000]", "timesteps.0"),
        ("timesteps", "[999", "JSON"),
        ("unet_config", "[" * 100_000, "JSON"),
        ("unet_config", "{}", "another architecture"),
        ("unet_config", '{"depth": 3}', "another architecture"),
        ("beta_schedule", "scaled_linear", "beta_schedule"),
        ("prediction_type", "v_prediction", "prediction_type"),
        ("frames", "0", "frames '0'"),
        ("frames", "33", "32 position encodings, found 33"),
        ("frames", str(10**9), "frames '1000000000'"),
        ("frames", "9" * 5000, "its frames wrong"),
        ("height", str(10**6), "height '1000000'"),
        ("format_version", "9" * 5000, "update this project"),
        ("unet_config", '{"layers_per_block": 1000000}', "layers_per_block with a number that is too large"),
        ("unet_config", '{"motion_max_seq_length": 100000000}', "motion_max_seq_length with a number that is too large"),
        ("unet_config", '{"x": ' + "9" * 5000 + "}", "4300 digits"),
        ("base_hash", "ab", "base_hash"),
        ("lora_rank", "4", "LoRA rank"),
    ],
)
def test_wrong_metadata(whole, key, value, said):
    message = refusal(read_student, edited(whole, **{key: value}))
    assert said in message and str(whole) in message


def test_info_that_contradicts_itself(info):
    for changes in (
        {"holds": "motion+lora"},
        {"lora_rank": 4},
        {"timesteps": (249, 499)},
        {"format_version": FORMAT_VERSION + 1},
    ):
        with pytest.raises(ValueError):
            replace(info, **changes)
