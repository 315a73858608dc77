"""SD1.5 and AnimateDiff at full size, with random weights in files of the original layouts: 11 GB of memory, 3 GB of disk."""

import gc
import io
import time

import pytest
import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from safetensors.torch import save_file

from avdm2_nodes.diffusion.unets import video_unet
from avdm2_nodes.files.architecture import unet_config
from avdm2_nodes.files.stack import load_image_unet, load_motion
from avdm2_nodes.files.student import write_student
from avdm2_nodes.files.student_info import StudentInfo
from tests.avdm2_nodes.files.original_layouts import SD15, original_checkpoint, original_motion, values
from tests.avdm2_nodes.native import diffusers_eps, evaluate

pytestmark = pytest.mark.slow

CHECKPOINT, MOTION, STUDENT = "random.safetensors", "random motion.safetensors", "random student.safetensors"
OVERHEAD = 0.03  # of a sampler's time, beyond its UNet's evaluations: previews, noise and loading


@pytest.fixture(scope="module")
def files(comfyui):
    """The files, where ComfyUI looks for them; 3 GB."""
    models = comfyui.base / "models"
    paths = models / "checkpoints" / CHECKPOINT, models / "animatediff_models" / MOTION
    save_file(values(original_checkpoint(**SD15), dtype=torch.float16), paths[0])
    save_file(values(original_motion(), dtype=torch.float16), paths[1])
    yield
    for path in paths:
        path.unlink()


@pytest.fixture(autouse=True)
def nothing_loaded(comfyui, loaded):
    import comfy.model_management as management

    yield
    management.unload_all_models()
    gc.collect()


@torch.no_grad()
def test_our_image_unet_is_comfyuis_own(comfyui, files):
    model, _, _ = comfyui.run("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    native = model.model.diffusion_model
    unet = comfyui.pack("comfy_bridge.native").image_unet_of(model)
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 16, 8, generator=generator), torch.randn(1, 77, 768, generator=generator)
    for t in (999, 250):
        ours = unet(x, torch.tensor([t]), text, return_dict=False)[0]
        theirs = native.float()(x, torch.tensor([t]), context=text)
        assert theirs.std() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


@torch.inference_mode()
def test_an_evaluation_is_diffusers_own(comfyui, files):
    """The teacher of a checkpoint and a motion module as core loads them, in float32, against diffusers' video UNet of the same files."""
    model, _, _ = comfyui.run("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    (teacher,) = comfyui.run("AVDM2MotionModule", model=model, motion_module=MOTION)
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 16, 8, generator=generator), torch.randn(1, 77, 768, generator=generator)
    ours = {t: evaluate(teacher, x, t, text) for t in (999, 250)}
    paths = comfyui.base / "models" / "checkpoints" / CHECKPOINT, comfyui.base / "models" / "animatediff_models" / MOTION
    unet = video_unet(load_image_unet(paths[0]), load_motion(paths[1]))
    for t, mine in ours.items():
        theirs = diffusers_eps(unet, x, t, text)
        assert theirs.std() > 0.1
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3)


def test_from_files_to_frames(comfyui, files, record_property):
    """A student's clip of 8 frames at 256x256 in 4 evaluations, with its previews; and the teacher beside it on the same network."""
    teacher, clip, vae = comfyui.run("AVDM2TeacherLoader", checkpoint=CHECKPOINT, motion_module=MOTION)
    facts = comfyui.pack("comfy_bridge.facts").facts_of(teacher)
    assert facts.frames == 16 and facts.base.name == CHECKPOINT and facts.motion.name == MOTION
    positive = comfyui.prompt(clip, "a prompt for CLIP's own tokenizer")
    assert positive[0][0].shape == (1, 77, 768)
    network = teacher.model.diffusion_model
    small = {"positive": positive, "latent": comfyui.empty(2, 64, 64), "seed": 0, "steps": 2, "denoise": 1.0}
    before = comfyui.run("AVDM2TeacherSampler", teacher=teacher, cfg=3.0, **small)[0]["samples"]

    motion = load_motion(comfyui.base / "models" / "animatediff_models" / MOTION)
    with torch.device("meta"):
        shell = UNetMotionModel.from_unet2d(
            UNet2DConditionModel(sample_size=64, cross_attention_dim=768), motion, load_weights=False
        )
    info = StudentInfo(
        holds="motion", timesteps=(999, 749, 499, 249), frames=16, height=256, width=256, unet_config=unet_config(shell),
        base_name=CHECKPOINT, base_hash=comfyui.pack("comfy_bridge.models").base_hash(teacher), updates=0, training_config="",
        title="random", date="2026-01-31", license="CreativeML OpenRAIL-M",
    )  # fmt: skip
    path = comfyui.base / "models" / "avdm2" / STUDENT
    write_student(path, {name: 0.9 * p for name, p in motion.named_parameters()}, info)
    (student,) = comfyui.run("AVDM2StudentLoader", student=STUDENT, teacher=teacher)
    path.unlink()
    comfyui.run("AVDM2StudentSampler", student=student, **small)  # loads the student's weights

    evaluating, shown = [], []
    handles = (
        network.register_forward_pre_hook(lambda module, inputs: evaluating.append(-time.process_time())),
        network.register_forward_hook(lambda module, inputs, output: evaluating.append(time.process_time())),
    )

    def send(value, total, preview, node_id=None):  # as the server does
        if preview is not None and preview[0] == "PNG":
            preview[1].save(io.BytesIO(), preview[0])
            shown.append(value)

    import comfy.utils
    from comfy.cli_args import LatentPreviewMethod, args

    comfy.utils.set_progress_bar_global_hook(send)
    args.preview_method, asked = LatentPreviewMethod.Latent2RGB, args.preview_method
    begun = time.process_time()
    inputs = small | {"latent": comfyui.empty(8, 256, 256), "steps": 0}
    (sampled,) = comfyui.run("AVDM2StudentSampler", student=student, **inputs)
    took = time.process_time() - begun
    args.preview_method = asked
    comfy.utils.set_progress_bar_global_hook(None)
    for handle in handles:
        handle.remove()
    assert len(evaluating) == 8 and shown == [1, 2, 3, 4]
    overhead = 1 - sum(evaluating) / took
    record_property("overhead", overhead)
    print(f"\n4 evaluations took {sum(evaluating):.1f} s of {took:.1f} s of CPU; the rest is {100 * overhead:.2f}%")
    assert overhead < OVERHEAD
    (images,) = comfyui.run("VAEDecode", samples=sampled, vae=vae)
    assert images.shape == (8, 256, 256, 3) and images.isfinite().all() and images.std() > 0.01

    again = comfyui.run("AVDM2TeacherSampler", teacher=teacher, cfg=3.0, **small)[0]["samples"]
    assert torch.equal(again, before) and again.isfinite().all()
