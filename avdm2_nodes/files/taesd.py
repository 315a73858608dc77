"""TAESD's decoder in one file: a small network in place of the VAE's, for fast frames of less detail (github.com/madebyollin/taesd)."""

import re
from pathlib import Path

import torch
from diffusers import AutoencoderTiny

from .containers import read_tensors
from .sentences import FileFormatError, one_line
from .weights import require_weights

_ORIGINAL = re.compile(r"(?:taesd_decoder\.|decoder\.)?(\d{1,4})\.(.+)")  # its own name, or ComfyUI's in a file of both halves
_DIFFUSERS = "decoder.layers."


def load_taesd_file(path: Path) -> AutoencoderTiny:
    """TAESD for SD1.5 as an autoencoder that can only decode, float32 on the CPU, frozen.

    Reads the authors' `taesd_decoder.safetensors`, and diffusers' file of both halves. FileFormatError for anything else.
    """
    path = Path(path)
    tensors = read_tensors(path)
    found = {f"decoder.layers.{name}": tensor for name, tensor in _decoder(tensors).items()}
    with torch.device("meta"):
        taesd = AutoencoderTiny()  # its defaults are SD1.5's
    taesd.encoder = None
    expected = {name: tensor.shape for name, tensor in taesd.state_dict().items()}
    if {name: tensor.shape for name, tensor in found.items()} != expected:
        raise FileFormatError(
            f"Expected TAESD's decoder for SD1.5 at {path}, found other tensors (such as {one_line(min(tensors, default='none'))!r}); "
            "choose taesd_decoder.safetensors."
        )
    require_weights(found, path, "TAESD's decoder", "choose taesd_decoder.safetensors")
    taesd.load_state_dict({name: tensor.float().clone() for name, tensor in found.items()}, assign=True)
    return taesd.eval().requires_grad_(False)


def _decoder(tensors: dict) -> dict:
    """The decoder's tensors under the numbers that diffusers gives its layers: originally the first layer is the clamp."""
    if any(name.startswith(_DIFFUSERS) for name in tensors):
        return {name.removeprefix(_DIFFUSERS): tensor for name, tensor in tensors.items() if name.startswith(_DIFFUSERS)}
    numbered = {match: tensor for name, tensor in tensors.items() if (match := _ORIGINAL.fullmatch(name))}
    return {f"{int(match[1]) - 1}.{match[2]}": tensor for match, tensor in numbered.items()}
