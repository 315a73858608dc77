"""Prompts that change over a clip, as core's CONDITIONING of one embedding a frame."""

import re

import torch
from torch import Tensor

from ..errors import SentenceError

_LINE = re.compile(r"\s*(\d{1,6})\s*:\s*(.*)")


class PromptError(SentenceError, ValueError):
    """Prompts that cannot be read; the message is one sentence."""


def parse_prompts(text: str) -> dict[int, str]:
    """{frame: prompt} of lines "frame: prompt"; empty lines are left out. PromptError for any other line, or a frame twice."""
    found: dict[int, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise PromptError(
                f"Expected a frame, a colon and a prompt in line {number}, found {line.strip()[:60]!r}; write 8: a cat."
            )
        frame = int(match[1])
        if frame in found:
            raise PromptError(f"Expected each frame once, found {frame} again in line {number}; remove one.")
        found[frame] = match[2].strip()
    if not found:
        raise PromptError("Expected a line such as 0: a cat, found no prompt; write one.")
    return dict(sorted(found.items()))


def blended(embeddings: dict[int, Tensor], frames: int) -> Tensor:
    """(frames, L, D): each frame's embedding, linear between those (1, L, D) of two given frames, constant before and after them."""
    at = sorted(embeddings)
    rows = []
    for frame in range(frames):
        before = max((a for a in at if a <= frame), default=at[0])
        after = min((a for a in at if a >= frame), default=at[-1])
        share = 0.0 if after == before else (frame - before) / (after - before)
        rows.append(torch.lerp(embeddings[before], embeddings[after], share))
    return torch.cat(rows)


def of_one_length(embeddings: dict[int, Tensor], empty: Tensor) -> dict[int, Tensor]:
    """Embeddings (1, k L, D) of prompts of several parts, the shorter ones followed by the empty prompt's (1, L, D)."""
    longest = max(embedding.shape[1] for embedding in embeddings.values())
    return {
        frame: torch.cat([embedding, *[empty] * ((longest - embedding.shape[1]) // empty.shape[1])], 1)
        for frame, embedding in embeddings.items()
    }


def travelling_prompt(clip, text: str, frames: int) -> list:
    """CONDITIONING with an embedding for each of `frames` frames, from lines "frame: prompt". PromptError for others."""
    encoded = {
        frame: clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0] for frame, prompt in parse_prompts(text).items()
    }
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))[0][0]
    embeddings = of_one_length({frame: entry[0] for frame, entry in encoded.items()}, empty)
    return [[blended(embeddings, frames), dict(next(iter(encoded.values()))[1])]]
