import ast
import copy
import gzip
import importlib.machinery
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, MotionAdapter, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from avdm2_nodes.diffusion.unets import video_unet
from avdm2_nodes.files.clip import clip_tokenizer
from avdm2_nodes.files.containers import FileFormatError, read_layout
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.lora import export_lora_file, lora_keys, lora_layers
from avdm2_nodes.files.recognise import recognise
from avdm2_nodes.files.sd15 import load_sd15_file, unet_to_original
from tests.avdm2_nodes.diffusion.original_layouts import SD15, TINY, original_checkpoint, original_unet, values
from training.method.adapters import Adapters

torch.set_num_threads(1)

COMFYUI = os.environ.get("COMFYUI_DIR")
needs_comfyui = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_DIR names no checkout of ComfyUI to compare with")
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


def comfyui_names(folder):
    """diffusers' names -> original, by ComfyUI's own function, which alone is imported, from a file in `folder`."""
    tree = ast.parse((Path(COMFYUI) / "comfy" / "utils.py").read_text(encoding="utf-8"))
    wanted = {"UNET_MAP_ATTENTIONS", "TRANSFORMER_BLOCKS", "UNET_MAP_RESNET", "UNET_MAP_BASIC", "unet_to_diffusers"}
    body = [n for n in tree.body if getattr(n, "name", getattr(getattr(n, "targets", [None])[0], "id", None)) in wanted]
    file = folder / "comfyui_names.py"
    file.write_text(ast.unparse(ast.Module(body, [])), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layers = {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth_middle": 1}
    depths = {"transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3}
    return module.unet_to_diffusers(layers | depths)


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


# ---- LoRA ----

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


# ---- the tokenizer ----


def packed_vocabulary(folder, merges):
    """The package open_clip, as far as a tokenizer needs it: a title, then merges by rank, more of them than CLIP took."""
    folder.mkdir()
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *(f"{a} {b}" for a, b in merges), "zz zz", "yy yy</w>", ""]
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "__init__.py").write_text("raise ImportError('the package must be found, never imported')")


@pytest.fixture(scope="session")
def merges():
    """As many merges as CLIP has, in an order in which each has what it merges: letters, then pairs with a letter."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(a, b + end) for end in ("", "</w>") for a in letters for b in letters]
    words = [(a + b, c + end) for end in ("</w>", "") for a in letters for b in letters for c in letters]
    longer = [(a + b + c, d + "</w>") for a in letters for b in letters for c in letters for d in letters]
    found = list(dict.fromkeys(pairs + words + longer))[:48894]
    assert len(found) == 48894
    return found


@pytest.fixture
def open_clip(tmp_path, merges, monkeypatch):
    packed_vocabulary(tmp_path / "open_clip", merges)
    place = importlib.machinery.PathFinder.find_spec("open_clip", [str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: place if name == "open_clip" else None)
    return tmp_path / "open_clip"


def test_the_tokenizer_from_the_package(open_clip):
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)
    # 256 bytes, 256 bytes at a word's end, then the merges: "ab" is the 2nd, "ab</w>" the 26 * 26 + 2nd.
    assert tokenizer.convert_tokens_to_ids(["!", "!</w>", "ab", "ab</w>"]) == [0, 256, 512 + 1, 512 + 26 * 26 + 1]
    ids = tokenizer(["AB", "a" * 400], padding="max_length", truncation=True).input_ids
    assert ids[0] == [49406, 512 + 26 * 26 + 1] + [49407] * 75
    assert len(ids[1]) == 77 and ids[1][-1] == 49407


def test_the_tokenizer_from_a_folder(open_clip, tmp_path):
    folder = tmp_path / "tokenizer"
    clip_tokenizer().save_pretrained(folder)
    packed = clip_tokenizer()
    files = {name for name in os.listdir(folder) if name not in ("vocab.json", "merges.txt")}
    for name in files:
        (folder / name).unlink()
    if not (folder / "vocab.json").exists():  # transformers 5 saves one file of its own
        tokens = packed.get_vocab()
        (folder / "vocab.json").write_text(json.dumps(tokens))
        with gzip.open(open_clip / "bpe_simple_vocab_16e6.txt.gz", "rt") as file:
            lines = file.read().split("\n")[1:48895]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": "!", "model_max_length": 8192})
    )  # as SD 2.x' and ComfyUI's
    found = clip_tokenizer(folder)
    text = ["a small cat", "ünïcode 12 <|endoftext|>", ""]
    assert found(text, padding="max_length").input_ids == packed(text, padding="max_length").input_ids


@needs_comfyui
def test_the_vocabulary_is_clips_own(tmp_path, monkeypatch):
    folder = Path(COMFYUI) / "comfy" / "sd1_tokenizer"
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:48895]
    packed_vocabulary(tmp_path / "open_clip", [line.split(" ") for line in lines])
    place = importlib.machinery.PathFinder.find_spec("open_clip", [str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: place)
    found = clip_tokenizer()
    assert found.get_vocab() == json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert found("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert clip_tokenizer(folder)("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_no_vocabulary(tmp_path, monkeypatch, stack_folder, open_clip):
    assert "49408 tokens" in refusal(clip_tokenizer, stack_folder / "tokenizer")  # of the miniature's kind
    assert "found no vocab.json" in refusal(clip_tokenizer, tmp_path / "gone")
    (tmp_path / "vocab.json").write_text("{")
    assert "found no merges.txt" in refusal(clip_tokenizer, tmp_path)
    (tmp_path / "merges.txt").write_text("")
    assert str(tmp_path) in refusal(clip_tokenizer, tmp_path)
    (open_clip / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(b"title\na b\n"))
    assert "49408 tokens" in refusal(clip_tokenizer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install open_clip_torch" in refusal(clip_tokenizer)
