import pytest

from training.data.order import epoch_order, indices, rank_places


def test_every_pass_is_a_fresh_permutation():
    passes = [epoch_order(50, 3, epoch) for epoch in range(4)]
    assert all(sorted(order) == list(range(50)) for order in passes)
    assert len({tuple(order) for order in passes}) == 4
    assert epoch_order(50, 3, 2) == passes[2] != epoch_order(50, 4, 2)


def test_indices_are_slices_of_one_stream():
    stream = [i for epoch in range(5) for i in epoch_order(7, 1, epoch)]
    assert indices(0, 35, 7, 1) == stream
    assert [i for p in range(0, 32, 4) for i in indices(p, 4, 7, 1)] == stream[:32]
    ranks = [indices(8 + rank * 2, 2, 7, 1) for rank in range(2)]
    assert ranks[0] + ranks[1] == indices(8, 4, 7, 1)
    assert indices(5, 3, 1, 1) == [0, 0, 0]


@pytest.mark.parametrize("length", [1, 5, 12, 13, 40])
@pytest.mark.parametrize(("batch", "ranks"), [(1, 1), (4, 1), (4, 2), (6, 3), (12, 4)])
def test_ranks_take_disjoint_parts_and_no_clip_twice_in_a_pass(length, batch, ranks):
    passes = [[] for _ in range(-(-10 * batch // length))]
    for step in range(10):
        parts = [rank_places(step * batch, batch, rank, ranks) for rank in range(ranks)]
        assert [place for part in parts for place in part] == list(range(step * batch, (step + 1) * batch))
        assert len({len(part) for part in parts}) == 1
        for part in parts:
            for place, sample in zip(part, indices(part.start, len(part), length, 7), strict=True):
                passes[place // length].append(sample)
    assert all(len(set(seen)) == len(seen) for seen in passes)
    assert all(sorted(seen) == list(range(length)) for seen in passes[:-1])


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="3 processes share equally, found 8"):
        rank_places(0, 8, 0, 3)
    with pytest.raises(ValueError, match="from 0 to 1, found 2"):
        rank_places(0, 8, 2, 2)


def test_the_order_is_pinned():
    """A run that is resumed under another release of NumPy needs the same stream."""
    assert epoch_order(8, 0, 0) == [2, 4, 3, 6, 5, 0, 1, 7]
