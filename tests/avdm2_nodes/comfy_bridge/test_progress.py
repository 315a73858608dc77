import pytest
import torch
from PIL import Image

from tests.avdm2_nodes.conftest import WINDOW

LATENT = {"seed": 4, "steps": 4, "denoise": 1.0}


@pytest.fixture
def sample(comfyui, loaded, student):
    """sample(frames): a clip by the student in four steps."""
    inputs = {"student": student, "positive": comfyui.prompt(loaded.clip), **LATENT}
    return lambda frames=3: comfyui.run("AVDM2StudentSampler", latent=comfyui.empty(frames, 32, 32), **inputs)[0]["samples"]


def test_each_step_moves_the_bar_and_shows_the_frames(comfyui, loaded, sample, progress):
    sample()
    assert [(step, steps) for step, steps, _ in progress] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for _, _, (kind, picture, size) in progress:
        assert kind == "JPEG" and isinstance(picture, Image.Image) and picture.mode == "RGB"
        assert max(picture.size) <= size <= 512 < 2 * max(picture.size)
    assert progress[0][2][1].tobytes() != progress[-1][2][1].tobytes()
    progress.clear()
    teacher = {"teacher": loaded.teacher, "positive": comfyui.prompt(loaded.clip), "latent": comfyui.empty(), "cfg": 3.0}
    comfyui.run("AVDM2TeacherSampler", **teacher, **LATENT | {"steps": 3})
    assert [(step, steps, preview is not None) for step, steps, preview in progress] == [(i, 3, True) for i in (1, 2, 3)]


def test_previews_do_not_change_the_clip(sample, progress, comfyui):
    import comfy.utils

    watched = sample()
    assert len(progress) == 4
    comfy.utils.set_progress_bar_global_hook(None)
    assert torch.equal(sample(), watched)


def test_the_picture_has_each_frame_once_in_order(comfyui, loaded):
    import comfy.latent_formats

    frames_picture = comfyui.pack("comfy_bridge.progress").frames_picture
    space = comfy.latent_formats.SD15()
    space.latent_rgb_factors, space.latent_rgb_factors_bias = [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0, 0, 0]], None
    shades = torch.linspace(-0.9, 0.9, 5)
    latents = shades[:, None, None, None].expand(5, 4, 2, 4).clone()
    latents[:, 1] = 1.0
    picture = frames_picture(latents, space)
    assert picture.width * 2 == 3 * picture.height * 2, "3 columns of 2 x 4, 2 rows"
    step_x, step_y = picture.width // 3, picture.height // 2
    centres = [picture.getpixel((step_x * (i % 3) + step_x // 2, step_y * (i // 3) + step_y // 2)) for i in range(6)]
    expected = [(int((shade + 1) * 127.5), 255, int((shade + 1) * 127.5)) for shade in shades.tolist()] + [(0, 0, 0)]
    assert all(
        abs(a - b) <= 1 for seen, wanted in zip(centres, expected, strict=True) for a, b in zip(seen, wanted, strict=True)
    )
    space.latent_rgb_factors = None
    assert frames_picture(latents, space) is None


def test_of_a_long_clip_sixteen_frames_are_shown(comfyui):
    import comfy.latent_formats

    space = comfy.latent_formats.SD15()
    picture = comfyui.pack("comfy_bridge.progress").frames_picture(torch.zeros(40, 4, 8, 8), space)
    assert picture.size == (512, 512)  # 4 x 4 frames of 8 x 8, 16 times as large


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupt_ends_sampling_before_the_next_evaluation(comfyui, loaded, sample, evaluations, after):
    """A person asks for it before sampling or while an evaluation is under way, in the middle of a step too."""
    import comfy.model_management as management

    whole = sample(2 * WINDOW - 1)
    assert len(evaluations) == 8, "two windows a step"
    evaluations.clear()

    def press(network, inputs):
        if len(evaluations) == after:
            management.interrupt_current_processing(True)

    handle = loaded.teacher.patcher.model.diffusion_model.register_forward_pre_hook(press)
    management.interrupt_current_processing(not after)
    try:
        with pytest.raises(management.InterruptProcessingException):
            sample(2 * WINDOW - 1)
    finally:
        handle.remove()
    assert len(evaluations) == after
    assert not management.processing_interrupted()
    assert torch.equal(sample(2 * WINDOW - 1), whole), "the next run is whole"
