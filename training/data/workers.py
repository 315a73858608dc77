"""Clips of videos, decoded by worker processes and encoded in order."""

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from training.data import DataError
from training.data.cache import LatentClip, Maker
from training.data.clips import ClipFolder
from training.data.latents import Encoder
from training.data.unusable import Unusable
from training.data.video import VideoError


class _Frames(Dataset):
    """What worker processes make of a clip: its frames (F, H, W, 3) uint8 and their rate, or why it cannot be used."""

    def __init__(self, clips: ClipFolder):
        self.clips = clips

    def __getitem__(self, index: int) -> tuple[np.ndarray, float | None] | Unusable:
        try:
            frames, rate = self.clips.decode(index)
            return frames.numpy(), rate
        except VideoError as error:
            return Unusable(self.clips.entries[index].name, str(error), error.kind)


def _as_it_is(item):
    return item


def _end_with_parent(worker: int) -> None:
    """A worker whose command was killed would wait for ever to hand over its clip."""
    parent = multiprocessing.parent_process().pid

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def told_of_workers() -> Iterator[None]:
    """The end of a process that decodes as DataError. PyTorch raises it wherever this process then is: encoding, or writing a shard."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"Expected the processes that decode to go on, found: {str(error).splitlines()[0]}; "
            "lower --workers if memory is short, and give the command again: it goes on."
        ) from error


def encoded_videos(clips: ClipFolder, encoder: Encoder, workers: int) -> tuple[dict, Maker]:
    """(what the clips are made of, their maker): decoded by worker processes a few clips ahead, encoded one by one in their order."""

    def make(parts: Sequence[range]) -> Iterator[LatentClip | Unusable]:
        order = [i for part in parts for i in part]
        # Arrays go through a pipe, not through shared memory, of which containers have little.
        frames = DataLoader(
            _Frames(clips), None, sampler=order, num_workers=workers, collate_fn=_as_it_is, worker_init_fn=_end_with_parent
        )
        for i, found in zip(order, frames, strict=True):
            entry = clips.entries[i]
            if isinstance(found, Unusable):
                yield found
            else:
                frames, rate = found
                latents = encoder.clip(torch.from_numpy(frames))
                yield LatentClip(entry.name, entry.caption, latents, encoder.text(entry.caption), rate)

    return {"kind": "videos", "videos": clips.fingerprint()}, make
