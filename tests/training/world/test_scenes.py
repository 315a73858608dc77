import numpy as np
import pytest

from training.world import scenes

CONTENTS = scenes.all_contents()
SAMPLE = CONTENTS[::7]


def test_captions_are_unique_and_can_be_read_back():
    captions = [content.caption for content in CONTENTS]
    assert len(set(captions)) == len(CONTENTS) == 2 * 6 * 3 * 9 * 4
    assert [scenes.parse_caption(caption) for caption in captions] == CONTENTS


@pytest.mark.parametrize("text", ["", "a dog", "a small red circle moving left on a plain background"])
def test_another_text_is_no_caption(text):
    with pytest.raises(ValueError, match="in the grammar"):
        scenes.parse_caption(text)


@pytest.mark.parametrize("style", scenes.STYLES)
def test_rendering_is_fixed_by_content_style_and_generator(style):
    a, b, c = (scenes.render(CONTENTS[100], style, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(a.frames, b.frames) and np.array_equal(a.centres, b.centres)
    assert not np.array_equal(a.frames, c.frames)
    assert a.frames.shape == (8, 64, 64, 3) and a.frames.dtype == np.uint8


def test_styles_show_the_same_content_otherwise():
    for content in CONTENTS[::101]:
        plain, neon = (scenes.render(content, style, np.random.default_rng(3)) for style in scenes.STYLES)
        assert np.array_equal(plain.centres, neon.centres)
        assert np.abs(plain.frames.astype(int) - neon.frames).mean() > 20


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="found 'oil'"):
        scenes.render(CONTENTS[0], "oil", np.random.default_rng(0))


def outline(shape, centre, radius):
    """Points on the outline, from the geometry alone."""
    angle = np.linspace(0, 2 * np.pi, 64)
    if shape == "circle":
        points = radius * np.stack([np.cos(angle), np.sin(angle)], 1)
    elif shape == "square":
        points = 0.89 * radius * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    else:  # equilateral, apex up, of inradius 0.725 r
        corners = np.deg2rad([-90, 30, 150])
        points = 1.45 * radius * np.stack([np.cos(corners), np.sin(corners)], 1)
    return centre + points


def test_a_shape_is_within_every_frame():
    for i, content in enumerate(SAMPLE):
        clip = scenes.render(content, "plain", np.random.default_rng(i))
        for centre in clip.centres:
            points = outline(content.shape, centre, scenes.RADII[content.size])
            assert points.min() >= 1.9 and points.max() <= scenes.SIDE - 1.9, content


def test_the_shapes_are_those_of_the_outline_and_have_about_the_same_area():
    centre, areas = np.array([32.0, 32.0]), []
    for shape in scenes.SHAPES:
        distance = scenes.shape_distance(shape, 12.0, centre)
        areas.append((distance < 0).sum())
        for x, y in outline(shape, centre, 12.0):
            assert abs(distance[int(y), int(x)]) < 1.5
    assert max(areas) / min(areas) < 1.25 and areas[0] == pytest.approx(np.pi * 144, rel=0.02)


def test_centres_move_by_the_velocity_and_the_velocity_is_the_captions():
    for i, content in enumerate(SAMPLE):
        clip = scenes.render(content, "neon", np.random.default_rng(i))
        np.testing.assert_allclose(np.diff(clip.centres, axis=0), np.tile(clip.velocity, (7, 1)), atol=1e-9)
        x, y = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), None: (0, 0)}[content.direction]
        speed = {"slowly": 1.5, "fast": 3.0, None: 0.0}[content.speed]
        assert np.dot(clip.velocity, (x, y)) == pytest.approx(speed, rel=0.081)
        assert np.linalg.norm(clip.velocity) == pytest.approx(speed, rel=0.081)


def test_the_picture_is_where_the_centre_is():
    for i, content in enumerate(c for c in SAMPLE if c.direction is None):
        clip = scenes.render(content, "plain", np.random.default_rng(i))
        chroma = np.ptp(clip.frames.astype(float), axis=-1)
        body = chroma > 0.6 * chroma.max()
        for frame, centre in zip(body, clip.centres, strict=True):
            rows, columns = np.nonzero(frame)
            assert np.hypot(columns.mean() + 0.5 - centre[0], rows.mean() + 0.5 - centre[1]) < 1
        assert np.array_equal(clip.frames[0], clip.frames[-1])


def test_motion_is_visible_in_a_single_frame():
    """The same place and ground, all the motions: every first frame is another."""
    frames = []
    for content in CONTENTS[:36:4]:
        ground = np.full((64, 64, 3), 0.3)
        velocity = np.asarray(content.velocity)
        frames.append(scenes._draw_plain(ground, content, 8.0, np.array([32.0, 32.0]), velocity))
    for i, a in enumerate(frames):
        assert all(np.abs(a - b).sum() > 10 for b in frames[:i])


def test_splits_are_disjoint_and_about_15_percent_is_held_out():
    held = [content.held_out for content in CONTENTS]
    assert 0.13 < np.mean(held) < 0.17
    drawn = {split: set(scenes.draw_contents(2000, held_out=split, seed=0)) for split in (True, False)}
    assert not drawn[True] & drawn[False]
    assert all(content.held_out == split for split in drawn for content in drawn[split])
    for words in (scenes.RADII, scenes.COLOURS, scenes.SHAPES, scenes.DIRECTIONS, scenes.SPEEDS, scenes.BACKGROUNDS):
        for word in words:
            assert any(word in content.caption for content in drawn[True])


def test_contents_are_drawn_in_even_rounds_still_ones_twice():
    pool = [content for content in CONTENTS if content.held_out]
    still = sum(content.direction is None for content in pool)
    drawn = scenes.draw_contents(2 * (len(pool) + still), held_out=True, seed=1)
    counts = {content: drawn.count(content) for content in pool}
    assert all(count == (4 if content.direction is None else 2) for content, count in counts.items())
    assert scenes.draw_contents(50, held_out=True, seed=1) == drawn[:50]
    assert scenes.draw_contents(50, held_out=True, seed=2) != drawn[:50]


def test_a_clip_of_a_split_depends_on_its_number_alone():
    few, more = (list(scenes.render_split(n, style="plain", held_out=False, seed=4)) for n in (3, 6))
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(few, more, strict=False))
