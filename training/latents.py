"""Captioned clips in model space, as the training loop asks for them."""

import torch
from torch import Tensor

from avdm2_nodes.diffusion.stack import Stack
from training.data import ClipFolder
from training.precision import autocast


class LatentClips:
    """Clips of a folder, encoded when they are first asked for and kept in memory from then on.

    Each is encoded alone: the last bits of a batch's result may depend on its size, and a resumed run meets other batches.
    """

    def __init__(self, clips: ClipFolder, stack: Stack, device: torch.device, precision: str = "auto"):
        self.clips, self.stack, self.device, self.precision = clips, stack, device, precision
        self._latents: dict[int, Tensor] = {}
        self._texts: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.clips)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """(clips (B, C, F, h, w), text embeddings (B, L, D)) of some indices, float32, on the device."""
        for i in sorted(set(indices) - self._latents.keys()):
            with autocast(self.device, self.precision):
                self._latents[i] = self.stack.encode_clips(self.clips.read(i)[None])[0].cpu()
        clips = torch.stack([self._latents[i] for i in indices]).to(self.device)
        return clips, self.text([self.clips.captions[i] for i in indices])

    def text(self, captions: list[str]) -> Tensor:
        """(B, L, D) float32 embeddings of captions, each computed once."""
        for caption in sorted(set(captions) - self._texts.keys()):
            self._texts[caption] = self.stack.encode_text([caption])[0].float().cpu()
        return torch.stack([self._texts[caption] for caption in captions]).to(self.device)
