import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    FluxTransformer2DModel,
    MotionAdapter,
    SD3Transformer2DModel,
    T2IAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel, T5Config, T5EncoderModel

from avdm2_nodes.files.containers import FileFormatError, Layout
from avdm2_nodes.files.recognise import recognise, require
from tests.avdm2_nodes.files.original_layouts import SD15, original_checkpoint, original_motion, original_unet

torch.set_num_threads(1)


SAVED = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2, dtype=torch.float16)}


def refusal(function, *args):
    with pytest.raises(FileFormatError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and message.startswith("Expected") and ", found" in message
    return message


@pytest.fixture
def safetensors_file(tmp_path):
    save_file(SAVED, tmp_path / "a.safetensors", {"title": "a – b"})
    return tmp_path / "a.safetensors"


def test_recognising_loads_no_library_of_models(safetensors_file):
    code = (
        "import sys; from pathlib import Path; from avdm2_nodes.files.containers import read_layout;"
        "from avdm2_nodes.files.recognise import recognise;"
        "print(recognise(read_layout(Path(sys.argv[1]))).id, sorted({'torch', 'diffusers', 'transformers'} & sys.modules.keys()))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code, safetensors_file], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "unknown []"


# ---- what a file is ----


def state(cls, **config):
    with torch.device("meta"):
        model = cls(config.pop("config")) if "config" in config else cls(**config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


SMALL = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 4}
UNET = SMALL | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
VIDEO = {key: value for key, value in SMALL.items() if key != "attention_head_dim"} | {
    "num_attention_heads": 4,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
}
CONTROL = SMALL | {"down_block_types": UNET["down_block_types"], "conditioning_embedding_out_channels": (8, 8)}
DIT = {
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
}
SHORT = {"block_out_channels": (32, 64), "motion_layers_per_block": 1}
VISION = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
TEXT = CLIPTextConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
T5 = T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)


@pytest.mark.parametrize(
    "model, expected",
    [
        (lambda: state(UNet2DConditionModel, **UNET), ("sd15-unet", "an SD1.5 UNet in diffusers' keys")),
        (lambda: state(UNet2DConditionModel, **UNET, in_channels=9), ("sd15-inpainting-unet", "an inpainting SD1.5 UNet")),
        (lambda: state(UNet2DConditionModel, **UNET, use_linear_projection=True), ("sd2-unet", "an SD 2.x UNet")),
        (lambda: state(UNet2DConditionModel, **UNET, **XL, use_linear_projection=True), ("sdxl-unet", "an SDXL UNet")),
        (lambda: state(UNetMotionModel, **VIDEO), ("video-unet", "a whole video UNet")),
        (lambda: state(ControlNetModel, **CONTROL), ("controlnet", "a ControlNet")),
        (lambda: state(T2IAdapter, channels=[32, 32]), ("t2i-adapter", "a T2I-Adapter")),
        (lambda: state(FluxTransformer2DModel, **DIT, num_single_layers=1, axes_dims_rope=(4, 6, 6)), ("flux-unet", "a Flux")),
        (lambda: state(SD3Transformer2DModel, **DIT, caption_projection_dim=32), ("sd3-unet", "an SD3")),
        (lambda: state(AutoencoderKL, block_out_channels=(32,)), ("vae", "a VAE")),
        (lambda: state(AutoencoderTiny), ("vae", "a VAE")),
        (lambda: state(CLIPTextModel, config=TEXT), ("text-encoder", "a text encoder")),
        (lambda: state(T5EncoderModel, config=T5), ("text-encoder", "a text encoder")),
        (lambda: state(CLIPVisionModel, config=VISION), ("image-encoder", "an image encoder")),
        (lambda: state(MotionAdapter, **SHORT, motion_max_seq_length=24, use_motion_mid_block=False),
         ("motion-v1", "an AnimateDiff motion module v1")),
        (lambda: state(MotionAdapter), ("motion-v2", "an AnimateDiff motion module v2")),
        (lambda: state(MotionAdapter, **SHORT, use_motion_mid_block=False), ("motion-v3", "an AnimateDiff motion module v3")),
        (lambda: state(MotionAdapter, **SHORT | {"block_out_channels": (320, 640, 1280)}, use_motion_mid_block=False),
         ("motion-sdxl", "an SDXL motion module")),
        (lambda: state(MotionAdapter, **SHORT, conv_in_channels=9), ("motion-other", "layers that AnimateDiff has not (such as 'conv_in")),
        (lambda: original_motion(frames=24), ("motion-v1", "an AnimateDiff motion module v1")),
        (lambda: original_motion(mid=True), ("motion-v2", "an AnimateDiff motion module v2")),
        (lambda: original_motion(), ("motion-v3", "an AnimateDiff motion module v3")),
        (lambda: original_motion(mid=True, frames=None), ("motion-animatelcm", "an AnimateLCM motion module")),
        (lambda: original_motion(frames=None), ("motion-other", "without position encodings")),
        (lambda: original_motion((320, 640, 1280)), ("motion-sdxl", "an SDXL motion module")),
        (lambda: original_motion((64, 96, 96)), ("motion-v3", "an AnimateDiff motion module v3")),
        (lambda: original_checkpoint(**SD15), ("sd15", "an SD1.5 checkpoint")),
        (lambda: original_checkpoint(**SD15, inputs=9), ("sd15-inpainting", "an inpainting SD1.5 checkpoint")),
        (lambda: original_checkpoint(**SD15, inputs=8), ("sd15-edit", "an instruct-pix2pix SD1.5 checkpoint")),
        (lambda: original_unet(SD15["widths"], 768), ("sd15-unet", "an SD1.5 UNet alone")),
        (lambda: original_unet(SD15["widths"], 1024, linear=True), ("sd2-unet", "an SD 2.x UNet alone")),
    ],
)  # fmt: skip
def test_models_as_their_libraries_name_their_tensors(model, expected):
    kind = recognise(Layout(model()))
    assert kind.id == expected[0] and expected[1] in kind.phrase


def prefixed(shapes, prefix):
    return {prefix + name: shape for name, shape in shapes.items()}


SD2 = prefixed(original_unet(SD15["widths"], 1024, linear=True), "model.diffusion_model.")
ADM = {"model.diffusion_model.label_emb.0.0.weight": (1280, 2816)}


@pytest.mark.parametrize(
    "shapes, expected",
    [
        (SD2 | {"cond_stage_model.model.token_embedding.weight": (49408, 1024)}, ("sd2", "an SD 2.x checkpoint")),
        (SD2 | {"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}, ("sd2-inpainting", "an inpainting SD 2.x")),
        (SD2 | {"model.diffusion_model.input_blocks.0.0.weight": (320, 5, 3, 3)}, ("sd2-depth", "a depth SD 2.x checkpoint")),
        (SD2 | {"model.diffusion_model.input_blocks.0.0.weight": (320, 7, 3, 3)}, ("sd2-other", "a 7-channel SD 2.x")),
        (SD2 | ADM | {"conditioner.embedders.1.model.text_projection": (1280, 1280)}, ("sdxl", "an SDXL checkpoint")),
        (SD2 | ADM | {"model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight": (320,)}, ("svd", "a Stable Video")),
        ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)}, ("sd3", "an SD3 checkpoint")),
        ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (9216, 3072),
          "model.diffusion_model.single_blocks.0.linear1.weight": (21504, 3072)}, ("flux", "a Flux checkpoint")),
        ({"double_blocks.0.img_attn.qkv.weight": (9216, 3072), "single_blocks.0.linear1.weight": (21504, 3072)},
         ("flux-unet", "a Flux checkpoint")),
        ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3), "control_model.zero_convs.0.0.weight": (320, 320, 1, 1)},
         ("controlnet", "a ControlNet")),
        ({"lora_controlnet": (0,), "input_blocks.1.1.transformer_blocks.0.attn1.to_q.up": (320, 128),
          "input_hint_block.0.weight": (16, 3, 3, 3)}, ("controlnet", "a ControlNet")),
        ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), **original_motion()}, ("controlnet", "a ControlNet")),
        ({"image_proj.proj.weight": (3072, 1024), "ip_adapter.1.to_k_ip.weight": (320, 768)}, ("ip-adapter", "an IP-Adapter")),
        ({"encoder.conv_in.weight": (128, 3, 3, 3), "decoder.conv_in.weight": (512, 4, 3, 3)}, ("vae", "a VAE")),
        ({"emb_params": (4, 768)}, ("textual-inversion", "a textual inversion")),
        ({"string_to_param.*": (2, 768)}, ("textual-inversion", "a textual inversion")),
        ({"<my-style>": (768,)}, ("textual-inversion", "a textual inversion")),
        ({"clip_g": (4, 1280), "clip_l": (4, 768)}, ("textual-inversion", "a textual inversion")),
        ({"encoder.conv1.weight": (96, 3, 3, 3, 3), "odd\nname": (1,)}, ("unknown", r"keys such as 'encoder.conv1.weight', 'odd\nname'")),
        ({}, ("unknown", "a file without tensors")),
    ],
)  # fmt: skip
def test_other_files_by_the_names_they_are_known_by(shapes, expected):
    kind = recognise(Layout(shapes))
    assert kind.id == expected[0] and expected[1] in kind.phrase and "\n" not in kind.phrase


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
MODULE = "down_blocks.0.motion_modules.0"


@pytest.mark.parametrize(
    "down, up, alpha, expected",
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
         "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight",
         "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.alpha", ("lora", "an SD LoRA (kohya keys)")),
        (f"unet.{ATTENTION}.processor.to_k_lora.down.weight", f"unet.{ATTENTION}.processor.to_k_lora.up.weight", None,
         ("lora", "an SD LoRA (diffusers keys)")),
        (f"base_model.model.{ATTENTION}.to_k.lora_A.weight", f"base_model.model.{ATTENTION}.to_k.lora_B.weight", None,
         ("lora", "an SD LoRA (peft keys)")),
        (f"unet.{ATTENTION}.to_k.lora_A.weight", f"unet.{ATTENTION}.to_k.lora_B.weight", None, ("lora", "an SD LoRA (peft keys)")),
        (f"{MODULE}.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.to_q_lora.down.weight",
         f"{MODULE}.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.to_q_lora.up.weight", None,
         ("motion-lora", "a motion LoRA")),
        (f"unet.{MODULE}.transformer_blocks.0.attn1.to_q.lora_A.weight", f"unet.{MODULE}.transformer_blocks.0.attn1.to_q.lora_B.weight",
         None, ("motion-lora", "a motion LoRA")),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", None,
         ("lora-other", "a LoRA of another family")),
    ],
)  # fmt: skip
def test_loras(down, up, alpha, expected):
    shapes = {down: (4, 768), up: (320, 4)} | ({alpha: ()} if alpha else {})
    kind = recognise(Layout(shapes))
    assert (kind.id, kind.phrase) == expected or (kind.id == expected[0] and kind.phrase.startswith(expected[1]))
    if kind.id == "lora":
        assert recognise(Layout(shapes | {down: (4, 2048)})).phrase.startswith("an SDXL LoRA")


def test_loras_of_other_families_and_of_text_alone():
    for name, expected in (
        ("lora_unet_blocks_0_self_attn_q", "lora-other"),
        ("diffusion_model.blocks.0.cross_attn.k", "lora-other"),
        ("transformer.transformer_blocks.0.attn1.to_q", "lora-other"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora"),
        ("lora_unet_input_blocks_4_1_proj_in", "lora"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "lora-sdxl"),
    ):
        assert recognise(Layout({f"{name}.lora_down.weight": (4, 64), f"{name}.lora_up.weight": (64, 4)})).id == expected


@pytest.mark.parametrize("shape", [(), (0,), (1,) * 5])
def test_shapes_that_no_model_has_are_recognised_or_unknown(shape):
    names = [*original_checkpoint(**SD15), *original_motion(mid=True), "clip_l", "lora_unet_attn2_to_k.lora_down.weight"]
    for chosen in (names, names[:5], *([name] for name in names[::97])):
        assert recognise(Layout(dict.fromkeys(chosen, shape))).phrase


def test_a_student_is_told_by_its_metadata():
    assert recognise(Layout(original_motion(), {"avdm2.format_version": "1"})).id == "student"
    lora = {"mid_block.attentions.0.proj_in.lora_A.weight": (4, 320)}
    assert recognise(Layout(lora, {"avdm2.style_version": "1"})).id == "style" and recognise(Layout(lora)).id == "lora"
    assert recognise(Layout(original_motion(), {"modelspec.title": "x"})).id == "motion-v3"


def test_require(tmp_path):
    save_file({"emb_params": torch.ones(1, 768)}, tmp_path / "a.safetensors")
    assert require(tmp_path / "a.safetensors", ("textual-inversion",), "an embedding").id == "textual-inversion"
    message = refusal(require, tmp_path / "a.safetensors", ("motion-v2", "motion-v3"), "an AnimateDiff motion module")
    assert message == (
        f"Expected an AnimateDiff motion module at {tmp_path / 'a.safetensors'}, found a textual inversion; choose another file."
    )
