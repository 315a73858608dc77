"""Randomness keyed by what it is for, never by what was drawn before.

A seed, an update, a role and the *global* index of a sample name a generator. Resuming is thereby exact without a saved random
state, and one process draws what two would (the habit of NVlabs/edm2's training loop, taken down to the sample).
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def keyed_generator(*key) -> torch.Generator:
    """A CPU generator seeded by the printable words of `key`."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def sample_generators(samples: Sequence[int], *key) -> list[torch.Generator]:
    """One generator for each global sample index."""
    return [keyed_generator(*key, sample) for sample in samples]


def draw_timesteps(generators: list[torch.Generator], low: Tensor, high: int) -> Tensor:
    """(B,) timesteps, sample i's uniform in low[i]..high inclusive and from its own generator."""
    bounds = zip(low.tolist(), generators, strict=True)
    return torch.cat([torch.randint(first, high + 1, (1,), generator=g) for first, g in bounds])


def draw_frames(generators: list[torch.Generator], frames: int, count: int) -> Tensor:
    """(B, count) different frame numbers of `frames`, each row from its own generator."""
    return torch.stack([torch.randperm(frames, generator=g)[:count] for g in generators])


def chain_steps(samples: Sequence[int], steps: int, seed: int) -> Tensor:
    """(B,) steps 0..steps-1 of the student's chain, one for each global sample index.

    Every `steps` samples in a row get each step once, in random order: whatever the batch, no step goes short and all batches of
    a multiple of `steps` cost the same.
    """
    orders = {n: torch.randperm(steps, generator=keyed_generator(seed, "chain", n)) for n in {s // steps for s in samples}}
    return torch.stack([orders[s // steps][s % steps] for s in samples])
