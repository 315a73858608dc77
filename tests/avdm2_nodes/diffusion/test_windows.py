from itertools import pairwise

import pytest
import torch

from avdm2_nodes.diffusion.windows import window_starts, window_weights, windowed


@pytest.mark.parametrize(
    ("frames", "length", "overlap"), [(17, 16, 4), (64, 16, 4), (33, 32, 0), (100, 24, 23), (40, 16, 8), (9, 8, 2)]
)
def test_windows_cover_all_frames_and_overlap(frames, length, overlap):
    starts = window_starts(frames, length, overlap)
    assert starts[0] == 0 and starts[-1] == frames - length and starts == sorted(set(starts))
    gaps = [b - a for a, b in pairwise(starts)]
    assert max(gaps) <= length - overlap and max(gaps) - min(gaps) <= 1
    fewer = length + (len(starts) - 2) * (length - overlap)  # what one window less could cover at this overlap
    assert fewer < frames


def test_a_clip_that_fits_is_one_window():
    assert window_starts(16, 16, 4) == [0] and window_starts(3, 16, 4) == [0]


@pytest.mark.parametrize("overlap", [-1, 16, 20])
def test_an_impossible_overlap_is_told(overlap):
    with pytest.raises(ValueError, match=rf"Expected an overlap from 0 to 15 frames for windows of 16, found {overlap}"):
        window_starts(40, 16, overlap)


def test_weights_fall_linearly_and_are_never_zero():
    assert window_weights(8, 3).tolist() == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25])
    assert window_weights(4, 0).tolist() == [1, 1, 1, 1]


def test_a_model_that_looks_at_single_frames_does_not_notice_windows():
    def frames_only(x_t, t, text):
        return torch.tanh(x_t) * t.view(-1, 1, 1, 1, 1)

    x_t, t = torch.randn(2, 4, 21, 3, 3), torch.tensor([5, 7])
    torch.testing.assert_close(windowed(frames_only, 8, 2)(x_t, t, None), frames_only(x_t, t, None))


def test_a_frame_is_the_weighted_mean_of_its_windows():
    def position(x_t, t, text):
        assert x_t.shape[2] == 4
        return torch.arange(4.0).view(1, 1, 4, 1, 1).expand_as(x_t)

    eps = windowed(position, 4, 2)(torch.zeros(1, 1, 6, 1, 1), torch.zeros(1), None).flatten()
    # Windows start at 0 and 2, weights 1/3, 2/3, 2/3, 1/3.
    expected = [0, 1, (2 * 2 + 0 * 1) / 3, (3 * 1 + 1 * 2) / 3, 2, 3]
    assert eps.tolist() == pytest.approx(expected)


def test_short_clips_go_straight_through():
    calls = []
    predict = windowed(lambda *args: calls.append(args) or args[0], 8, 2)
    x_t = torch.randn(1, 4, 8, 2, 2)
    assert predict(x_t, 1, 2) is x_t and len(calls) == 1


def test_half_a_window_overlaps_unless_given():
    x_t, seen = torch.randn(1, 1, 20, 1, 1), []

    def remember(x_t, t, text):
        seen.append(x_t.shape[2])
        return x_t

    torch.testing.assert_close(windowed(remember, 8)(x_t, None, None), x_t)
    assert seen == [8] * len(window_starts(20, 8, 4))
