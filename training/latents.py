"""Captioned clips in model space, as the training loop asks for them."""

import torch
from torch import Tensor

from avdm2_nodes.diffusion.stack import Stack
from training.data import ClipFolder
from training.precision import autocast


class LatentClips:
    """Clips of a folder, encoded when they are first asked for and kept in memory from then on."""

    def __init__(self, clips: ClipFolder, stack: Stack, device: torch.device, precision: str = "auto"):
        self.clips, self.stack, self.device, self.precision = clips, stack, device, precision
        self._latents: dict[int, Tensor] = {}
        self._texts: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.clips)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """(clips (B, C, F, h, w), text embeddings (B, L, D)) of some indices, float32, on the device."""
        missing = sorted({i for i in indices if i not in self._latents})
        if missing:
            frames = torch.stack([self.clips.read(i) for i in missing])
            with autocast(self.device, self.precision):
                self._latents.update(zip(missing, self.stack.encode_clips(frames).cpu(), strict=True))
        clips = torch.stack([self._latents[i] for i in indices]).to(self.device)
        return clips, self.text([self.clips.captions[i] for i in indices])

    def text(self, captions: list[str]) -> Tensor:
        """(B, L, D) float32 embeddings of captions, each computed once."""
        missing = sorted(set(captions) - self._texts.keys())
        if missing:
            self._texts.update(zip(missing, self.stack.encode_text(missing).float().cpu(), strict=True))
        return torch.stack([self._texts[caption] for caption in captions]).to(self.device)
