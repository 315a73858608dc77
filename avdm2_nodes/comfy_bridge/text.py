"""Prompts: ComfyUI's CONDITIONING, and a stack's text encoder as core's CLIPTextEncode calls it."""

import math

import torch
from comfy.sd1_clip import escape_important, token_weights, unescape_important
from torch import Tensor

from . import memory

_NOT_READ = {
    "control": "a ControlNet",
    "gligen": "GLIGEN boxes",
    "area": "an area",
    "mask": "a mask",
    "hooks": "hooks",
}


class PromptError(ValueError):
    """A CONDITIONING that cannot be used; the message is one sentence."""


def text_of(conditioning: list, width: int, name: str = "positive") -> Tensor:
    """The embeddings (1, L, D) of a CONDITIONING. PromptError for several prompts at once, another width or what is not read."""
    if len(conditioning) != 1:
        raise PromptError(
            f"Expected one prompt at {name}, found {len(conditioning)}; join them with Conditioning (Concat), or write them as "
            "one prompt."
        )
    text, extras = conditioning[0]
    for key, what in _NOT_READ.items():
        if extras.get(key) is not None:
            raise PromptError(
                f"Expected a plain prompt at {name}, found {what} on it, which this sampler cannot follow; remove it."
            )
    if extras.get("start_percent", 0.0) > 0.0 or extras.get("end_percent", 1.0) < 1.0:
        raise PromptError(f"Expected a prompt for all steps at {name}, found a range of timesteps on it; remove it.")
    if text.ndim != 3 or text.shape[-1] != width:
        raise PromptError(
            f"Expected text embeddings of width {width} at {name}, found {text.shape[-1]}; encode the prompt with the CLIP of this "
            "model's own Teacher Loader."
        )
    if len(text) != 1:
        raise PromptError(
            f"Expected one prompt for the whole clip at {name}, found {len(text)}, as nodes make that change the prompt from frame to "
            "frame; use CLIP Text Encode."
        )
    return text.float()


def of_one_length(*texts: Tensor) -> list[Tensor]:
    """Embeddings (1, L_i, D) repeated to a common length, which attention does not notice."""
    length = math.lcm(*(text.shape[1] for text in texts))
    return [text.repeat(1, length // text.shape[1], 1) for text in texts]


class StackCLIP:
    """A diffusers stack's tokenizer and text encoder, as CLIPTextEncode and its like call a CLIP.

    Core's own CLIP has a vocabulary of 49,408 built in. Prompts longer than the encoder are encoded part by part, and
    `(words:1.2)` weighs words against the empty prompt, both as core does.
    """

    def __init__(self, tokenizer, text_encoder):
        self.tokenizer = tokenizer
        self.patcher = memory.text_patcher(text_encoder)

    def clone(self) -> "StackCLIP":
        copy = object.__new__(StackCLIP)
        copy.tokenizer, copy.patcher = self.tokenizer, self.patcher.clone()
        return copy

    def tokenize(self, text: str, return_word_ids: bool = False, **kwargs) -> dict[str, list]:
        """Parts of the encoder's length, each a list of (token, weight)."""
        start, end, pad = (
            (getattr(self.tokenizer, f"{kind}_token_id"), 1.0) for kind in ("bos", "eos", "pad")
        )  # fmt: skip
        weighted = []
        for piece, weight in token_weights(escape_important(text), 1.0):
            tokens = self.tokenizer(unescape_important(piece), add_special_tokens=False, verbose=False).input_ids
            weighted += [(token, weight) for token in tokens]
        room = self.tokenizer.model_max_length - 2
        parts = [weighted[i : i + room] for i in range(0, max(len(weighted), 1), room)]
        return {"stack": [[start, *part, end, *[pad] * (room - len(part))] for part in parts]}

    def encode_from_tokens(self, tokens: dict[str, list], return_pooled: bool = False, return_dict: bool = False):
        """(1, k L, D) for k parts; no pooled embedding, which no video UNet of this family reads."""
        (encoder,) = memory.load([self.patcher])
        device = self.patcher.load_device
        parts = tokens["stack"]
        empty = self.tokenize("")["stack"]
        ids = torch.tensor([[token for token, _ in part] for part in [*parts, *empty]], device=device)
        with torch.no_grad():
            *encoded, nothing = (encoder(row[None]).last_hidden_state for row in ids)
        weights = torch.tensor([[weight for _, weight in part] for part in parts], device=device)[:, None, :, None]
        weighed = [
            part if bool((weight == 1).all()) else nothing + (part - nothing) * weight
            for part, weight in zip(encoded, weights, strict=True)
        ]
        text = torch.cat(weighed, dim=1).float().cpu()
        if return_dict:
            return {"cond": text, "pooled_output": None}
        return (text, None) if return_pooled else text

    def encode_from_tokens_scheduled(
        self, tokens, unprojected: bool = False, add_dict: dict | None = None, show_pbar: bool = True
    ):
        """CONDITIONING."""
        return [[self.encode_from_tokens(tokens), {"pooled_output": None, **(add_dict or {})}]]
