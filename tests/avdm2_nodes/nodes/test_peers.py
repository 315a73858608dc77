"""Motion modules that others made, as students of the tiny stack, whose own modules lie elsewhere (no mid block)."""

import pytest
import torch
from diffusers import MotionAdapter

from avdm2_nodes.diffusion.unets import video_predictor
from avdm2_nodes.files.containers import write_tensors
from avdm2_nodes.files.motion import to_original_keys
from avdm2_nodes.files.peers import load_peer
from avdm2_nodes.files.student import read_student
from avdm2_nodes.files.student_unet import student_unet
from tests.avdm2_nodes.native import CLIP, chain, difference
from tests.conftest import WIDTHS

LIGHTNING, ANIMATELCM = "animatediff_lightning_2step_comfyui.safetensors", "AnimateLCM_sd15_t2v.safetensors"
LORA = "AnimateLCM_sd15_t2v_lora.safetensors"


@pytest.fixture(scope="module", autouse=True)
def peers(model_folders):
    """Both where people have them: modules with AnimateDiff's, the LoRA with the LoRAs."""
    torch.manual_seed(11)
    motion = MotionAdapter(
        block_out_channels=WIDTHS, motion_layers_per_block=1, motion_num_attention_heads=8, motion_norm_num_groups=8,
        use_motion_mid_block=True,
    )  # fmt: skip
    original = to_original_keys(motion.state_dict())
    layer, generator = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", torch.Generator().manual_seed(1)
    down, up = 0.5 * torch.randn(2, 64, generator=generator), 0.5 * torch.randn(64, 2, generator=generator)
    lora = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": torch.tensor(1.0)}
    modules = model_folders / "animatediff_models"
    write_tensors(modules / LIGHTNING, original, {})
    write_tensors(modules / ANIMATELCM, {key: t for key, t in original.items() if not key.endswith(".pe")}, {})
    write_tensors(model_folders / "loras" / LORA, lora, {})
    yield
    for path in (modules / LIGHTNING, modules / ANIMATELCM, model_folders / "loras" / LORA):
        path.unlink(missing_ok=True)


@pytest.fixture
def load(comfyui, loaded):
    return lambda name: comfyui.run("AVDM2StudentLoader", student=name, teacher=loaded.teacher)[0]


@pytest.fixture
def sample(comfyui, loaded):
    """sample(student, steps): the samples of AVDM2 Student Sampler for the common prompt."""
    common = {"positive": comfyui.prompt(loaded.clip), "seed": 9, "denoise": 1.0}
    return lambda student, steps=0: comfyui.run(
        "AVDM2StudentSampler", student=student, latent=comfyui.empty(), steps=steps, **common
    )[0]["samples"]


def test_they_are_offered_and_motion_modules_of_teachers_are_not(comfyui, model_folders):
    files = comfyui.pack("comfy_bridge.folders")
    (model_folders / "animatediff_models" / "v3_sd15_mm.ckpt").touch()
    choices = files.student_choices()
    (model_folders / "animatediff_models" / "v3_sd15_mm.ckpt").unlink()
    assert {LIGHTNING, ANIMATELCM} <= set(choices) and "v3_sd15_mm.ckpt" not in choices and len(choices) == len(set(choices))
    assert {LIGHTNING, ANIMATELCM} <= set(files.motion_choices())


@pytest.mark.parametrize("name, timesteps", [(LIGHTNING, [999, 499]), (ANIMATELCM, [999, 749, 499, 249])])
def test_clips_are_those_of_the_command_line(comfyui, loaded, load, sample, node_stack, model_folders, name, timesteps):
    student = load(name)
    clip = sample(student)
    ((text, _),) = comfyui.prompt(loaded.clip)
    read = load_peer(model_folders / "animatediff_models" / name, node_stack.image_unet, model_folders / "loras" / LORA)
    assert list(read.info.timesteps) == timesteps
    predict = video_predictor(student_unet(read, node_stack.image_unet))
    expected = chain(predict, text, clip.shape, 9, timesteps, read.info.chain)
    assert difference(clip, expected) < CLIP
    assert difference(clip, chain(predict, text, clip.shape, 9, timesteps, "renoise")) > 1e-7


def test_by_ksampler_it_is_the_same_clip(comfyui, loaded, load, sample):
    inputs = {"positive": comfyui.prompt(loaded.clip), "latent_image": comfyui.empty(), "seed": 9, "denoise": 1.0, "cfg": 1.0}
    for name, options in (
        (LIGHTNING, {"sampler_name": "euler", "scheduler": "sgm_uniform", "steps": 2}),
        (LIGHTNING, {"sampler_name": "euler", "scheduler": "simple", "steps": 2}),
        (ANIMATELCM, {"sampler_name": "lcm", "scheduler": "simple", "steps": 4}),
    ):
        student = load(name)
        (latent,) = comfyui.run("KSampler", model=student, negative=inputs["positive"], **inputs, **options)
        off = 0.05 if options["scheduler"] == "sgm_uniform" else CLIP  # whose second step is one beside
        assert difference(latent["samples"], sample(student)) <= off


def test_the_teacher_stays_as_it_was(comfyui, loaded, load, sample):
    inputs = {
        "positive": comfyui.prompt(loaded.clip),
        "latent": comfyui.empty(),
        "seed": 0,
        "steps": 2,
        "cfg": 1.0,
        "denoise": 1.0,
    }
    before = comfyui.run("AVDM2TeacherSampler", teacher=loaded.teacher, **inputs)[0]["samples"]
    sample(load(LIGHTNING))
    assert torch.equal(comfyui.run("AVDM2TeacherSampler", teacher=loaded.teacher, **inputs)[0]["samples"], before)


def test_on_a_teacher_of_the_same_modules_it_is_the_same_student(comfyui, load, sample, model_folders):
    teacher = comfyui.run("AVDM2TeacherLoader", checkpoint="tiny", motion_module=LIGHTNING)[0]
    for name in (LIGHTNING, ANIMATELCM):
        (student,) = comfyui.run("AVDM2StudentLoader", student=name, teacher=teacher)
        assert student.model is teacher.model and torch.equal(sample(load(name)), sample(student))


def test_a_saved_peer_is_a_student_that_tells_its_own_steps(comfyui, load, sample, model_folders):
    student = load(LIGHTNING)
    comfyui.run("AVDM2SaveStudent", student=student, name="kept")
    path = model_folders / "avdm2" / "kept.safetensors"
    assert read_student(path).info.chain == "euler"
    assert torch.equal(sample(load("kept.safetensors")), sample(student))
    path.unlink()


def test_animatelcm_without_its_lora_is_refused(load, model_folders):
    lora = model_folders / "loras" / LORA
    aside = lora.rename(lora.with_suffix(".aside"))
    with pytest.raises(
        ValueError, match=r"Expected AnimateLCM's LoRA, without which .* is half a student, found no .*_lora\.safetensors"
    ):
        load(ANIMATELCM)
    aside.rename(lora)


def test_no_style_is_learnt_for_another_method_s_student(comfyui, load):
    """It is told before a process is started that could not read them."""
    for name in (LIGHTNING, ANIMATELCM):
        with pytest.raises(
            RuntimeError, match=rf"Expected a student of AVDM2's own kind .* found {name}, which another method made"
        ):
            comfyui.run(
                "AVDM2StyleTraining", student=load(name), style="other of tiny", name="never", updates=1, prompts="a red circle"
            )
