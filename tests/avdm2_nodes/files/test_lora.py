import copy

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from avdm2_nodes.files.containers import FileFormatError, read_layout
from avdm2_nodes.files.lora import export_lora_file, lora_keys, lora_layers
from avdm2_nodes.files.recognise import recognise
from avdm2_nodes.files.sd15 import load_sd15_file
from tests.avdm2_nodes.files.comfyui_names import comfyui_names, needs_comfyui
from tests.avdm2_nodes.files.original_layouts import TINY, original_checkpoint, values
from training.method.adapters import Adapters

torch.set_num_threads(1)


def refusal(function, *args, **options):
    with pytest.raises(FileFormatError) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and message.startswith("Expected")
    return message


@pytest.fixture(scope="module")
def tensors():
    return values(original_checkpoint(**TINY))


@pytest.fixture(scope="module")
def loaded(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("sd15") / "tiny.safetensors"
    save_file(tensors, path)
    return load_sd15_file(path)


RANK, ALPHA = 3, 6.0


@pytest.fixture(scope="module")
def lora(loaded):
    """LoRA tensors as a student file has them, on every layer that the training puts them on, none of them zero."""
    weights = Adapters().add(copy.deepcopy(loaded[0]), "student", RANK, 0)
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(p.shape, generator=generator) * 0.05 for name, p in weights.items()}


@pytest.fixture(scope="module")
def lora_file(lora, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "student_lora.safetensors"
    export_lora_file(path, lora_layers(lora, ALPHA), {"ss_network_dim": str(RANK)}, torch.float32)
    return path


def test_a_lora_file_is_read_by_diffusers_and_merges_to_the_student(loaded, lora, lora_file):
    base, unet = loaded[0], copy.deepcopy(loaded[0])
    pipeline = StableDiffusionPipeline(
        loaded[1], loaded[2], None, unet, DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.load_lora_weights(lora_file.parent, weight_name=lora_file.name)
    x, words = torch.randn(2, 4, 8, 8), torch.randn(2, 5, TINY["text"])
    with torch.no_grad():
        by_layers = unet(x, torch.tensor([500, 20]), words).sample
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        fused = unet(x, torch.tensor([500, 20]), words).sample
        bare = base(x, torch.tensor([500, 20]), words).sample
    torch.testing.assert_close(by_layers, fused, rtol=1e-4, atol=1e-4)
    assert (fused - bare).abs().max() > 0.1

    expected = base.state_dict()
    modules = [name.removesuffix(".lora_A.weight") for name in lora if ".lora_A." in name]
    assert len(modules) > 200
    for module in modules:  # W + alpha / rank B A, as the student that has them
        down, up = lora[f"{module}.lora_A.weight"], lora[f"{module}.lora_B.weight"]
        added = ALPHA / RANK * torch.einsum("or...,r...->o...", up.flatten(1), down)
        expected[f"{module}.weight"] = expected[f"{module}.weight"] + added
    found = unet.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def test_what_a_lora_file_holds(lora, lora_file, tmp_path):
    with safe_open(lora_file, "pt") as file:
        assert file.metadata() == {"ss_network_dim": str(RANK)}
    assert recognise(read_layout(lora_file)).phrase == "an SD LoRA (kohya keys)"
    found = load_file(lora_file)
    conv, linear = (
        "lora_unet_mid_block_resnets_0_conv1",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0",
    )
    assert found[f"{conv}.lora_down.weight"].shape == (RANK, 96, 3, 3)
    assert found[f"{conv}.lora_up.weight"].shape == (96, RANK, 1, 1)
    assert found[f"{linear}.lora_down.weight"].shape == (RANK, 32) and found[f"{linear}.lora_up.weight"].shape == (32, RANK)
    assert found[f"{conv}.alpha"].shape == () and found[f"{conv}.alpha"].item() == ALPHA
    assert len(found) == 3 * len(lora_layers(lora, 1.0))
    export_lora_file(tmp_path / "half.safetensors", lora_layers(lora, ALPHA), {})
    half = load_file(tmp_path / "half.safetensors")
    assert half.keys() == found.keys() and all(torch.equal(half[name].float(), t.half().float()) for name, t in found.items())


@needs_comfyui
def test_comfyui_knows_every_layer_of_a_lora_file(lora, tmp_path):
    theirs = {"lora_unet_" + name.removesuffix(".weight").replace(".", "_") for name in comfyui_names(tmp_path)}
    assert {name.split(".")[0] for name in lora_keys(lora_layers(lora, ALPHA))} <= theirs


def test_no_layers_are_no_file(lora, tmp_path):
    motion = {"down_blocks.0.motion_modules.0.proj_in.weight": torch.ones(2, 2)}
    assert "found none" in refusal(export_lora_file, tmp_path / "a.safetensors", lora_layers(motion, 1.0), {})
    assert "make room" in refusal(export_lora_file, tmp_path / "no" / "a.safetensors", lora_layers(lora, 1.0), {})
