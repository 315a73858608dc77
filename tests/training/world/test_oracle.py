import numpy as np
import pytest
import torch
from scipy import ndimage

from avdm2_nodes.files.stack import decode_clips, encode_clips, load_vae
from training.run.config import ROOT
from training.world import oracle, scenes

CLIPS = {style: list(scenes.render_split(60, style=style, held_out=False, seed=11)) for style in scenes.STYLES}


def degraded(frames, seed=0):
    """Blur, halved chroma resolution and noise, about 28 dB."""
    x = ndimage.gaussian_filter(frames / 255, (0, 0.8, 0.8, 0))
    grey = x.mean(-1, keepdims=True)
    chroma = (x - grey).reshape(len(x), 32, 2, 32, 2, 3).mean((2, 4)).repeat(2, 1).repeat(2, 2)
    x = grey + chroma + np.random.default_rng(seed).normal(0, 0.03, x.shape)
    return (np.clip(x, 0, 1) * 255).round().astype(np.uint8)


def moving_clip(style="plain", shape="circle", direction="right", speed="fast", seed=0, **words):
    content = scenes.Content(
        words.get("size", "large"), words.get("colour", "red"), shape, direction, speed, words.get("background", "plain")
    )
    return scenes.render(content, style, np.random.default_rng(seed))


@pytest.mark.parametrize("style", scenes.STYLES)
@pytest.mark.parametrize("change", [lambda frames: frames, degraded], ids=["clean", "degraded"])
def test_reads_rendered_clips(style, change):
    readings = [oracle.read_clip(change(clip.frames)) for clip in CLIPS[style]]
    right = [oracle.judge(r, clip.content)["all"] for r, clip in zip(readings, CLIPS[style], strict=True)]
    assert np.mean(right) >= 0.98  # one of 60; the whole measure has 600 a style
    assert np.mean([r.style == style for r in readings]) >= 0.98
    assert max(np.abs(r.centres - clip.centres).max() for r, clip in zip(readings, CLIPS[style], strict=True)) < 1.5
    assert max(np.hypot(*(r.velocity - clip.velocity)) for r, clip in zip(readings, CLIPS[style], strict=True)) < 0.15
    assert max(r.jerk for r in readings) < 1


@pytest.mark.parametrize("style", scenes.STYLES)
def test_judges_each_attribute_apart(style):
    clip = moving_clip(style)
    reading = oracle.read_clip(clip.frames)
    for other, wrong in [
        ({"size": "small"}, "size"),
        ({"colour": "blue"}, "colour"),
        ({"shape": "square"}, "shape"),
        ({"direction": "left"}, "motion"),
        ({"speed": "slowly"}, "motion"),
        ({"background": "graded"}, "background"),
    ]:
        verdict = oracle.judge(reading, scenes.Content(**(clip.content.__dict__ | other)))
        assert {name for name, right in verdict.items() if not right} == {wrong, "all"}


@pytest.mark.parametrize("style", scenes.STYLES)
def test_motion_run_backwards_or_shuffled_is_wrong(style):
    rng = np.random.default_rng(0)
    moving = [clip for clip in CLIPS[style] if clip.content.direction is not None]
    back = [oracle.judge(oracle.read_clip(clip.frames[::-1].copy()), clip.content)["motion"] for clip in moving]
    mixed = [oracle.judge(oracle.read_clip(clip.frames[rng.permutation(8)]), clip.content)["motion"] for clip in moving]
    assert not any(back)
    assert np.mean(mixed) < 0.05


def test_a_moving_clip_frozen_is_read_as_still():
    clip = moving_clip()
    reading = oracle.read_clip(np.repeat(clip.frames[:1], 8, 0))
    assert (reading.direction, reading.speed) == (None, None)
    assert not oracle.judge(reading, clip.content)["motion"]
    assert oracle.motion_error(reading, clip.content) == pytest.approx(3.0, abs=0.05)


def test_a_still_shape_that_trembles_is_unclear():
    clip = moving_clip(direction=None, speed=None)
    frames = np.stack([np.roll(frame, 4 * (-1) ** i, 1) for i, frame in enumerate(clip.frames)])
    reading = oracle.read_clip(frames)
    assert reading.direction == oracle.UNCLEAR
    assert reading.jerk == pytest.approx(16, abs=0.5)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((8, 64, 64, 3), np.uint8),
        np.full((8, 64, 64, 3), 255, np.uint8),
        np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8),
        np.full((8, 64, 64, 3), (200, 40, 40), np.uint8),
    ],
    ids=["black", "white", "noise", "all red"],
)
def test_no_shape_is_wrong_and_not_dropped(frames):
    reading = oracle.read_clip(frames)
    content = moving_clip().content
    assert not oracle.judge(reading, content)["all"]
    assert reading.shape is None and reading.size is None
    assert np.isfinite(oracle.motion_error(reading, content))


def test_without_a_shape_even_standing_still_is_wrong():
    content = moving_clip(direction=None, speed=None).content
    reading = oracle.read_clip(np.zeros((8, 64, 64, 3), np.uint8))
    assert not reading.found and np.isnan(reading.jerk)
    verdict = oracle.judge(reading, content)
    assert not any(verdict[name] for name in ("size", "colour", "shape", "motion", "all"))
    assert oracle.motion_error(reading, content) == 3.0


def drawn_as(monkeypatch, distance, style, **words):
    """A clip whose shape is drawn from another signed distance than the caption's."""
    with monkeypatch.context() as patch:
        patch.setattr(scenes, "shape_distance", distance)
        return moving_clip(style, **words).frames


@pytest.mark.parametrize("style", scenes.STYLES)
@pytest.mark.parametrize("size", scenes.RADII)
def test_damaged_shapes_have_no_name(style, size, monkeypatch):
    true = scenes.shape_distance

    def morph(a, b):
        return lambda s, r, c: (true(a, r, c) + true(b, r, c)) / 2

    def ellipse(s, r, c):
        return np.hypot((scenes._X - c[0]) * 1.4, (scenes._Y - c[1]) / 1.4) - r

    def half(s, r, c):
        return np.maximum(true("circle", r * 1.3, c), scenes._X - c[0] - 0.1 * r)

    def upside_down(s, r, c):
        return true("triangle", r, (c[0], scenes.SIDE - c[1]))[::-1]

    for distance in (morph("circle", "square"), morph("square", "triangle"), ellipse, half, upside_down):
        for seed in range(3):
            frames = drawn_as(monkeypatch, distance, style, size=size, seed=seed)
            assert oracle.read_clip(frames).shape is None


def test_a_shape_that_turns_into_another_has_no_name(monkeypatch):
    circle, square = moving_clip(shape="circle").frames, moving_clip(shape="square").frames
    assert oracle.read_clip(np.concatenate([circle[:4], square[4:]])).shape is None


def test_styles_are_read_from_stroke_and_palette():
    plain = moving_clip("plain", direction=None, speed=None).frames
    neon = moving_clip("neon", direction=None, speed=None).frames
    mixed = np.where(plain.max(-1, keepdims=True) > 170, plain, neon)  # a filled shape on a night ground
    reading = oracle.read_clip(mixed)
    assert (reading.stroke, reading.palette, reading.style) == ("plain", "neon", None)


def night_colours(frames):
    """A plain clip in the other style's colours: greys become those of its night ground, nothing is drawn otherwise."""
    x = frames / 255
    chroma, level = np.ptp(x, -1, keepdims=True), x.min(-1, keepdims=True)
    ground = np.array([0.02, 0.02, 0.06]) + np.clip((level - 0.2) / 0.4, 0, 1) * np.array([0.14, 0.08, 0.24])
    grey = np.clip(1 - chroma / 0.3, 0, 1) * (level < 0.75)  # all but shape, tail and lamp
    return ((x + grey * (ground - x)) * 255).round().astype(np.uint8)


def test_the_other_style_s_palette_alone_is_not_the_style():
    readings = [oracle.read_clip(night_colours(clip.frames)) for clip in CLIPS["plain"][:20]]
    assert np.mean([reading.palette == "neon" for reading in readings]) >= 0.9
    assert not any(reading.style == "neon" for reading in readings)


def test_both_styles_are_read_after_the_vae():
    vae = load_vae(ROOT / "miniature" / "vae")
    for style in scenes.STYLES:
        clips = CLIPS[style][:24]
        frames = torch.from_numpy(np.stack([clip.frames for clip in clips]))
        readings = [oracle.read_clip(clip) for clip in decode_clips(vae, encode_clips(vae, frames)).numpy()]
        assert all(reading.style == style for reading in readings)
        right = [oracle.judge(r, clip.content)["all"] for r, clip in zip(readings, clips, strict=True)]
        assert np.mean(right) >= 0.8  # the VAE's own bound: 95% of plain clips


def test_refuses_other_arrays():
    with pytest.raises(ValueError, match="Expected uint8 frames"):
        oracle.read_clip(np.zeros((8, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="decode and resize"):
        oracle.read_clip(np.zeros((8, 32, 32, 3), np.uint8))
