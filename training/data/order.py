"""The order in which clips are drawn, which numbers alone decide: a seed and a place in an endless stream."""

from functools import lru_cache

import numpy as np


def epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    """The permutation of range(length) in which pass `epoch` visits the samples."""
    return list(_permutation(length, seed, epoch))


def indices(position: int, count: int, length: int, seed: int) -> list[int]:
    """The samples at places position … position + count - 1 of an endless stream of passes, each in its own `epoch_order`.

    Numbers alone decide, no state: a resumed run and any slicing over ranks draw the same samples.
    """
    return [_permutation(length, seed, place // length)[place % length] for place in range(position, position + count)]


def rank_places(position: int, count: int, rank: int, ranks: int) -> range:
    """The places of a global batch (position … position + count - 1) that one of `ranks` processes takes: the rank-th equal part.

    All parts together are the batch, none has a place of another's; `indices(places.start, len(places), …)` are their samples.
    ValueError for a batch that cannot be cut so, or a rank that is none.
    """
    if ranks < 1 or count % ranks:
        raise ValueError(f"Expected a batch that {ranks} processes share equally, found {count} clips; change one of them.")
    if not 0 <= rank < ranks:
        raise ValueError(f"Expected a rank from 0 to {ranks - 1}, found {rank}.")
    part = count // ranks
    return range(position + rank * part, position + (rank + 1) * part)


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, epoch]).permutation(length).tolist())
