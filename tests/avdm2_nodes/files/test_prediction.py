import json

import pytest
import torch
from safetensors.torch import save_file

from avdm2_nodes.files.containers import FileFormatError
from avdm2_nodes.files.sd15 import load_sd15_file
from avdm2_nodes.files.stack import StackError, load_image_unet, load_stack
from tests.avdm2_nodes.files.original_layouts import TINY, original_checkpoint, values


@pytest.fixture(scope="module")
def tensors():
    return values(original_checkpoint(**TINY))


@pytest.mark.parametrize(
    "keys, metadata, said",
    [
        (["v_pred"], {}, "the key v_pred"),
        (["ztsnr"], {}, "the key ztsnr"),
        ([], {"modelspec.prediction_type": "v"}, "modelspec.prediction_type 'v' in its metadata"),
        ([], {"modelspec.prediction_type": "sample"}, "modelspec.prediction_type 'sample'"),
        ([], {"ss_v_parameterization": "True"}, "ss_v_parameterization 'True'"),
        ([], {"ss_zero_terminal_snr": "True"}, "ss_zero_terminal_snr 'True'"),
    ],
)
def test_signs_in_a_checkpoint(tensors, tmp_path, keys, metadata, said):
    path = tmp_path / "a.safetensors"
    save_file(tensors | {key: torch.zeros(0) for key in keys}, path, metadata)
    with pytest.raises(FileFormatError, match=f"predicts noise .*{said}"):
        load_sd15_file(path)
    with pytest.raises(StackError, match="predicts noise"):
        load_stack(path, with_motion=False)


def test_signs_in_a_pickle_and_beside_it(tensors, tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": tensors | {"v_pred": torch.tensor([])}}, path)
    with pytest.raises(FileFormatError, match="the key v_pred"):
        load_sd15_file(path)
    torch.save({"state_dict": tensors}, path)
    load_sd15_file(path)
    path.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    with pytest.raises(FileFormatError, match=r"parameterization v in a\.yaml"):
        load_sd15_file(path)
    path.with_suffix(".yaml").write_text("model:\n  params:\n    parameterization: eps\n")
    load_sd15_file(path)


def test_a_checkpoint_that_says_it_predicts_noise(tensors, tmp_path):
    said = {"modelspec.prediction_type": "epsilon", "ss_v_parameterization": "False", "ss_zero_terminal_snr": "None"}
    save_file(tensors, tmp_path / "a.safetensors", said)
    load_sd15_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "config, said",
    [
        ({"prediction_type": "v_prediction"}, "prediction_type 'v_prediction'"),
        ({"prediction_type": "sample"}, "prediction_type 'sample'"),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr 'True'"),
        ([], "settings by name"),
    ],
)
def test_a_folders_scheduler(stack_folder, tmp_path, config, said):
    for part in stack_folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDIMScheduler", "prediction_type": "epsilon", "rescale_betas_zero_snr": False}))
    load_stack(tmp_path)
    file.write_text(json.dumps(config))
    for load, path in ((load_stack, tmp_path), (load_image_unet, tmp_path), (load_image_unet, tmp_path / "unet")):
        with pytest.raises(StackError, match=said):
            load(path)
