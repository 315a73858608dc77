import pytest

from training.data import DataError
from training.data.sources import require_positions, require_whole


def test_more_frames_than_positions_are_refused(stack):
    require_positions(stack.motion, 32)
    require_positions(None, 99)
    with pytest.raises(DataError, match=r"data\.frames of 32 at most.*found 33; lower it"):
        require_positions(stack.motion, 33)


def test_captions_that_are_cut_are_refused_where_that_is_asked_for():
    require_whole(["long"], strict=False)
    require_whole([], strict=True)
    with pytest.raises(DataError, match="found 1 that are cut, first 'long'"):
        require_whole(["long"], strict=True)
