"""SparseCtrl files (arXiv 2311.16933): a ControlNet with motion modules that knows some frames of a clip, as AnimateDiff publishes them.

`v3_sd15_sparsectrl_rgb` takes latents of the frames, `v3_sd15_sparsectrl_scribble` pictures of lines. diffusers' name for the network is
SparseControlNetModel, whose parameters have the names that come out here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from torch import Tensor

from .containers import read_layout, read_tensors
from .motion import to_diffusers_keys
from .recognise import recognise
from .sentences import FileFormatError, one_line
from .weights import require_weights

_PREFIXES = ("controlnet.", "module.")  # that training code puts around all names
_SIMPLE, _DEEP = "controlnet_cond_embedding.weight", "controlnet_cond_embedding.conv_in.weight"
_POSITIONS = 32  # of modules whose file has no position encodings: AnimateDiff v3's


@dataclass(frozen=True)
class SparseControlFile:
    """The tensors of a SparseCtrl network under diffusers' names."""

    tensors: Mapping[str, Tensor] = field(repr=False)
    latents: bool  # whether it takes latents of frames; else pictures

    @property
    def motion(self) -> dict[str, Tensor]:
        """Those of its motion modules, position encodings among them."""
        return {name: tensor for name, tensor in self.tensors.items() if ".motion_modules." in name}

    @property
    def hint_channels(self) -> int:
        """Of a frame and the mask that says whether it is known."""
        return self.tensors[_SIMPLE if self.latents else _DEEP].shape[1]


def read_sparse_control(path: Path) -> SparseControlFile:
    """Reads a SparseCtrl file, tensors in their own dtype on the CPU. FileFormatError for any other file."""
    path = Path(path)
    tensors = to_diffusers_keys(_unwrapped(read_tensors(path)))
    embedding = next((name for name in (_SIMPLE, _DEEP) if name in tensors), None)
    if embedding is None or not any(".motion_modules." in name for name in tensors):
        found = "a ControlNet without motion modules" if embedding else recognise(read_layout(path)).phrase
        raise FileFormatError(
            f"Expected a SparseCtrl file at {path}, found {found}; choose v3_sd15_sparsectrl_rgb or v3_sd15_sparsectrl_scribble "
            "(AnimateDiff v3), and load a plain ControlNet with Load ControlNet Model."
        )
    missing = [
        name
        for name in ("conv_in.weight", "controlnet_mid_block.weight", "mid_block.resnets.0.conv1.weight")
        if name not in tensors
    ]
    if missing:
        raise FileFormatError(f"Expected a whole SparseCtrl network at {path}, found none of {missing[0]}; copy it again.")
    require_weights(tensors, path, "a SparseCtrl network's weights")
    norms = [name for name in tensors if name.endswith(".norm1.weight") and ".motion_modules." in name]
    odd = [name for name in norms if tensors[name].ndim != 1 or len(tensors[name]) % 2] + [embedding] * (
        tensors[embedding].ndim != 4
    )
    if odd:
        raise FileFormatError(
            f"Expected a whole SparseCtrl network at {path}, found {one_line(min(odd))} of shape {tuple(tensors[min(odd)].shape)}; "
            "copy it again."
        )
    for name in norms:
        block = name.removesuffix("norm1.weight")
        if f"{block}pos_embed.pe" not in tensors:
            tensors[f"{block}pos_embed.pe"] = SinusoidalPositionalEmbedding(len(tensors[name]), _POSITIONS).pe
    return SparseControlFile(tensors, latents=embedding == _SIMPLE)


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)
