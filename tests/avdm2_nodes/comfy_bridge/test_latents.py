import pytest
import torch

from tests.avdm2_nodes.conftest import SCALE


@pytest.fixture
def latents(comfyui):
    return comfyui.pack("comfy_bridge.latents")


@pytest.fixture
def space(loaded):
    """The stack's latent format."""
    return loaded.teacher.latent_format


def test_frames_are_the_batch_and_the_scale_is_the_stacks_own(latents, space):
    samples = torch.randn(5, 4, 8, 12)
    clip = latents.to_clip({"samples": samples}, space, 32)
    assert clip.shape == (1, 4, 5, 8, 12) and clip.dtype == torch.float32
    assert torch.equal(clip[0, :, 3], SCALE * samples[3])
    assert torch.equal(latents.from_clip(clip, {"samples": samples}, space)["samples"], samples)


def test_all_other_keys_are_kept(latents, space):
    latent = {"samples": torch.zeros(2, 4, 8, 8), "batch_index": [4, 5], "noise_mask": torch.ones(1, 1, 8, 8), "theirs": "x"}
    given = dict(latent)
    back = latents.from_clip(torch.ones(1, 4, 2, 8, 8), latent, space)
    assert latent == given and back.keys() == latent.keys()
    assert all(back[key] is latent[key] for key in latent if key != "samples")


@pytest.mark.parametrize(
    "width, height, words",
    [
        (72, 64, "multiples of 32 pixels, found 72 x 64; take 64 x 64 instead"),
        (64, 120, "multiples of 32 pixels, found 64 x 120; take 64 x 128 instead"),
        (16, 32, "multiples of 32 pixels, found 16 x 32; take 32 x 32 instead"),
    ],
)
def test_sides_that_do_not_fit_are_said_in_pixels(comfyui, loaded, student, evaluations, width, height, words):
    assert loaded.teacher.pixels == 32, "the VAE's 8 times the UNet's 4"
    inputs = {"positive": comfyui.prompt(loaded.clip), "latent": comfyui.empty(2, height, width), "seed": 0, "denoise": 1.0}
    with pytest.raises(ValueError, match=words):
        comfyui.run("AVDM2StudentSampler", student=student, steps=4, **inputs)
    with pytest.raises(ValueError, match=words):
        comfyui.run("AVDM2TeacherSampler", teacher=loaded.teacher, steps=4, cfg=3.0, **inputs)
    assert not evaluations


@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 4, 2, 8, 8), (4, 8, 8)])
def test_latents_of_another_kind_are_refused(latents, space, shape):
    with pytest.raises(latents.LatentError, match=r"Expected a latent \(frames, 4, .*found .*; use Empty Latent Image"):
        latents.to_clip({"samples": torch.zeros(shape)}, space, 32)


def test_one_frame_and_a_noise_mask_are_warned_of(latents, space, caplog):
    latents.to_clip({"samples": torch.zeros(2, 4, 8, 8)}, space, 32)
    assert not caplog.messages
    latents.to_clip({"samples": torch.zeros(1, 4, 8, 8), "noise_mask": torch.ones(1, 1, 64, 64)}, space, 32)
    assert [message.split(";")[0] for message in caplog.messages] == [
        "AVDM2: one frame only",
        "AVDM2: the latent's noise mask is not used",
    ]


def test_room_is_asked_for_all_frames_of_an_evaluation(latents, space):
    clip = latents.to_clip({"samples": torch.zeros(5, 4, 8, 12)}, space, 32)
    assert latents.evaluation_shape(clip, 2) == (10, 4, 8, 12)
