"""Captioned clips in model space, as the training loop asks for them."""

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from avdm2_nodes.files.sentences import one_line
from avdm2_nodes.files.stack import Stack
from training.data.cache import Cache, is_cache, space_of
from training.data.captions import cut_by
from training.data.clips import ClipFolder, tell_of_rates
from training.data.unusable import require_none, told
from training.run.config import DistillConfig
from training.run.precision import autocast, lent

log = logging.getLogger(__name__)

_TEXTS = 1024  # embeddings kept in memory: of SD1.5 a quarter of a gigabyte


class Encoder:
    """Takes clips and captions into a stack's model space.

    Each is encoded alone: the last bits of a batch's result may depend on its size, and a resumed run meets other batches.
    """

    def __init__(self, stack: Stack, device: torch.device, precision: str = "auto"):
        self.stack, self.device, self.precision = stack, device, precision
        self.text = lru_cache(_TEXTS)(self._text)

    def clip(self, frames: Tensor) -> Tensor:
        """(F, H, W, 3) uint8 -> (C, F, h, w) float32 on the CPU."""
        with lent(self.device, self.stack.vae), autocast(self.device, self.precision):
            return self.stack.encode_clips(frames[None])[0].cpu()

    def tell_of_cut(self, captions: Sequence[str]) -> list[str]:
        """Those that are longer than the text encoder takes, after a word in the log about them."""
        if cut := cut_by(self.stack.tokenizer, captions):
            log.warning(
                "%d captions are longer than the text encoder takes (%d tokens): the rest of each is not seen. The first: %s",
                len(cut), self.stack.tokenizer.model_max_length, one_line(cut[0]),
            )  # fmt: skip
        return cut

    def _text(self, caption: str) -> Tensor:
        """(L, D) float32 on the CPU."""
        with lent(self.device, self.stack.text_encoder):
            return self.stack.encode_text([caption])[0].float().cpu()


class EncodedClips:
    """Clips of videos in model space, encoded when they are first asked for and kept in memory from then on.

    Until all of them are, VAE and text encoder stay on the device.
    """

    def __init__(self, clips: ClipFolder, encoder: Encoder):
        self.clips, self.encoder, self.captions = clips, encoder, clips.captions
        self._latents: dict[int, Tensor] = {}
        self._place_encoders(encoder.device)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """(clip (C, F, h, w), text embedding (L, D)), float32 on the CPU. VideoError if its file went bad meanwhile."""
        if index not in self._latents:
            self._latents[index] = self.encoder.clip(self.clips.read(index))
            if len(self._latents) == len(self.captions):
                self._place_encoders(torch.device("cpu"))
        return self._latents[index], self.encoder.text(self.captions[index])

    def _place_encoders(self, device: torch.device) -> None:
        for part in (self.encoder.stack.vae, self.encoder.stack.text_encoder):
            part.to(device)


class Prompts:
    """Captions alone, for losses that look at no clip but the student's: in place of a clip there are zeros."""

    def __init__(self, captions: list[str], shape: Sequence[int], encoder: Encoder):
        self.captions, self.encoder, self.clip = captions, encoder, torch.zeros(*shape)
        encoder.stack.text_encoder.to(encoder.device)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """(zeros (C, F, h, w), text embedding (L, D)), float32 on the CPU."""
        return self.clip, self.encoder.text(self.captions[index])


class LatentClips:
    """Batches of captioned clips of `shape` (C, F, h, w) in model space on a device, from videos, from a cache, or of captions alone."""

    def __init__(self, source: EncodedClips | Cache | Prompts, encoder: Encoder, shape: Sequence[int]):
        self.source, self.encoder, self.shape = source, encoder, shape

    def __len__(self) -> int:
        return len(self.source.captions)

    @property
    def captions(self) -> list[str]:
        return self.source.captions

    def identity(self) -> dict[str, str | int]:
        """What tells these clips apart from others: their number and a hash of their captions and, where there are any, their pictures."""
        source = self.source
        pictures = source.clips.fingerprint() if isinstance(source, EncodedClips) else getattr(source, "fingerprint", "")
        words = json.dumps([self.captions, pictures])
        return {"clips": len(self), "sha256": hashlib.sha256(words.encode()).hexdigest()}

    def batch(self, indices: list[int], clips: bool = True) -> tuple[Tensor, Tensor]:
        """(clips (B, C, F, h, w), text embeddings (B, L, D)) of some indices, float32, on the device.

        Where nobody looks at the clips, `clips` is false: there are zeros in their place, and no video is decoded or encoded.
        """
        if not clips:
            text = self.text([self.captions[i] for i in indices])
            return torch.zeros(len(indices), *self.shape, device=self.encoder.device), text
        clips, texts = zip(*(self.source.read(i) for i in indices), strict=True)
        return torch.stack(clips).to(self.encoder.device), torch.stack(texts).to(self.encoder.device)

    def text(self, captions: list[str]) -> Tensor:
        """(B, L, D) float32 embeddings of captions, on the device."""
        return torch.stack([self.encoder.text(caption) for caption in captions]).to(self.encoder.device)


def latent_shape(config: DistillConfig, encoder: Encoder) -> tuple[int, int, int, int]:
    """(C, F, h, w) of the clips that the settings ask for."""
    data, stack = config.data, encoder.stack
    return stack.vae.config.latent_channels, data.frames, data.height // stack.pixels, data.width // stack.pixels


def open_clips(config: DistillConfig, stack: Stack, device: torch.device) -> LatentClips:
    """The clips that `data.folder` names: videos and tar shards are checked, and encoded as they are asked for; a cache is verified.

    DataError for a folder that cannot be used, as `ClipFolder` and `Cache`.
    """
    data, encoder = config.data, Encoder(stack, device, config.run.precision)
    if is_cache(data.folder):
        cache = Cache(data.folder, space_of(stack, data))
        require_none(cache.left_out, data.folder, data.strict)
        told(data.folder, len(cache), "clips", cache.left_out)
        if data.fps is None:
            tell_of_rates(cache.rates)
        return LatentClips(cache, encoder, latent_shape(config, encoder))
    clips = ClipFolder(data.folder, data.frames, data.height, data.width, data.stride, fps=data.fps, strict=data.strict)
    return LatentClips(EncodedClips(clips, encoder), encoder, latent_shape(config, encoder))
