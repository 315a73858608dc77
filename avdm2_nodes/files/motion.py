"""AnimateDiff motion modules in one file, original or diffusers' names (AnimateDiff, arXiv 2307.04725).

Original names are those of the authors' code and of what ComfyUI-AnimateDiff-Evolved reads; diffusers' are MotionAdapter's. They
differ in one thing beside the spelling: originally each of the two attention blocks has its own copy of the position encoding, in
diffusers both share one.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import MotionAdapter
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from torch import Tensor

from .containers import Layout, read_layout, read_tensors, write_tensors
from .recognise import motion_widths, recognise, require
from .sentences import FileFormatError, one_line, whole_number
from .weights import require_weights

_ANIMATELCM = "motion-animatelcm"
_KINDS = ("motion-v1", "motion-v2", "motion-v3", _ANIMATELCM)
_WHOLE = "video-unet"  # AnimateDiff's own training saves the spatial layers along
_MOST_BLOCKS, _MOST_LAYERS = 8, 8  # published modules have four blocks of two or three layers
_ANIMATELCM_FRAMES = 64  # it keeps no position encoding; AnimateDiff-Evolved takes this length

# Original, diffusers'; within a motion module.
_SPELLINGS = (
    ("attention_blocks.0.pos_encoder.pe", "pos_embed.pe"),
    ("attention_blocks.0.", "attn1."),
    ("attention_blocks.1.", "attn2."),
    ("norms.0.", "norm1."),
    ("norms.1.", "norm2."),
    ("ff_norm.", "norm3."),
)
_POSITIONS = ".attention_blocks.0.pos_encoder.pe", ".attention_blocks.1.pos_encoder.pe"
_BLOCK = re.compile(r"(.*\.transformer_blocks\.\d+\.)(.*)")
_MODULE = re.compile(r"(.*\bmotion_modules\.\d+\.)(.*)")


HEADS_KEY = "avdm2.motion_heads"  # of the metadata: the shapes do not tell


def load_motion_file(path: Path, heads: int | None = None, norm_groups: int = 32) -> MotionAdapter:
    """The motion modules in a file: v1, v2, v3, AnimateDiff-Lightning or AnimateLCM, float32 on the CPU, frozen.

    Widths, layers, mid block and length come from the shapes, the position encodings from the file (AnimateLCM has none and gets
    diffusers' sinusoid of 64 frames). Heads leave no trace in the shapes: unless given they are those that our exports note in the
    metadata, else 8 as in every published module, as are 32 norm groups (a video UNet takes its own). Of a whole video UNet, as
    AnimateDiff's training saves it, the motion modules are taken. FileFormatError for a file that is something else, damaged, or made
    for another number of heads.
    """
    path = Path(path)
    layout = read_layout(path)
    kind = require(path, (*_KINDS, _WHOLE), "an AnimateDiff motion module for SD1.5", layout)
    heads = heads or whole_number(layout.metadata.get(HEADS_KEY, "8")) or 8
    original = {key: tensor for key, tensor in read_tensors(path).items() if ".motion_modules." in key}
    if kind.id == _WHOLE:
        kind = recognise(Layout({key: tuple(tensor.shape) for key, tensor in original.items()}))
        if kind.id not in _KINDS:
            raise _unusable(path, kind.phrase)
    require_weights(original, path, "a motion module's weights")
    for key, tensor in original.items():
        if key.endswith(_POSITIONS[0]):
            second = original.get(key.replace(*_POSITIONS))
            if second is None or not torch.equal(tensor, second):
                raise _unusable(
                    path, f"{one_line(key)} unlike that of the other attention block, and diffusers holds one for both"
                )
    tensors = to_diffusers_keys(original)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    widths = motion_widths(shapes)
    if not widths or any(width % heads or width % norm_groups for width in widths):
        raise _unusable(path, f"widths {widths}, which {heads} heads and {norm_groups} norm groups do not divide")
    layers = _count(shapes, r"down_blocks\.0\.motion_modules\.(\d+)\.")
    within = _count(shapes, r"down_blocks\.0\.motion_modules\.0\.transformer_blocks\.(\d+)\.")
    lengths = {shape[1] for key, shape in shapes.items() if key.endswith(".pe") and len(shape) == 3}
    if kind.id == _ANIMATELCM:
        lengths = {_ANIMATELCM_FRAMES}
    if len(widths) > _MOST_BLOCKS or layers * within > _MOST_LAYERS or not lengths:
        found = f"{len(widths)} blocks of {layers} layers" if lengths else "no position encodings (1, frames, width)"
        raise _unusable(path, found)
    with torch.device("meta"):
        motion = MotionAdapter(
            block_out_channels=widths,
            motion_layers_per_block=layers,
            motion_transformer_layers_per_block=within,
            motion_num_attention_heads=heads,
            motion_norm_num_groups=norm_groups,
            motion_max_seq_length=max(lengths),
            use_motion_mid_block=any(key.startswith("mid_block.") for key in shapes),
        )
    expected = {key: tuple(tensor.shape) for key, tensor in motion.state_dict().items()}
    # AnimateLCM's position encodings are made below, once the widths are known to be those of its weights.
    made = {key: shape for key, shape in expected.items() if key.endswith(".pe") and kind.id == _ANIMATELCM}
    shapes |= made
    unlike = [key for key in expected.keys() | shapes.keys() if expected.get(key) != shapes.get(key)]
    if unlike:
        raise _unusable(path, f"{len(unlike)} layers unlike those of one of widths {widths} (such as {one_line(min(unlike))})")
    tensors |= {key: SinusoidalPositionalEmbedding(width, length).pe for key, (_, length, width) in made.items()}
    # Copies, so that the module does not hang on the file.
    motion.load_state_dict({key: tensor.to(torch.float32, copy=True) for key, tensor in tensors.items()}, assign=True)
    return motion.eval().requires_grad_(False)


def export_motion_file(
    state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], dtype: torch.dtype = torch.float16
) -> None:
    """Writes the motion modules in `state`, of a MotionAdapter, a UNetMotionModel or a student, under original names.

    Whatever else `state` holds is left out. FileFormatError for a state without motion modules or without their position
    encodings (a reader would take the file for AnimateLCM), and where nothing can be written.
    """
    motion = {key: tensor for key, tensor in state.items() if "motion_modules." in key}
    modules = {match[1] for key in motion if (match := _MODULE.fullmatch(key))}
    without = sorted(m for m in modules if not any(key.startswith(m) and key.endswith("pos_embed.pe") for key in motion))
    if not modules or without:
        found = f"none of {without[0].rstrip('.')}" if modules else "no motion module"
        raise FileFormatError(
            f"Expected motion modules with their position encodings for {path}, found {found}; give a model's whole state_dict()."
        )
    write_tensors(path, {key: tensor.to(dtype) for key, tensor in to_original_keys(motion).items()}, metadata)


def to_diffusers_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original names -> diffusers', of the two copies of a position encoding the first; names that are diffusers' already stay."""
    return {
        _respelt(key.replace(".temporal_transformer.", "."), _SPELLINGS): tensor
        for key, tensor in tensors.items()
        if not key.endswith(_POSITIONS[1])
    }


def to_original_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names -> original, the position encoding under both attention blocks; the inverse of `to_diffusers_keys`."""
    renamed = {}
    for key, tensor in tensors.items():
        new = _respelt(key, [(theirs, original) for original, theirs in _SPELLINGS])
        new = _MODULE.sub(r"\1temporal_transformer.\2", new)
        renamed[new] = tensor
        if key.endswith("pos_embed.pe"):
            renamed[new.replace(*_POSITIONS)] = tensor
    return renamed


def _respelt(key: str, spellings: Sequence[tuple[str, str]]) -> str:
    """`key` with the start of its name within a transformer block, if it has one, spelt anew."""
    match = _BLOCK.fullmatch(key)
    for before, after in spellings:
        if match and match[2].startswith(before):
            return match[1] + after + match[2].removeprefix(before)
    return key


def _count(keys: Iterable[str], pattern: str) -> int:
    return len({match[1] for key in keys if (match := re.match(pattern, key))})


def _unusable(path: Path, found: object) -> FileFormatError:
    return FileFormatError(f"Expected a whole AnimateDiff motion module at {path}, found {found}; choose another file.")
