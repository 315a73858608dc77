"""ComfyUI's own SD1.5 models, at a tiny width, against ComfyUI's own network."""

import copy
import shutil

import pytest
import torch
from diffusers import AutoencoderTiny, MotionAdapter, UNet2DConditionModel

from avdm2_nodes.diffusion.unets import image_predictor
from tests.avdm2_nodes.conftest import COLOURS, SCALE
from tests.avdm2_nodes.native import CLIP, EVALUATION, difference, evaluate, random_weights

TEXT_WIDTH = 32
# What ComfyUI finds of an SD1.5 file's shape, narrower.
TINY_SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": (1, 2, 4, 4), "use_spatial_transformer": True, "legacy": False, "context_dim": TEXT_WIDTH,
    "use_linear_in_transformer": False, "adm_in_channels": None, "use_temporal_attention": False, "use_temporal_resblock": False,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def new_native(comfyui):
    """new_native(): a MODEL with ComfyUI's own tiny SD1.5 UNet."""
    import comfy.model_base
    import comfy.supported_models
    from comfy.model_patcher import ModelPatcher

    def make(kind=comfy.supported_models.SD15, model_type=comfy.model_base.ModelType.EPS, **changes):
        config = kind(TINY_SD15 | changes)
        config.set_inference_dtype(torch.float32, None)
        model = comfy.model_base.BaseModel(config, model_type)
        random_weights(model.diffusion_model)
        return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))

    return make


@pytest.fixture
def native(new_native):
    return new_native()


@pytest.fixture
def image_unet_of(comfyui):
    return comfyui.pack("comfy_bridge.native").image_unet_of


@pytest.fixture
def with_lora(comfyui):
    """with_lora(model, strength): the MODEL with a LoRA that ComfyUI has read from kohya's names, on linear layers and a convolution."""
    import comfy.lora

    def add(model, strength):
        generator = torch.Generator().manual_seed(2)
        attention = "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0"
        shapes = {
            f"{attention}_attn1_to_q": ((128,), (128,)),
            f"{attention}_attn2_to_k": ((128,), (TEXT_WIDTH,)),
            "lora_unet_mid_block_resnets_0_conv1": ((128, 1, 1), (128, 3, 3)),
            "lora_unet_down_blocks_0_attentions_1_proj_in": ((32, 1, 1), (32, 1, 1)),
        }
        lora = {}
        for name, ((out, *one), into) in shapes.items():
            lora[f"{name}.lora_up.weight"] = torch.randn(out, 2, *one, generator=generator)
            lora[f"{name}.lora_down.weight"] = 0.3 * torch.randn(2, *into, generator=generator)
            lora[f"{name}.alpha"] = torch.tensor(1.5)
        patches = comfy.lora.load_lora(lora, comfy.lora.model_lora_keys_unet(model.model, {}))
        assert len(patches) == len(shapes)
        patched = model.clone()
        assert len(patched.add_patches(patches, strength)) == len(shapes)
        return patched

    return add


@torch.no_grad()
def outputs(native_unet, unet):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 16, 8, generator=generator)
    text = torch.randn(2, 7, TEXT_WIDTH, generator=generator)
    t = torch.tensor([20, 870])
    return native_unet(x, t, context=text), unet(x, t, text, return_dict=False)[0]


def test_our_unet_is_comfyuis_own(native, image_unet_of):
    unet = image_unet_of(native)
    theirs, ours = outputs(native.model.diffusion_model, unet)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    parameters = list(unet.parameters())
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" and not p.requires_grad for p in parameters)


def test_the_users_loras_are_in_it_loaded_or_not(native, with_lora, image_unet_of, comfyui):
    import comfy.model_management as management

    plain, _ = outputs(native.model.diffusion_model, image_unet_of(native))
    with_one = with_lora(native, 0.7)
    model = with_lora(with_one, -0.2)
    before = image_unet_of(model)
    weights = {name: p.clone() for name, p in native.model.diffusion_model.named_parameters()}
    management.load_models_gpu([model])
    theirs, ours = outputs(model.model.diffusion_model, before)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (theirs - plain).abs().max() > 0.1
    while_loaded = image_unet_of(model)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), while_loaded.parameters(), strict=True))
    management.unload_all_models()
    assert all(torch.equal(p, weights[name]) for name, p in native.model.diffusion_model.named_parameters())


def test_half_precision_weights_are_read(native, image_unet_of):
    native.model.diffusion_model.half()
    unet = image_unet_of(native)
    native.model.diffusion_model.float()
    theirs, ours = outputs(native.model.diffusion_model, unet)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_models_that_are_not_sd15_are_refused(new_native, image_unet_of, comfyui):
    import comfy.model_base
    import comfy.supported_models

    wrong = {
        "found a model of ComfyUI's kind SDXL": new_native(comfy.supported_models.SDXL, num_heads=8, num_head_channels=-1),
        "found a model of ComfyUI's kind SD20": new_native(comfy.supported_models.SD20, num_heads=8, num_head_channels=-1),
        "found v prediction; AnimateDiff and its students need": new_native(model_type=comfy.model_base.ModelType.V_PREDICTION),
        "Expected an SD1.5 model of 4 input channels in my.safetensors, found 9": new_native(in_channels=9),
    }
    for words, model in wrong.items():
        with pytest.raises(ValueError, match=words):
            image_unet_of(model, "my.safetensors")


def test_nodes_refuse_them_too(new_native, comfyui, loaded, student):
    import comfy.model_base
    import comfy.supported_models

    comfyui.extras("nodes_model_advanced")
    sdxl = new_native(comfy.supported_models.SDXL, num_heads=8, num_head_channels=-1)
    image = comfyui.pack("comfy_bridge.facts").facts_of(loaded.teacher).image_model
    kinds = {"v_prediction": "v prediction", "x0": "another prediction"}
    wrong = {words: comfyui.run("ModelSamplingDiscrete", model=image, sampling=k, zsnr=False)[0] for k, words in kinds.items()}
    wrong["of zero terminal SNR"] = comfyui.run("ModelSamplingDiscrete", model=image, sampling="eps", zsnr=True)[0]
    wrong["found a model of ComfyUI's kind SDXL"] = sdxl
    for words, model in wrong.items():
        with pytest.raises(ValueError, match=rf"^Expected .*{words}; "):
            comfyui.run("AVDM2StudentLoader", student="all.safetensors", teacher=model)
        with pytest.raises(ValueError, match=rf"^Expected .*{words}; "):
            comfyui.run("AVDM2MotionModule", model=model, motion_module="miniature (bundled)")
        with pytest.raises(ValueError, match=rf"^Expected .*{words}; "):
            comfyui.run("AVDM2StyleTransfer", student=student, style="other of tiny", strength=1.0, model=model)
    (lcm,) = comfyui.run("ModelSamplingDiscrete", model=image, sampling="lcm", zsnr=False)  # predicts noise too
    comfyui.run("AVDM2StudentLoader", student="all.safetensors", teacher=lcm)


# ---- stacks ----


@pytest.mark.parametrize(
    "widths, blocks, layers",
    [((32, 64, 96), "CCD", 1), ((32, 96, 64, 64), "CCCD", 2), ((64, 96), "DC", 1), ((32, 64, 64), "CCC", 2)],
)
def test_a_stack_of_any_size_is_the_same_network(comfyui, widths, blocks, layers):
    """Also of levels that are no whole multiples of the first, of attention on the coarsest, and of other groups."""
    torch.manual_seed(2)
    kinds = {"C": "CrossAttn", "D": ""}
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=widths, layers_per_block=layers, attention_head_dim=4, cross_attention_dim=TEXT_WIDTH,
        down_block_types=[f"{kinds[b]}DownBlock2D" for b in blocks], norm_num_groups=16,
        up_block_types=[f"{kinds[b]}UpBlock2D" for b in reversed(blocks)],
    )  # fmt: skip
    native = comfyui.pack("comfy_bridge.native")
    import comfy.latent_formats

    model = native.image_model(unet, comfy.latent_formats.SD15())
    generator = torch.Generator().manual_seed(3)
    x, text = torch.randn(2, 4, 16, 8, generator=generator), torch.randn(2, 7, TEXT_WIDTH, generator=generator)
    with torch.no_grad():
        for t in (999, 20):
            expected = image_predictor(unet)(x, torch.tensor(t), text)
            assert difference(evaluate(model, x, t, text), expected) < EVALUATION
    back = native.image_unet_of(model)
    assert back.config.block_out_channels == widths and back.config.norm_num_groups == 16
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), unet.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "changes, words",
    [({"use_linear_projection": True}, "use_linear_projection"), ({"block_out_channels": (32, 48)}, "block_out_channels")],
)
def test_a_stack_of_another_kind_is_refused(comfyui, node_stack_folder, tmp_path, changes, words):
    shutil.copytree(node_stack_folder, tmp_path / "odd")
    shutil.rmtree(tmp_path / "odd" / "unet")
    shape = {
        "sample_size": 8, "block_out_channels": (32, 32), "layers_per_block": 1, "attention_head_dim": 2, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
    }  # fmt: skip
    UNet2DConditionModel(**shape | changes).save_pretrained(tmp_path / "odd" / "unet")
    with pytest.raises(
        ValueError, match=rf"image UNet of SD1.5's kind in .*odd, found another by its {words}; use an SD1.5 stack"
    ):
        comfyui.pack("comfy_bridge.native").load_native_stack(tmp_path / "odd")


def test_a_stack_copies_its_weights(comfyui, node_stack):
    native = comfyui.pack("comfy_bridge.native")
    model = native.image_model(node_stack.image_unet, native.stack_latent_format(node_stack))
    before = copy.deepcopy(node_stack.image_unet.state_dict())
    for parameter in model.model.diffusion_model.parameters():
        assert not parameter.requires_grad
        parameter.zero_()
    assert all(torch.equal(t, before[name]) for name, t in node_stack.image_unet.state_dict().items())


@pytest.fixture
def four_block_stack(native, image_unet_of, node_stack_folder, model_folders):
    """A stack whose image UNet is the native MODEL's, and one like it but for other weights there."""
    unet = image_unet_of(native)
    motion = MotionAdapter(
        block_out_channels=unet.config.block_out_channels, motion_num_attention_heads=8, use_motion_mid_block=False
    )
    for name in ("native", "other"):
        folder = model_folders / "diffusers" / name
        shutil.copytree(node_stack_folder, folder, ignore=shutil.ignore_patterns("unet", "styles", "motion_adapter"))
        if name == "other":
            random_weights(unet)
            unet.conv_out.weight.data *= 0.5
        unet.save_pretrained(folder / "unet")
        motion.save_pretrained(folder / "motion_adapter")
    yield
    for name in ("native", "other"):
        shutil.rmtree(model_folders / "diffusers" / name)


def test_a_native_model_takes_the_place_of_the_teachers_image_unet(comfyui, native, four_block_stack):
    clips, hashes, base_hash = [], [], comfyui.pack("comfy_bridge.models").base_hash
    for name, model in (("native", None), ("other", native), ("other", None)):
        inputs = {"checkpoint": name, "motion_module": "the checkpoint's own"} | ({"model": model} if model else {})
        teacher, clip, _ = comfyui.run("AVDM2TeacherLoader", **inputs)
        options = {"latent": comfyui.empty(2, 64, 64), "seed": 0, "steps": 1, "cfg": 1.0, "denoise": 1.0}
        sampled = comfyui.run("AVDM2TeacherSampler", teacher=teacher, positive=comfyui.prompt(clip), **options)[0]
        clips.append(teacher.model.process_latent_in(sampled["samples"]))  # a MODEL has its own scale
        hashes.append(base_hash(teacher))
    assert difference(clips[0], clips[1]) < CLIP and hashes[0] == hashes[1]
    assert difference(clips[0], clips[2]) > 0.1 and hashes[0] != hashes[2]


def test_motion_modules_of_another_width_are_refused(comfyui, native, model_folders):
    with pytest.raises(
        ValueError, match=r"motion module for a base of widths \[32, 64, 128, 128\], found one of widths \[32, 64\]"
    ):
        comfyui.run("AVDM2TeacherLoader", checkpoint="tiny", motion_module="the checkpoint's own", model=native)


def test_a_native_model_is_a_style(comfyui, loaded, student, image_unet_of, node_stack_folder):
    """As one by its name, of the same weights."""
    from avdm2_nodes.files.stack import load_image_unet

    unet = load_image_unet(node_stack_folder / "styles" / "other")
    native = comfyui.pack("comfy_bridge.native").image_model(unet, loaded.teacher.model.latent_format)
    options = {"positive": comfyui.prompt(loaded.clip), "seed": 0, "steps": 1, "denoise": 1.0, "latent": comfyui.empty(2)}
    clips = []
    for mode in ("guidance", "transplant"):
        for more in ({}, {"model": native}):
            inputs = {
                "student": student,
                "style": "other of tiny" if not more else "same of tiny",
                "strength": 0.5,
                "mode": mode,
            }
            (styled,) = comfyui.run("AVDM2StyleTransfer", **inputs, **more)
            clips.append(comfyui.run("AVDM2StudentSampler", student=styled, **options)[0]["samples"])
    assert torch.equal(clips[0], clips[1]) and torch.equal(clips[2], clips[3])
    plain = comfyui.run("AVDM2StudentSampler", student=student, **options)[0]["samples"]
    assert difference(clips[0], plain) > 0.01 and difference(clips[2], plain) > 0.01


def test_a_style_of_another_architecture_is_refused(comfyui, native, student):
    with pytest.raises(
        ValueError, match=r"Expected a style of the architecture that the student's base has, found \d+ layers unlike"
    ):
        comfyui.run("AVDM2StyleTransfer", student=student, style="x", strength=0.5, model=native, mode="transplant")


# ---- VAEs ----


def test_a_vae_of_a_width_that_comfyui_lacks_is_refused(comfyui):
    vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    with pytest.raises(ValueError, match=r"TAESD architecture at width 64, which ComfyUI has, found widths \[8\]"):
        comfyui.pack("comfy_bridge.native").native_vae(vae)


def test_a_stacks_vae_loads_without_a_warning(comfyui, node_stack, caplog):
    comfyui.pack("comfy_bridge.native").native_vae(node_stack.vae)
    assert not [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_the_latent_format_is_the_stacks(loaded):
    latent_format = loaded.teacher.model.latent_format
    assert latent_format.scale_factor == SCALE and latent_format.latent_channels == 4
    assert latent_format.latent_rgb_factors == COLOURS["latent_rgb_factors"]
    assert latent_format.latent_rgb_factors_bias == COLOURS["latent_rgb_factors_bias"]
