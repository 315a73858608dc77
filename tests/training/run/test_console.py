import argparse

import pytest

from training.run.console import between, scale


def test_numbers_within_their_bounds():
    assert [between(1, 30)(text) for text in ("1", "007", "30")] == [1, 7, 30]
    assert [scale(text) for text in ("0", "1e-3", "7.5")] == [0, 0.001, 7.5]


@pytest.mark.parametrize("text", ["0", "31", "-1", "1.0", "", "x"])
def test_other_whole_numbers_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"from 1 to 30, found {text!r}"):
        between(1, 30)(text)


@pytest.mark.parametrize("text", ["-0.1", "nan", "inf", "", "x"])
def test_other_scales_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"a number from 0, found {text!r}"):
        scale(text)
