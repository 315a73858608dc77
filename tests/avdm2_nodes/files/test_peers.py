import os
import re

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    EulerDiscreteScheduler,
    LCMScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from safetensors.torch import save_file

from avdm2_nodes.diffusion.samplers import draw_noise, sample_student, student_timesteps
from avdm2_nodes.diffusion.unets import video_predictor
from avdm2_nodes.files.containers import FileFormatError, write_tensors
from avdm2_nodes.files.lora import load_lora_file
from avdm2_nodes.files.motion import to_original_keys
from avdm2_nodes.files.peers import is_peer, load_peer
from avdm2_nodes.files.student import read_student, write_student
from avdm2_nodes.files.student_info import StudentFileError
from avdm2_nodes.files.student_unet import student_unet
from tests.conftest import WIDTHS

BETAS = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}
LIGHTNING, ANIMATELCM = "animatediff_lightning_4step_comfyui.safetensors", "AnimateLCM_sd15_t2v.ckpt"
LORA = "AnimateLCM_sd15_t2v_lora.safetensors"
# Layers of every kind: module, rank, alpha (None: not in the file), which are not the same in all.
LAYERS = [
    ("down_blocks.0.resnets.0.conv1", 4, 2.0),
    ("down_blocks.1.attentions.0.proj_in", 4, 2.0),
    ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 2, None),
    ("up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj", 4, 8.0),
    ("up_blocks.2.resnets.0.time_emb_proj", 3, 1.0),
]


def new_motion(frames):
    torch.manual_seed(frames)
    return MotionAdapter(
        block_out_channels=WIDTHS, motion_layers_per_block=1, motion_num_attention_heads=8, motion_norm_num_groups=8,
        motion_max_seq_length=frames, use_motion_mid_block=True,
    )  # fmt: skip


def new_lora(unet):
    generator, tensors = torch.Generator().manual_seed(2), {}
    for module, rank, alpha in LAYERS:
        weight, name = unet.get_parameter(f"{module}.weight"), "lora_unet_" + module.replace(".", "_")
        ones = (1,) * (weight.ndim - 2)
        tensors[f"{name}.lora_down.weight"] = 0.3 * torch.randn(rank, *weight.shape[1:], generator=generator)
        tensors[f"{name}.lora_up.weight"] = 0.3 * torch.randn(weight.shape[0], rank, *ones, generator=generator)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.fixture(scope="module")
def adapters():
    """Lightning's motion modules and AnimateLCM's, as diffusers has them."""
    return {LIGHTNING: new_motion(32), ANIMATELCM: new_motion(64)}


@pytest.fixture
def folder(stack, adapters, tmp_path):
    """Their files as they are published: original names, one .safetensors and one pickle, AnimateLCM without position encodings."""
    write_tensors(tmp_path / LIGHTNING, to_original_keys(adapters[LIGHTNING].state_dict()), {})
    lcm = {key: t for key, t in to_original_keys(adapters[ANIMATELCM].state_dict()).items() if not key.endswith(".pe")}
    torch.save(lcm, tmp_path / ANIMATELCM)
    save_file(new_lora(stack.image_unet), tmp_path / LORA)
    return tmp_path


@pytest.fixture
def architecture(stack):
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(stack.image_unet.config)


def refusal(*args):
    with pytest.raises(FileFormatError) as caught:
        load_peer(*args)
    message = str(caught.value)
    assert message.startswith("Expected") and message.endswith(".") and "\n" not in message
    return message


# ---- against diffusers ----


@pytest.mark.parametrize("name", [LIGHTNING, ANIMATELCM])
def test_a_peer_is_what_diffusers_makes_of_it(stack, adapters, folder, name, monkeypatch):
    """Whole clips of diffusers' pipeline with its own schedulers and its own LoRA loader, from the same noise."""
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda shape, generator, **_: draw_noise(shape, generator)
    )
    if name == LIGHTNING:
        scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    else:
        scheduler = LCMScheduler(**BETAS, original_inference_steps=100)
    unet = UNetMotionModel.from_unet2d(stack.image_unet, adapters[name])
    pipeline = AnimateDiffPipeline(stack.vae, stack.text_encoder, stack.tokenizer, unet, None, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    if name == ANIMATELCM:
        pipeline.load_lora_weights(str(folder / LORA))
    prompt = "a small red circle standing still on a plain background"
    noise = draw_noise((1, 4, 5, 8, 8), torch.Generator().manual_seed(1))
    scheduler.set_timesteps(4)
    # diffusers starts Euler's chain at sigma times the noise, ComfyUI and this project at sqrt(1 + sigma^2): 0.08% more.
    start = noise * (1 + scheduler.sigmas[0] ** -2).sqrt() if name == LIGHTNING else noise
    theirs = pipeline(
        prompt, num_frames=5, height=64, width=64, num_inference_steps=4, guidance_scale=1.0, latents=start,
        generator=torch.Generator().manual_seed(7), output_type="latent",
    ).frames  # fmt: skip

    student = load_peer(folder / name, stack.image_unet)
    predict = video_predictor(student_unet(student, stack.image_unet))
    generator, info = torch.Generator().manual_seed(7), student.info
    with torch.no_grad():
        ours = sample_student(predict, noise, stack.encode_text([prompt]), info.timesteps, generator, chain=info.chain)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3 * theirs.std().item())


# ---- what it is ----


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "name", ["animatediff_lightning_{}step_comfyui.safetensors", "animatediff_lightning_{}step_diffusers.safetensors"]
)
def test_lightnings_steps_are_in_its_name(folder, architecture, name, steps):
    path = (folder / LIGHTNING).rename(folder / name.format(steps))
    info = load_peer(path, architecture).info
    assert len(info.timesteps) == steps and info.timesteps[0] == 999 and info.timesteps[-1] == 1000 // steps - 1
    assert info.chain == "euler" and info.holds == "motion"


def test_animatelcms_steps_are_of_its_own_scheduler(folder, architecture):
    info = load_peer(folder / ANIMATELCM, architecture).info
    assert (info.timesteps, info.chain, info.holds) == ((999, 749, 499, 249), "lcm", "motion+lora")
    assert student_timesteps(info.timesteps, 6, info.chain) == [
        999,
        839,
        669,
        499,
        339,
        169,
    ]  # LCMScheduler's, 100 original steps
    assert student_timesteps(info.timesteps, 6) == [999, 832, 666, 499, 332, 166]


def test_other_ranks_and_alphas_are_merged_exactly(stack, folder):
    student = load_peer(folder / ANIMATELCM, stack.image_unet)
    assert {len(t) for key, t in student.tensors.items() if "lora_A" in key} == {4}
    merged, lora = student_unet(student, stack.image_unet), new_lora(stack.image_unet)
    for module, rank, alpha in LAYERS:
        name, before = "lora_unet_" + module.replace(".", "_"), stack.image_unet.get_parameter(f"{module}.weight")
        up, down = (lora[f"{name}.lora_{part}.weight"].flatten(1) for part in ("up", "down"))
        change = (rank if alpha is None else alpha) / rank * (up @ down).view_as(before)
        torch.testing.assert_close(merged.get_parameter(f"{module}.weight"), before + change)
        assert change.abs().max() > 1e-3


def test_a_peer_runs_on_any_base_of_its_shape_and_can_be_saved(stack, folder, make_image_unet, tmp_path):
    student = load_peer(folder / ANIMATELCM, stack.image_unet)
    write_student(tmp_path / "saved.safetensors", student.tensors, student.info)
    again = read_student(tmp_path / "saved.safetensors")
    assert again.info == student.info
    other = make_image_unet()
    expected, found = (student_unet(s, other).state_dict() for s in (student, again))
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert "sampler lcm." in student.info.to_metadata()["modelspec.usage_hint"]
    with pytest.raises(StudentFileError, match="another architecture"):
        student_unet(student, make_image_unet((32, 64, 64)))


def test_motion_modules_may_be_peers_and_others_not(folder, stack_folder, tmp_path):
    assert is_peer(folder / LIGHTNING) and is_peer(folder / ANIMATELCM)
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04")
    for path in (folder / LORA, tmp_path / "none.safetensors", tmp_path, tmp_path / "broken.ckpt"):
        assert not is_peer(path)


# ---- refusals ----


def test_files_that_are_no_peers_are_refused(folder, architecture, make_motion, tmp_path):
    plain = (folder / LIGHTNING).rename(folder / "mm_sd_v15_v2.safetensors")
    message = refusal(plain, architecture)
    assert "number of steps in the name of mm_sd_v15_v2.safetensors" in message and "teacher" in message
    assert "0step" in refusal(plain.rename(folder / "lightning_0step.safetensors"), architecture)
    write_tensors(tmp_path / "v3_4step.safetensors", to_original_keys(make_motion().state_dict()), {})
    assert "found an AnimateDiff motion module v3" in refusal(tmp_path / "v3_4step.safetensors", architecture)


def test_a_base_of_other_widths_is_refused(folder, make_image_unet):
    with pytest.raises(ValueError, match=re.escape("widths (32, 64, 64), found one for (32, 32, 64)")):
        load_peer(folder / LIGHTNING, make_image_unet((32, 64, 64)))


def test_half_of_animatelcm_is_refused(stack, folder, architecture):
    elsewhere = (folder / LORA).rename(folder / "elsewhere.safetensors")
    assert f"half a student, found no {folder / LORA}" in refusal(folder / ANIMATELCM, architecture)
    assert load_peer(folder / ANIMATELCM, architecture, elsewhere).info.lora_rank == 4
    save_file(new_lora(stack.image_unet) | {"lora_te_text_model_layers_0.lora_down.weight": torch.ones(2, 3)}, folder / LORA)
    assert "found 1 others (such as lora_te_text_model_layers_0.lora_down.weight)" in refusal(folder / ANIMATELCM, architecture)
    (folder / LORA).write_bytes((folder / LIGHTNING).read_bytes())
    assert "Expected a LoRA for SD1.5" in refusal(folder / ANIMATELCM, architecture)


def test_a_lora_file_is_read_as_it_was_written(stack, folder):
    weights = {name: p.shape for name, p in stack.image_unet.named_parameters()}
    layers = load_lora_file(folder / LORA, weights)
    assert {module: (len(down), alpha) for module, (down, _, alpha) in layers.items()} == {
        module: (rank, float(rank) if alpha is None else alpha) for module, rank, alpha in LAYERS
    }
    with pytest.raises(FileFormatError, match=r"found 10 others \(such as lora_unet_down_blocks_0"):
        load_lora_file(folder / LORA, {"conv_in.weight": (32, 4, 3, 3)})


@pytest.mark.parametrize(
    "name, change",
    [
        ("lora_down.weight", lambda t: t[:, :8]),
        ("lora_down.weight", lambda t: torch.ones(3, *t.shape[1:])),
        ("lora_down.weight", lambda t: t.flatten()),
        ("lora_down.weight", lambda t: torch.tensor(1.0)),
        ("lora_up.weight", lambda t: t[:8]),
        ("lora_up.weight", lambda t: t.flatten()),
        ("alpha", lambda t: torch.ones(2)),
        ("alpha", lambda t: torch.ones(0)),
        ("alpha", lambda t: torch.tensor(float("nan"))),
    ],
)
def test_a_lora_of_other_sizes_is_refused(stack, folder, architecture, name, change):
    tensors, key = new_lora(stack.image_unet), f"lora_unet_{LAYERS[1][0].replace('.', '_')}"
    tensors[f"{key}.{name}"] = change(tensors[f"{key}.{name}"]).contiguous()
    save_file(tensors, folder / LORA)
    assert f"found 1 of other widths, ranks or alphas (such as {key})" in refusal(folder / ANIMATELCM, architecture)


def test_a_lora_without_bytes_or_numbers_is_refused(stack, folder, architecture):
    key = f"lora_unet_{LAYERS[1][0].replace('.', '_')}.lora_down.weight"
    for tensor, said in (
        (torch.zeros(10**9, 0), "no floating numbers"),
        (torch.ones(4, 32, dtype=torch.int8), "no floating numbers"),
        (torch.full((4, 32, 1, 1), float("inf")), "NaN or infinite numbers"),
    ):
        save_file(new_lora(stack.image_unet) | {key: tensor}, folder / LORA)
        assert said in refusal(folder / ANIMATELCM, architecture)


def test_an_alpha_that_is_a_whole_number(stack, folder, architecture):
    """Some trainers save it so."""
    key = f"lora_unet_{LAYERS[0][0].replace('.', '_')}.alpha"
    save_file(new_lora(stack.image_unet), folder / LORA)
    expected = load_peer(folder / ANIMATELCM, architecture).tensors
    save_file(new_lora(stack.image_unet) | {key: torch.tensor(2)}, folder / LORA)
    found = load_peer(folder / ANIMATELCM, architecture).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_names_that_are_no_text_and_too_few_positions(folder, architecture):
    path = (folder / LIGHTNING).rename(folder / os.fsdecode(b"lightning_\xff_4step.safetensors"))
    assert load_peer(path, architecture).info.title == r"lightning_\udcff_4step"
    write_tensors(path, to_original_keys(new_motion(8).state_dict()), {})
    assert "found 8 position encodings" in refusal(path, architecture)


def test_steps_that_no_schedule_has_are_refused(folder, architecture):
    path = (folder / LIGHTNING).rename(folder / "lightning_2000step.safetensors")
    assert "1 to 1000" in refusal(path, architecture)
