import pytest
import torch
from diffusers import AutoencoderKL, MotionAdapter, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from avdm2_nodes.diffusion.unets import video_unet
from avdm2_nodes.files.containers import FileFormatError
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.sd15 import load_sd15_file, unet_to_original
from tests.avdm2_nodes.files.comfyui_names import comfyui_names, needs_comfyui
from tests.avdm2_nodes.files.original_layouts import SD15, TINY, original_checkpoint, original_unet, values

torch.set_num_threads(1)


UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."


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


@pytest.fixture
def path(tmp_path):
    return tmp_path / "v1-5.safetensors"


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in expected)


# ---- reading ----


def test_the_unet_is_what_diffusers_makes_of_it(tensors, loaded):
    config = {"layers_per_block": 2}  # all that the converter reads
    assert same(loaded[0].state_dict(), convert_ldm_unet_checkpoint(dict(tensors), config))
    expected = UNet2DConditionModel(
        block_out_channels=TINY["widths"], cross_attention_dim=TINY["text"], sample_size=64, attention_head_dim=8
    ).config
    said = {k: list(v) if isinstance(v, tuple) else v for k, v in loaded[0].config.items() if k != "_use_default_values"}
    assert said == {k: list(v) if isinstance(v, tuple) else v for k, v in expected.items() if k != "_use_default_values"}


def test_the_vae_is_what_diffusers_makes_of_it(tensors, loaded):
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    expected = convert_ldm_vae_checkpoint(dict(tensors), blocks)
    assert same(loaded[1].state_dict(), expected)
    theirs = AutoencoderKL(block_out_channels=TINY["vae"], layers_per_block=2, scaling_factor=0.18215, **blocks).eval()
    theirs.load_state_dict(expected)
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latent = loaded[1].encode(image).latent_dist.mode()
        assert latent.shape == (1, 4, 2, 2) and torch.equal(latent, theirs.encode(image).latent_dist.mode())
        assert torch.equal(loaded[1].decode(latent).sample, theirs.decode(latent).sample)
    assert loaded[1].config.scaling_factor == 0.18215 and loaded[1].config.block_out_channels == list(TINY["vae"])


def test_the_text_encoder_is_what_diffusers_makes_of_it(tensors, loaded):
    expected = convert_ldm_clip_checkpoint(dict(tensors))
    config = CLIPTextConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="quick_gelu",
    )
    theirs = CLIPTextModel(config).eval()
    wrapped = hasattr(theirs, "text_model")  # as diffusers asks
    theirs.load_state_dict({k if wrapped else k.removeprefix("text_model."): t for k, t in expected.items()}, strict=False)
    tokens = torch.tensor([[298, 5, 17, 299, 299], [298, 299, 299, 299, 299]])
    with torch.no_grad():
        found, wanted = loaded[2](tokens), theirs(tokens)
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state, rtol=0, atol=0)
    # The end token of a prompt, which is the first of those it is padded with.
    torch.testing.assert_close(found.pooler_output, wanted.last_hidden_state[[0, 1], [3, 1]], rtol=0, atol=0)


def test_everything_is_frozen_float32_and_in_evaluation_mode(loaded):
    for part in loaded:
        assert not part.training
        assert all(p.dtype == torch.float32 and not p.requires_grad and not p.is_meta for p in part.parameters())
        assert not any(b.is_meta for b in part.buffers())


def test_what_checkpoints_carry_beside_their_weights(tensors, loaded, path):
    half = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    rest = {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modeltime_embed0weight": torch.zeros(2),
        "alphas_cumprod": torch.ones(1000),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "cond_stage_model.logit_scale": torch.zeros(()),
        "cond_stage_model.transformer.text_model.text_projection.weight": torch.zeros(2, 2),
    }
    save_file(half | rest, path)
    unet, vae, text = load_sd15_file(path)
    torch.save({"state_dict": half | rest, "global_step": 840000}, path.with_suffix(".ckpt"))
    for part, again, whole in zip((unet, vae, text), load_sd15_file(path.with_suffix(".ckpt")), loaded, strict=True):
        assert same(part.state_dict(), {name: t.half().float() for name, t in whole.state_dict().items()})
        assert same(again.state_dict(), part.state_dict())
    assert weights_hash(unet) == weights_hash(loaded[0])  # so that a student knows its base in either precision


@pytest.mark.parametrize(
    "names", [("to_q", "to_k", "to_v", "to_out.0", "group_norm"), ("query", "key", "value", "proj_attn", "norm")]
)
def test_other_names_of_the_vaes_attention(tensors, loaded, names, path):
    renamed = {}
    for name, tensor in tensors.items():
        head, attention, tail = name.partition("attn_1.")
        if attention:
            part, _, kind = tail.rpartition(".")
            name = f"{head}attn_1.{dict(zip(('q', 'k', 'v', 'proj_out', 'norm'), names, strict=True))[part]}.{kind}"
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path)
    assert same(load_sd15_file(path)[1].state_dict(), loaded[1].state_dict())


def test_text_encoders_without_their_old_wrapper(tensors, loaded, path):
    save_file({name.replace(".text_model.", "."): t for name, t in tensors.items()}, path)
    assert same(load_sd15_file(path)[2].state_dict(), loaded[2].state_dict())


def test_the_weights_do_not_hang_on_the_file(tensors, path):
    save_file(tensors, path)
    unet, vae, text = load_sd15_file(path)
    with path.open("r+b") as file:
        file.seek(-(2**20), 2)
        file.write(b"\xff" * 2**20)
    assert all(torch.isfinite(t).all() for part in (unet, vae, text) for t in part.state_dict().values())


# ---- the UNet's names ----


def test_the_unet_in_original_names_is_that_of_the_file(tensors, loaded):
    original = {name: t for name, t in tensors.items() if name.startswith(UNET)}
    assert len(original) == 686
    assert same(unet_to_original(loaded[0].state_dict()), original)


def test_a_video_unet_gives_its_spatial_layers(tensors, loaded):
    motion = MotionAdapter(block_out_channels=TINY["widths"], motion_layers_per_block=2)
    found = unet_to_original(video_unet(loaded[0], motion).state_dict())
    assert same(found, {name: t for name, t in tensors.items() if name.startswith(UNET)})


def test_the_layout_at_full_size():
    """Keys and shapes alone, on the meta device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    found = {name: tuple(tensor.shape) for name, tensor in unet_to_original(unet.state_dict()).items()}
    assert found == {UNET + name: shape for name, shape in original_unet(SD15["widths"], SD15["text"]).items()}


@needs_comfyui
def test_comfyui_has_the_same_names(loaded, tmp_path):
    theirs = comfyui_names(tmp_path)
    for name in loaded[0].state_dict():
        assert UNET + theirs[name] in unet_to_original({name: torch.ones(1)})


# ---- what is refused ----


def test_other_files_are_refused_by_what_they_are(tensors, path):
    first = f"{UNET}input_blocks.0.0.weight"
    for changed, found in (
        (tensors | {first: torch.zeros(32, 9, 3, 3)}, "an inpainting SD1.5 checkpoint"),
        (tensors | {f"{UNET}label_emb.0.0.weight": torch.zeros(2, 2)}, "an SDXL checkpoint"),
        ({"emb_params": torch.zeros(1, 768)}, "a textual inversion"),
        ({name.removeprefix(UNET): t for name, t in tensors.items() if name.startswith(UNET)}, "an SD1.5 UNet alone"),
        ({name.removeprefix(VAE): t for name, t in tensors.items() if name.startswith(VAE)}, "a VAE"),
    ):
        save_file(changed, path)
        assert refusal(load_sd15_file, path).startswith(f"Expected an SD1.5 checkpoint at {path}, found {found}; ")


def test_parts_that_are_missing_are_named(tensors, path):
    for prefix, said in ((VAE, "Expected a VAE in"), (TEXT, "Expected a CLIP text encoder in")):
        save_file({name: t for name, t in tensors.items() if not name.startswith(prefix)}, path)
        message = refusal(load_sd15_file, path)
        assert message.startswith(said) and str(path) in message and "found none" in message


def test_damaged_parts_are_refused(tensors, path):
    attention = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    for changed, said in (
        (
            {n: t for n, t in tensors.items() if n != attention},
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        ),
        (tensors | {f"{UNET}input_blocks.1.2.extra.weight": torch.zeros(2)}, "input_blocks.1.2.extra.weight"),
        ({n: t for n, t in tensors.items() if "input_blocks.10" not in n}, "down_blocks.3.resnets.0.conv1.weight"),
        ({n: t for n, t in tensors.items() if "post_quant_conv" not in n}, "post_quant_conv.weight"),
        ({n: t for n, t in tensors.items() if "final_layer_norm" not in n}, "final_layer_norm.bias"),
        (tensors | {f"{UNET}input_blocks.1.0.out_layers.3.weight": torch.zeros(33, 33, 3, 3)}, "the UNet of SD1.5"),
    ):
        save_file(changed, path)
        message = refusal(load_sd15_file, path)
        assert said in message and str(path) in message


def test_tensors_that_are_no_weights_are_refused(tensors, path):
    """A text encoder's position numbers are whole ones and no weights; of all else a network is made only of numbers."""
    bias, ids = f"{UNET}out.2.bias", f"{TEXT}text_model.embeddings.position_ids"
    for changed, said in (
        (tensors | {bias: torch.zeros(4, dtype=torch.int8)}, "no floating numbers in 1 of its tensors (such as conv_out.bias)"),
        (
            tensors | {bias: torch.tensor([0, float("nan"), 0, 0])},
            "NaN or infinite numbers in 1 of its tensors (such as conv_out.bias)",
        ),
        (
            tensors | {f"{TEXT}text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(10**7, 0)},
            "a CLIP text encoder of SD1.5",
        ),
        (
            tensors | {f"{TEXT}text_model.embeddings.token_embedding.weight": torch.zeros(0, 40000)},
            "a CLIP text encoder of SD1.5",
        ),
        (
            tensors | {f"{TEXT}text_model.embeddings.position_embedding.weight": torch.zeros(10**8, 0)},
            "a CLIP text encoder of SD1.5",
        ),
        (tensors | {f"{TEXT}text_model.encoder.layers.{i}.x": torch.zeros(1) for i in range(20_000)}, "20000 layers"),
        (tensors | {f"{UNET}input_blocks.4.0.in_layers.2.weight": torch.zeros(2**40, 0, 3, 3)}, "the UNet of SD1.5"),
    ):
        save_file(changed, path)
        message = refusal(load_sd15_file, path)
        assert said in message and str(path) in message
    save_file({name: t for name, t in tensors.items() if name != ids}, path)
    load_sd15_file(path)
    save_file(tensors | {ids: torch.zeros(1, 77)}, path)
    (positions,) = (b for name, b in load_sd15_file(path)[2].named_buffers() if name.endswith("position_ids"))
    assert positions.tolist() == [[*range(77)]]
