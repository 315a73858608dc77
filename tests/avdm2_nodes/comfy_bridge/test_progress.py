import io

import pytest
import torch
from PIL import Image, ImageSequence

from tests.avdm2_nodes.conftest import WINDOW

LATENT = {"seed": 4, "steps": 4, "denoise": 1.0}


@pytest.fixture
def sample(comfyui, loaded, student):
    """sample(frames): a clip by the student in four steps."""
    inputs = {"student": student, "positive": comfyui.prompt(loaded.clip), **LATENT}
    return lambda frames=3: comfyui.run("AVDM2StudentSampler", latent=comfyui.empty(frames, 32, 32), **inputs)[0]["samples"]


@pytest.fixture
def asked(comfyui, monkeypatch):
    """ComfyUI's setting asks for previews."""
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)


def test_each_step_moves_the_bar_and_shows_the_frames(comfyui, loaded, sample, progress, asked):
    """Core's still first, then the clip that moves."""
    sample()
    assert [(step, steps) for step, steps, _ in progress] == [(i, 4) for i in (1, 2, 3, 4) for _ in range(2)]
    assert {kind for _, _, (kind, _, _) in progress[::2]} == {"JPEG"}
    moving = progress[1::2]
    for _, _, (kind, picture, size) in moving:
        assert kind == "PNG" and isinstance(picture, Image.Image) and picture.mode == "RGB"
        assert size is None, "ComfyUI's server would make a still copy of another size"
        assert 160 < max(picture.size) <= 320
    assert moving[0][2][1].tobytes() != moving[-1][2][1].tobytes()
    progress.clear()
    teacher = {"teacher": loaded.teacher, "positive": comfyui.prompt(loaded.clip), "latent": comfyui.empty(), "cfg": 3.0}
    comfyui.run("AVDM2TeacherSampler", **teacher, **LATENT | {"steps": 3})
    assert [(step, steps) for step, steps, preview in progress if preview] == [(i, 3) for i in (1, 2, 3) for _ in range(2)]


def test_core_s_sampler_shows_the_clip_too_and_an_image_model_s_does_not(comfyui, loaded, student, progress, asked):
    prompt = comfyui.prompt(loaded.clip)
    inputs = {"positive": prompt, "negative": prompt, "latent_image": comfyui.empty(2), "seed": 0, "cfg": 1.0, "denoise": 1.0}
    inputs |= {"sampler_name": "lcm", "scheduler": "simple", "steps": 2}
    comfyui.run("KSampler", model=student, **inputs)
    assert [kind for _, _, (kind, _, _) in progress] == ["JPEG", "PNG"] * 2
    progress.clear()
    comfyui.run("KSampler", model=comfyui.pack("comfy_bridge.facts").student_facts(student).image_model, **inputs)
    assert [kind for _, _, (kind, _, _) in progress] == ["JPEG"] * 2


def test_without_previews_in_comfyuis_setting_there_are_none(sample, progress, monkeypatch):
    monkeypatch.setattr(
        "comfy.utils.PROGRESS_THROTTLE_MIN_INTERVAL", 0, raising=False
    )  # core passes over steps of milliseconds
    sample()
    assert [(step, steps, preview) for step, steps, preview in progress] == [(i, 4, None) for i in (1, 2, 3, 4)]


def test_previews_do_not_change_the_clip(sample, progress, asked):
    import comfy.utils

    watched = sample()
    assert len(progress) == 8
    comfy.utils.set_progress_bar_global_hook(None)
    assert torch.equal(sample(), watched)


@pytest.fixture
def played(comfyui):
    """played(latents): the still of the preview, and (frame, milliseconds) of what plays, from the bytes that the server sends."""
    import comfy.latent_formats

    space = comfy.latent_formats.SD15()
    space.latent_rgb_factors, space.latent_rgb_factors_bias = [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0, 0, 0]], None

    def play(latents):
        sent = io.BytesIO()
        picture = comfyui.pack("comfy_bridge.progress").moving_picture(latents, space)
        picture.save(sent, format="PNG", quality=95, compress_level=1)  # as the server does
        with Image.open(sent) as moving:
            assert moving.default_image
            frames = [frame.convert("RGB").copy() for frame in ImageSequence.Iterator(moving)]
            times = [moving.seek(i) or moving.info.get("duration") for i in range(moving.n_frames)]
        return frames[0], list(zip(frames[1:], times[1:], strict=True))

    return play


def shades(count):
    """A clip (count, 4, 2, 4) of one even shade a frame, darker to brighter, and its red as a preview shows it."""
    values = torch.linspace(-0.9, 0.9, count)
    latents = values[:, None, None, None].expand(count, 4, 2, 4).clone()
    latents[:, 1] = 1.0
    return latents, values.add(1).mul(127.5).int().tolist()


@pytest.mark.parametrize("count", [2, 5, 8, 16])
def test_the_preview_plays_each_frame_once_in_the_clips_time(played, count):
    latents, reds = shades(count)
    sheet, frames = played(latents)
    assert [frame.getpixel((10, 10)) for frame, _ in frames] == [(red, 255, red) for red in reds]
    assert all(frame.size == sheet.size == (320, 160) and time == 125 for frame, time in frames)


@pytest.mark.parametrize("count", [1, 2, 5, 8, 16])
def test_the_still_has_every_frame_in_order_and_no_empty_place(played, count):
    latents, reds = shades(count)
    sheet, _ = played(latents)
    columns = {1: 1, 2: 2, 5: 3, 8: 3, 16: 4}[count]
    step_x, step_y = sheet.width / columns, sheet.height / columns
    places = [(int((x + 0.5) * step_x), int((y + 0.5) * step_y)) for y in range(columns) for x in range(columns)]
    seen = [sheet.getpixel(place) for place in places]
    assert all(green == 255 and red == blue for red, green, blue in seen)
    assert [red for red, _, _ in seen] == sorted(red for red, _, _ in seen) and {red for red, _, _ in seen} == set(reds)


def test_of_a_long_clip_sixteen_frames_are_shown_in_the_clips_time(played):
    latents, reds = shades(40)
    _, frames = played(latents)
    shown = [frame.getpixel((10, 10))[0] for frame, _ in frames]
    assert len(shown) == 16 and shown[0] == reds[0] and shown[-1] == reds[-1] and shown == sorted(shown)
    assert sum(time for _, time in frames) == pytest.approx(40 * 125, rel=0.01)


def test_a_stack_without_colours_has_no_preview(comfyui):
    import comfy.latent_formats

    space = comfy.latent_formats.SD15()
    space.latent_rgb_factors = None
    assert comfyui.pack("comfy_bridge.progress").moving_picture(torch.zeros(2, 4, 2, 4), space) is None


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupt_ends_sampling_before_the_next_evaluation(comfyui, loaded, sample, evaluations, after):
    """A person asks for it before sampling or while an evaluation is under way, in the middle of a step too."""
    import comfy.model_management as management

    whole = sample(WINDOW + 2)
    assert len(evaluations) == 8, "two windows a step"
    evaluations.clear()

    def press(network, inputs):
        if len(evaluations) == after:
            management.interrupt_current_processing(True)

    handle = loaded.teacher.model.diffusion_model.register_forward_pre_hook(press)
    management.interrupt_current_processing(not after)
    try:
        with pytest.raises(management.InterruptProcessingException):
            sample(WINDOW + 2)
    finally:
        handle.remove()
    assert len(evaluations) == after
    assert not management.processing_interrupted()
    assert torch.equal(sample(WINDOW + 2), whole), "the next run is whole"
