import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import AnimateDiffPipeline, LCMScheduler, MotionAdapter, UNetMotionModel

from avdm2_nodes.diffusion.samplers import draw_noise, sample_student
from avdm2_nodes.diffusion.unets import video_predictor
from avdm2_nodes.files.architecture import unet_config
from avdm2_nodes.files.containers import read_layout
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.interchange import diffusers_scheduler, export_animatediff, export_diffusers
from avdm2_nodes.files.motion import load_motion_file
from avdm2_nodes.files.recognise import recognise
from avdm2_nodes.files.student import Student
from avdm2_nodes.files.student_info import StudentFileError, StudentInfo
from avdm2_nodes.files.student_unet import student_unet


@pytest.fixture
def students(stack):
    """A student of each kind, its changes large enough to see."""
    unet, generator = stack.teacher, torch.Generator().manual_seed(0)
    motion = {k: v + 0.01 for k, v in unet.named_parameters() if "motion_modules" in k}
    lora = {}
    for name in ("down_blocks.0.resnets.0.conv1", "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"):
        weight = unet.get_parameter(f"{name}.weight")
        lora[f"{name}.lora_A.weight"] = torch.randn(2, *weight.shape[1:], generator=generator)
        ones = (1,) * (weight.ndim - 2)
        lora[f"{name}.lora_B.weight"] = torch.randn(weight.shape[0], 2, *ones, generator=generator)

    def make(holds, tensors, **more):
        info = StudentInfo(
            holds=holds, timesteps=(999, 499), frames=8, height=64, width=64, unet_config=unet_config(unet), base_name="tiny",
            base_hash=weights_hash(stack.image_unet), updates=1, training_config="", title="t", date="2026-01-01", license="x", **more,
        )  # fmt: skip
        return Student(info, tensors)

    return {
        "all": make("all", dict(unet.named_parameters())),
        "motion": make("motion", motion),
        "motion+lora": make("motion+lora", motion | lora, lora_rank=2, lora_alpha=4.0),
    }


def test_the_files_hold_the_student(stack, students, tmp_path):
    motion_path, lora_path = export_animatediff(students["motion+lora"], tmp_path, "sub/mine")
    assert (motion_path, lora_path) == (tmp_path / "sub/mine_motion.safetensors", tmp_path / "sub/mine_lora.safetensors")
    assert recognise(read_layout(motion_path)).id.startswith("motion-") and recognise(read_layout(lora_path)).id == "lora"
    assert "modelspec.title" in read_layout(lora_path).metadata
    # The way that others go: the motion modules into a video UNet, then the LoRA by diffusers' own loader.
    motion = load_motion_file(motion_path, norm_groups=8)
    assert motion.config.motion_num_attention_heads == 2  # noted in the metadata, for the shapes do not tell
    theirs = UNetMotionModel.from_unet2d(stack.image_unet, motion)
    pipeline = AnimateDiffPipeline(stack.vae, stack.text_encoder, stack.tokenizer, theirs, None, LCMScheduler())
    pipeline.load_lora_weights(str(lora_path))
    ours = student_unet(students["motion+lora"], stack.image_unet)
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 4, 3, 8, 8, generator=generator), torch.randn(3, 32, 32, generator=generator)
    with torch.no_grad():
        expected = ours(x, 500, text).sample
        torch.testing.assert_close(pipeline.unet(x, 500, text).sample, expected, rtol=1e-2, atol=1e-2)
        plain = UNetMotionModel.from_unet2d(stack.image_unet, motion)(x, 500, text).sample
    assert (plain - expected).abs().max() > 0.05  # the LoRA is in it


def test_motion_alone_is_one_file(students, tmp_path):
    assert export_animatediff(students["motion"], tmp_path, "m") == [tmp_path / "m_motion.safetensors"]


def test_the_lora_goes_where_it_is_told(students, tmp_path):
    folders = tmp_path / "motion", tmp_path / "loras"
    paths = export_animatediff(students["motion+lora"], folders[0], "a/m", folders[1])
    assert paths == [folders[0] / "a/m_motion.safetensors", folders[1] / "a/m_lora.safetensors"]
    assert all(path.is_file() for path in paths)
    export_animatediff(students["motion"], folders[0], "b/m", folders[1])
    assert not (folders[1] / "b").exists(), "no LoRA, no folder"


def test_what_these_formats_have_no_place_for_is_refused(students, tmp_path):
    with pytest.raises(StudentFileError, match="found one that holds all its weights"):
        export_animatediff(students["all"], tmp_path, "m")
    with pytest.raises(StudentFileError, match="leave out"):
        export_animatediff(students["motion"], tmp_path, "../m")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_no_half_is_left(students, tmp_path, monkeypatch):
    (tmp_path / "m_lora.safetensors").write_text("mine")
    with pytest.raises(StudentFileError, match=r"found m_lora\.safetensors there already"):
        export_animatediff(students["motion+lora"], tmp_path, "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m_lora.safetensors"]
    broken = dataclasses.replace(students["motion+lora"], tensors={**students["motion"].tensors})
    with pytest.raises(ValueError, match="found none"):
        export_animatediff(broken, tmp_path, "n")
    assert [p.name for p in tmp_path.iterdir()] == ["m_lora.safetensors"]


def test_folders_that_cannot_be_made_are_told(stack, students, tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file" / "x", tmp_path / ("n" * 300), Path("/proc/x"), Path(f"{tmp_path}/a\0b")):
        for export in (
            lambda place: export_animatediff(students["motion"], place, "m"),
            lambda place: export_diffusers(students["motion"], stack, place),
        ):
            with pytest.raises(StudentFileError, match="room and the right to write"):
                export(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- whole clips by diffusers alone ----

PROMPT = "a small red circle standing still on a plain background"


@pytest.fixture
def of_diffusers(monkeypatch):
    """of_diffusers(pipeline): its clip (1, C, F, h, w) of the prompt in two steps; its noise is drawn in our order, frame by frame."""
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda shape, generator, **_: draw_noise(shape, generator)
    )

    def sample(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            PROMPT, num_frames=5, height=64, width=64, num_inference_steps=2, guidance_scale=1.0, output_type="latent",
            latents=draw_noise((1, 4, 5, 8, 8), torch.Generator().manual_seed(1)), generator=torch.Generator().manual_seed(2),
        ).frames  # fmt: skip

    return sample


@pytest.fixture
def ours(stack):
    @torch.no_grad()
    def sample(student):
        noise = draw_noise((1, 4, 5, 8, 8), torch.Generator().manual_seed(1))
        predict, text = video_predictor(student_unet(student, stack.image_unet)), stack.encode_text([PROMPT])
        return sample_student(predict, noise, text, student.info.timesteps, torch.Generator().manual_seed(2))

    return sample


def relative(a, b):
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item()


def test_diffusers_makes_the_same_clip_of_the_animatediff_files(stack, students, tmp_path, of_diffusers, ours):
    """By its own readers from file to clip: MotionAdapter, load_lora_weights, LCMScheduler."""
    motion_path, lora_path = export_animatediff(students["motion+lora"], tmp_path, "mine")
    stack.motion.save_config(tmp_path / "config")
    adapter = MotionAdapter.from_single_file(str(motion_path), config=str(tmp_path / "config"), local_files_only=True)
    scheduler = LCMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, original_inference_steps=100)
    pipeline = AnimateDiffPipeline(stack.vae, stack.text_encoder, stack.tokenizer, stack.image_unet, adapter, scheduler)
    without = of_diffusers(pipeline)
    pipeline.load_lora_weights(str(lora_path))
    expected = ours(students["motion+lora"])
    assert relative(of_diffusers(pipeline), expected) < 5e-3  # of float16 in the files
    assert relative(without, expected) > 0.1


@pytest.mark.parametrize("holds", ["all", "motion", "motion+lora"])
def test_diffusers_makes_the_same_clip_of_the_diffusers_folder(stack, students, tmp_path, of_diffusers, ours, holds):
    folder = tmp_path / "student"
    folder.mkdir()  # may be there, if it is empty
    export_diffusers(students[holds], stack, folder)
    assert list(tmp_path.iterdir()) == [folder]
    pipeline = AnimateDiffPipeline.from_pretrained(folder, local_files_only=True)
    assert isinstance(pipeline.unet, UNetMotionModel) and isinstance(pipeline.scheduler, LCMScheduler)
    assert relative(of_diffusers(pipeline), ours(students[holds])) < 5e-3
    card = (folder / "README.md").read_text()
    assert "num_inference_steps=2, guidance_scale=1.0" in card and "license_name: x" in card


def test_the_scheduler_is_that_of_the_students_own_steps(students):
    info = students["motion"].info
    assert type(diffusers_scheduler(info)) is LCMScheduler
    euler = dataclasses.replace(info, chain="euler", timesteps=(999, 749, 499, 249))
    assert [int(t) for t in diffusers_scheduler(euler).timesteps] == [999, 749, 499, 249]
    with pytest.raises(StudentFileError, match=r"diffusers has for 2 steps, \[999, 499\], found one of \[999, 600\]"):
        diffusers_scheduler(dataclasses.replace(info, timesteps=(999, 600)))


def test_a_folder_in_use_is_left_alone(stack, students, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(StudentFileError, match="Expected a new or empty folder"):
            export_diffusers(students["motion"], stack, taken)
    with pytest.raises(StudentFileError, match="Expected room and the right to write"):
        export_diffusers(students["motion"], stack, tmp_path / "mine.txt" / "below")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
