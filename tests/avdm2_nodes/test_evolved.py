"""An exported student of SD1.5's size in ComfyUI-AnimateDiff-Evolved with core's nodes: 10 GB of memory, 5 GB of disk.

Runs where ANIMATEDIFF_EVOLVED_DIR names a checkout of that pack, beside COMFYUI_DIR.
"""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from safetensors.torch import load_file, save_file

from avdm2_nodes.diffusion.samplers import draw_noise, sample_student
from avdm2_nodes.diffusion.unets import video_predictor
from avdm2_nodes.files.architecture import unet_config
from avdm2_nodes.files.interchange import export_animatediff
from avdm2_nodes.files.motion import to_diffusers_keys
from avdm2_nodes.files.stack import load_image_unet
from avdm2_nodes.files.student import read_student, write_student
from avdm2_nodes.files.student_info import ANY_BASE, StudentInfo
from avdm2_nodes.files.student_unet import student_unet
from tests.avdm2_nodes.conftest import ROOT
from tests.avdm2_nodes.diffusion.per_frame import FrameNorm
from tests.avdm2_nodes.files.original_layouts import SD15, original_checkpoint, original_motion, values

pytestmark = pytest.mark.slow

CHECKPOINT, TIMESTEPS, FRAMES, SEED, SCALE = "random.safetensors", (999, 749, 499, 249), 4, 7, 0.18215
LAYERS = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "up_blocks.1.resnets.0.conv1"


@pytest.fixture(scope="module")
def evolved(comfyui):
    """The other pack in this ComfyUI."""
    named = os.environ.get("ANIMATEDIFF_EVOLVED_DIR")
    if not named or not (Path(named) / "animatediff").is_dir():
        pytest.skip("needs ANIMATEDIFF_EVOLVED_DIR, a checkout of ComfyUI-AnimateDiff-Evolved")
    link = comfyui.base / "custom_nodes" / "AnimateDiff-Evolved"
    link.symlink_to(Path(named).resolve(), target_is_directory=True)
    assert asyncio.run(comfyui.nodes.load_custom_node(str(link)))
    return comfyui


@pytest.fixture
def files(evolved, tmp_path):
    """(checkpoint, student file): random weights, the student's motion modules and LoRA also as AnimateDiff's files."""
    models = evolved.base / "models"
    checkpoint, path = models / "checkpoints" / CHECKPOINT, tmp_path / "student.safetensors"
    save_file(values(original_checkpoint(**SD15), dtype=torch.float16), checkpoint)
    tensors = to_diffusers_keys(values(original_motion(), seed=1, dtype=torch.float16))
    with torch.device("meta"):
        base = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        motion = MotionAdapter(motion_max_seq_length=32, use_motion_mid_block=False)
        shell = UNetMotionModel.from_unet2d(base, motion, load_weights=False)
    generator = torch.Generator().manual_seed(2)
    for layer in LAYERS:
        out, *into = base.get_parameter(f"{layer}.weight").shape
        tensors[f"{layer}.lora_A.weight"] = (0.05 * torch.randn(4, *into, generator=generator)).half()
        tensors[f"{layer}.lora_B.weight"] = (0.05 * torch.randn(out, 4, *(1 for _ in into[1:]), generator=generator)).half()
    info = StudentInfo(
        holds="motion+lora", timesteps=TIMESTEPS, frames=16, height=64, width=64, unet_config=unet_config(shell), base_name="random",
        base_hash=ANY_BASE, lora_rank=4, lora_alpha=8.0, updates=0, training_config="", title="random", date="2026-01-31",
        license="none",
    )  # fmt: skip
    write_student(path, tensors, info)
    paths = export_animatediff(read_student(path), models / "animatediff_models", "exported", models / "loras")
    yield checkpoint, path
    for path in (*paths, checkpoint):
        path.unlink()


def text():
    return torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def our_clips(checkpoint, student, out):
    """Writes our clips (1, 4, F, 8, 8) of the student in its file, by both normalisations."""
    torch.set_num_threads(1)
    base = torch.nn.Module.half(load_image_unet(checkpoint))  # as it is in the file: exact
    unet, clips = student_unet(read_student(student), base), {}
    del base
    for how in ("across frames", "per frame"):
        if how == "per frame":
            for module in unet.modules():
                if isinstance(module, AnimateDiffTransformer3D):
                    module.norm.__class__ = FrameNorm
        noise = draw_noise((1, 4, FRAMES, 8, 8), torch.Generator().manual_seed(SEED))
        generator = torch.Generator().manual_seed(SEED + 1)  # which ComfyUI's samplers draw from on a CPU
        clips[how] = sample_student(video_predictor(unet), noise, text(), TIMESTEPS, generator)
    save_file(clips, out)


def test_their_clip_is_ours_with_their_normalisation(evolved, files, tmp_path, record_property):
    # Ours in a process of its own, which gives all its memory back.
    code = "import sys; from tests.avdm2_nodes.test_evolved import our_clips; our_clips(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, files), str(tmp_path / "clips.safetensors")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    ours = load_file(tmp_path / "clips.safetensors")

    run = evolved.run
    model, _, _ = run("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    (model,) = run("LoraLoaderModelOnly", model=model, lora_name="exported_lora.safetensors", strength_model=1.0)
    (motion,) = run("ADE_LoadAnimateDiffModel", model_name="exported_motion.safetensors")
    (motion,) = run("ADE_ApplyAnimateDiffModelSimple", motion_model=motion)
    (model,) = run("ADE_UseEvolvedSampling", model=model, beta_schedule="sqrt_linear (AnimateDiff)", m_models=motion)
    prompt = [[text(), {}]]
    sampler = {"seed": SEED, "steps": 4, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple", "denoise": 1.0}
    latent = evolved.empty(FRAMES, 64, 64)
    (sampled,) = run("KSampler", model=model, positive=prompt, negative=prompt, latent_image=latent, **sampler)
    theirs = SCALE * sampled["samples"].float().transpose(0, 1)[None]

    found = {how: ((theirs - c).square().mean().sqrt() / c.square().mean().sqrt()).item() for how, c in ours.items()}
    record_property("difference", found)
    print(f"\nrelative difference of clips: {found}")
    assert found["per frame"] < 1e-5 and found["across frames"] > 1e-4  # 3e-7 and 8e-4 were measured
