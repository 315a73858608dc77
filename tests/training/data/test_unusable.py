import logging

import pytest

from training.data import DataError
from training.data.unusable import Unusable, counted, named, require_none, told

TWO = [Unusable("a.mp4", "It is torn."), Unusable("b.mp4", "It has none.", "without a caption"), Unusable("c.mp4", "Torn too.")]


def test_they_are_counted_by_kind():
    assert counted(TWO) == "3 skipped: 2 damaged, 1 without a caption"
    assert counted([]) == "0 skipped"


def test_each_is_named_and_all_are_summed_up(caplog):
    with caplog.at_level(logging.INFO):
        named(TWO)
        told("folder", 5, "clips", TWO)
        told("other", 5, "pictures", [])
    assert [record.getMessage() for record in caplog.records] == [
        "Skipped a.mp4: It is torn.", "Skipped b.mp4: It has none.", "Skipped c.mp4: Torn too.",
        "folder: 5 clips are used, 3 skipped: 2 damaged, 1 without a caption.", "other: 5 pictures are used, 0 skipped.",
    ]  # fmt: skip
    assert [record.levelname for record in caplog.records[-2:]] == ["WARNING", "INFO"]


def test_strict_refuses_any():
    require_none(TWO, "folder", strict=False)
    require_none([], "folder", strict=True)
    with pytest.raises(DataError, match=r"folder .*3 skipped.*first a\.mp4: It is torn; mend"):
        require_none(TWO, "folder", strict=True)


def test_a_name_that_would_move_the_cursor_is_spelt_out(caplog):
    named([Unusable("a\n\x1b[31m.mp4", "It is \x07 torn.")])
    assert caplog.messages == ["Skipped a\\n\\x1b[31m.mp4: It is \\x07 torn."]
