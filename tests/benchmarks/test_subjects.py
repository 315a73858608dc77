"""What is timed are the same clips: ours, and those of diffusers' own pipeline."""

import pytest
import torch
from diffusers import AutoencoderKL

from avdm2_nodes.diffusion.unets import video_unet
from benchmarks.subjects import Subject, evaluations, random_weights
from benchmarks.training_modes import MODES, Noise
from training.run.command_line import load_config


@pytest.fixture
def subject(stack):
    generator = torch.Generator().manual_seed(0)
    text, empty = torch.randn(2, 32, 32, generator=generator).split(1)
    student = video_unet(stack.image_unet, stack.motion).eval().requires_grad_(False)
    return Subject("tiny", student, stack.teacher.eval(), stack.vae, stack.vae, text, empty, 3, 64)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(ours.std()))


def test_our_way_and_diffusers_give_the_same_clips(subject, monkeypatch):
    """From the same noise; the student's later noise is drawn in another order, so one step of it."""
    noise = torch.randn(subject.clip, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("benchmarks.subjects.draw_noise", lambda *_: noise)
    monkeypatch.setattr("diffusers.pipelines.animatediff.pipeline_animatediff.randn_tensor", lambda *_, **__: noise)
    runs = subject.contenders()
    close(runs["teacher"](), runs["diffusers, teacher"]())
    subject.student_steps = 1
    assert not subject.whole and "student, frames" not in subject.contenders()
    runs = subject.contenders()
    close(runs["student"](), runs["diffusers, student"]())
    assert runs["VAE"]().shape == runs["TAESD"]().shape == (1, 3, 64, 64, 3)


def test_whole_clips_come_as_frames(subject):
    subject.taesd = None
    assert subject.whole
    runs = subject.contenders()
    assert not any("TAESD" in name for name in runs)
    assert runs["student, frames"]().shape == (1, 3, 64, 64, 3)
    assert runs["diffusers, student, frames"]().shape == (1, 3, 3, 64, 64)


def test_an_evaluation_of_another_size(subject):
    assert evaluations(subject, 2, 32, 3)().shape == (3, 4, 2, 4, 4)


def test_random_weights_give_finite_frames():
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
        )
    vae = random_weights(vae, torch.device("cpu"), torch.bfloat16)
    image = vae.decode(torch.randn(1, 4, 8, 8).bfloat16()).sample
    assert image.isfinite().all() and image.std() > 0
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in vae.parameters())


def test_modes_are_settings_of_the_training():
    assert all(load_config(options).model for options in MODES.values())
    clips, text = Noise((1, 4, 3, 8, 8), torch.ones(1, 5, 6)).batch([7, 8])
    assert clips.shape == (2, 4, 3, 8, 8) and text.shape == (2, 5, 6) and clips.std() > 0.5
