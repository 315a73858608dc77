"""How far clips of an exported student lie from ours: docs/other_tools.md states these figures."""

import numpy as np
import pytest
import torch

from avdm2_nodes.diffusion.samplers import draw_noise, sample_student
from avdm2_nodes.diffusion.schedules import VIDEO
from avdm2_nodes.diffusion.unets import video_predictor
from avdm2_nodes.files.stack import load_stack
from avdm2_nodes.files.student import read_student
from avdm2_nodes.files.student_unet import student_unet
from tests.avdm2_nodes.diffusion.per_frame import per_frame
from training.run.config import MODEL, STUDENT
from training.world import scenes

CLIPS = 4


def relative(a, b):
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item()


@pytest.fixture(scope="module")
def shipped():
    return load_stack(MODEL)


@pytest.fixture(scope="module")
def student(shipped):
    return student_unet(read_student(STUDENT), shipped.image_unet)


@pytest.fixture(scope="module")
def texts(shipped):
    return shipped.encode_text([content.caption for content in scenes.draw_contents(CLIPS, held_out=True, seed=0)])


@torch.no_grad()
def test_one_frame_is_normalised_alike(shipped):
    x, text = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), shipped.encode_text(["", "a circle"])
    both = [video_predictor(unet)(x, torch.tensor([500]), text) for unet in (shipped.teacher, per_frame(shipped.teacher))]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_what_it_changes_in_a_prediction(shipped, student, texts, who, record_property):
    unet = student if who == "student" else shipped.teacher
    generator = torch.Generator().manual_seed(0)
    contents = scenes.draw_contents(CLIPS, held_out=True, seed=0)
    frames = [torch.from_numpy(scenes.render(c, "plain", np.random.default_rng(i)).frames) for i, c in enumerate(contents)]
    x0 = shipped.encode_clips(torch.stack(frames))
    noise = draw_noise(x0.shape, generator)
    for t in (999, 749, 499, 249, 50):
        x_t, ts = VIDEO.diffuse(x0, noise, t), torch.full((CLIPS,), t)
        theirs, ours = (video_predictor(u)(x_t, ts, texts) for u in (per_frame(unet), unet))
        found = relative(theirs, ours)
        record_property(f"t = {t}", found)
        print(f"\n{who}, t = {t}: {100 * found:.1f}%")
        assert 0.001 < found < 0.05


@torch.no_grad()
def test_what_it_changes_in_a_students_clip(shipped, student, texts, record_property):
    clips = []
    for unet in (student, per_frame(student)):
        generators = [torch.Generator().manual_seed(100 + i) for i in range(CLIPS)]
        noise = draw_noise((CLIPS, 4, scenes.FRAMES, 8, 8), generators)
        clip = sample_student(video_predictor(unet), noise, texts, (999, 749, 499, 249), generators)
        clips.append(shipped.decode_clips(clip).float())
    squared = (clips[0] - clips[1]).square().flatten(1).mean(1)
    psnr = (10 * torch.log10(255**2 / squared)).median().item()
    record_property("PSNR", psnr)
    print(f"\nPSNR {psnr:.1f} dB")
    assert 30 < psnr < 60
