import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file

from avdm2_nodes.files.containers import FileFormatError
from avdm2_nodes.files.sparse_control import read_sparse_control

from .sparse_networks import new_network, write_network


@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("prefix", ["", "module.", "controlnet.module."])
def test_a_published_file_has_diffusers_names(tmp_path, latents, prefix):
    network = new_network(latents)
    write_network(network, tmp_path / "sparse.safetensors", prefix)
    file = read_sparse_control(tmp_path / "sparse.safetensors")
    assert file.latents is latents and file.hint_channels == (5 if latents else 4)
    expected = network.state_dict()
    assert file.tensors.keys() == expected.keys()
    assert all(torch.equal(file.tensors[name], tensor) for name, tensor in expected.items())
    assert file.motion.keys() == {name for name in expected if "motion_modules" in name}


def test_positions_that_the_file_leaves_out_are_the_sinusoids(tmp_path):
    network = new_network(True)
    tensors = {name: t.clone() for name, t in network.state_dict().items() if not name.endswith(".pe")}
    save_file(tensors, tmp_path / "sparse.safetensors")
    file = read_sparse_control(tmp_path / "sparse.safetensors")
    assert all(torch.equal(file.tensors[name], tensor) for name, tensor in network.state_dict().items())


def test_a_plain_controlnet_is_refused_in_a_sentence(tmp_path):
    plain = ControlNetModel(
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1
    )
    save_file({name: t.clone() for name, t in plain.state_dict().items()}, tmp_path / "plain.safetensors")
    with pytest.raises(FileFormatError, match="found a ControlNet without motion modules; choose v3_sd15_sparsectrl_rgb"):
        read_sparse_control(tmp_path / "plain.safetensors")


def test_sizes_that_no_network_has_are_refused_before_positions_are_made_of_them(tmp_path):
    path, tensors = tmp_path / "sparse.safetensors", {n: t.clone() for n, t in new_network(True).state_dict().items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".pe")}
    norm = next(name for name in tensors if name.endswith(".norm1.weight") and ".motion_modules." in name)
    for name, tensor, said in (
        (norm, torch.zeros(5 * 10**8, 0), "no floating numbers"),
        (norm, torch.ones(33), rf"{norm} of shape \(33,\)"),
        (norm, torch.tensor(1.0), rf"{norm} of shape \(\)"),
        ("controlnet_cond_embedding.weight", torch.ones(3), r"of shape \(3,\)"),
        ("conv_in.weight", tensors["conv_in.weight"] * torch.nan, "NaN or infinite numbers"),
    ):
        save_file(tensors | {name: tensor}, path)
        with pytest.raises(FileFormatError, match=said):
            read_sparse_control(path)


def test_half_a_network_is_refused_in_a_sentence(tmp_path):
    tensors = {name: t.clone() for name, t in new_network(True).state_dict().items() if "controlnet_mid_block" not in name}
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(
        FileFormatError, match=r"Expected a whole SparseCtrl network at .*half\.safetensors, found none of controlnet_mid"
    ):
        read_sparse_control(tmp_path / "half.safetensors")
