"""Model files as people have them: what they are, told from the names and shapes of their tensors, and safe reading and writing.

To recognise a file no weight is read and neither diffusers nor transformers is imported, and torch only for a pickle, so that a
node may ask about every file of a list. Pickles are never read in a way that runs their code.
"""

import contextlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SAFETENSORS = (".safetensors", ".sft")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")

_HEADER_LIMIT = 100_000_000  # bytes of a .safetensors' header; the library's own limit
_ORIGINAL_UNET = "model.diffusion_model."


class FileFormatError(ValueError):
    """A model file that cannot be read, written or used; the message is one sentence that names it."""


@dataclass(frozen=True)
class Layout:
    """Name and shape of each tensor in a file, and the file's metadata (a pickle has none)."""

    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """What a file is: `id`, which stays as it is, for code, and `phrase`, with its article, for people.

    Ids: student · style · sd15, sd2, sdxl, sd3, flux, svd, each for a whole checkpoint, with -inpainting, -edit, -depth or -other for other
    input channels, and -unet for a UNet or transformer alone · motion-v1, -v2, -v3, -animatelcm, -sdxl, -other · motion-lora ·
    lora, lora-sdxl, lora-other · video-unet · vae · text-encoder · image-encoder · controlnet · ip-adapter · t2i-adapter ·
    textual-inversion · unknown.
    """

    id: str
    phrase: str


# ---- reading and writing ----


def read_layout(path: Path) -> Layout:
    """Names, shapes and metadata of a file without its weights; names as `read_tensors` gives them.

    FileFormatError for a file that is missing, empty, truncated, of another suffix or of other contents than its suffix says (a
    page saved in its stead, a Git LFS pointer), or a pickle that needs code to run.
    """
    path = Path(path)
    _require_container(path)
    if path.suffix.lower() in SAFETENSORS:
        shapes, metadata = _safetensors_header(path)
        return Layout(_without_wrapper(shapes), metadata)
    tensors = _without_wrapper(_unpickled(path, "meta"))
    return Layout({name: tuple(tensor.shape) for name, tensor in tensors.items()})


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """Every tensor of a file by name, in its own dtype, on the CPU. FileFormatError as `read_layout`.

    The tensors may lie in the file itself, mapped into memory: copy what is to outlive it. The wrappers that training code puts
    around the names, `state_dict` and a common `module.`, are taken off.
    """
    path = Path(path)
    _require_container(path)
    if path.suffix.lower() not in SAFETENSORS:
        return _without_wrapper(_unpickled(path, "cpu"))
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _safetensors_header(path)  # its sentences are better
    try:
        return _without_wrapper(load_file(path))
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors, whole or not at all. FileFormatError for another suffix, no such folder, no right or no room."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise FileFormatError(f"Expected a name that ends in .safetensors, found {path}; name the file so.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        # Copies: the format has no tensors that share memory.
        save_file({key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}, temporary, dict(metadata))
        temporary.chmod(mode)  # safetensors leaves a file that only its owner can read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or error
        raise FileFormatError(
            f"Expected room and the right to write {path}, found: {cause}; name another place or make room."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def require(path: Path, ids: Collection[str], expected: str) -> Kind:
    """The kind of the file at `path`; FileFormatError, which says `expected`, where its id is none of `ids`."""
    kind = recognise(read_layout(path))
    if kind.id not in ids:
        raise FileFormatError(f"Expected {expected} at {path}, found {kind.phrase}; choose another file.")
    return kind


def _require_container(path: Path) -> None:
    """FileFormatError unless there is a file whose first bytes are of what its suffix says."""
    suffixes = ", ".join((*SAFETENSORS, *PICKLES))
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise FileFormatError(f"Expected a model file at {path}, found {found}; check the path.")
    if path.suffix.lower() not in (*SAFETENSORS, *PICKLES):
        raise FileFormatError(f"Expected a model file ({suffixes}), found {path}; choose a file of these kinds.")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise FileFormatError(f"Expected a model file at {path}, found: {error.strerror}; check its rights.") from error
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    found = None
    if not head:
        found = "an empty file; download it again"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        found = "a web page; download the file itself, not the page about it"
    elif text.startswith(b"version https://git-lfs"):
        found = "a Git LFS pointer, which only names the file; run git lfs pull, or download the file itself"
    elif path.suffix.lower() in SAFETENSORS and head.startswith((b"PK\x03\x04", b"\x80")) and head[8:9] != b"{":
        found = "a PyTorch pickle; rename it to .ckpt"
    elif path.suffix.lower() in PICKLES and head[8:9] == b"{":
        found = "a safetensors file; rename it to .safetensors"
    if found is not None:
        raise FileFormatError(f"Expected a model file at {path}, found {found}.")


def _damaged(path: Path, cause: object) -> FileFormatError:
    first_line = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200].rstrip(".")
    return FileFormatError(
        f"Expected a whole model file at {path}, found it truncated or damaged ({first_line}); download or copy it again."
    )


def _safetensors_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and metadata from the header: 8 bytes of length, JSON, then the tensors one after another."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size < 8:
            raise _damaged(path, f"{size} bytes")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _HEADER_LIMIT):
            raise _damaged(path, f"it announces a header of {length} bytes and has {size} in all")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        entries = {name: _shape_and_end(entry) for name, entry in header.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that are no texts")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header: {error}") from error
    announced = 8 + length + max((end for _, end in entries.values()), default=0)
    if announced != size:
        raise _damaged(path, f"{size} bytes in place of {announced}")
    return {name: shape for name, (shape, _) in entries.items()}, metadata


_BITS = re.compile(r"\d+")  # of F32, BF16, I64, F8_E4M3: a number's bits, the first digits in its name


def _shape_and_end(entry: dict) -> tuple[tuple[int, ...], int]:
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"sizes {shape}, {start}, {end}")
    bits = _BITS.search(entry["dtype"])
    if bits and int(bits[0]) >= 8 and math.prod(shape) * int(bits[0]) != 8 * (end - start):
        raise ValueError(f"a tensor of shape {shape} in {end - start} bytes")
    return tuple(shape), end


def _unpickled(path: Path, device: str) -> "dict[str, Tensor]":
    """The tensors in a pickled dict and in the dicts right below it (names joined by a dot), on "cpu" or "meta"."""
    import pickle

    import torch

    with path.open("rb") as file:
        head = file.read(4)
    others = (
        torch.serialization.get_safe_globals()
    )  # ComfyUI's among them, whose names for the same things are functions that run
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(_shells()):
            saved = torch.load(path, map_location=device, weights_only=True, mmap=head == b"PK\x03\x04")
    except pickle.UnpicklingError as error:
        if not head.startswith((b"PK\x03\x04", b"\x80")):
            raise _damaged(path, "no pickle") from error
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        named = f" ({wanted[1]})" if wanted else ""
        raise FileFormatError(
            f"Expected a file of weights alone at {path}, found a pickle that needs code to run{named}; "
            "choose its .safetensors version."
        ) from error
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise _damaged(path, error) from error
    finally:
        torch.serialization.add_safe_globals(others)
    if not isinstance(saved, Mapping):
        raise FileFormatError(f"Expected tensors by name at {path}, found a {type(saved).__name__}; choose another file.")
    if isinstance(saved.get("state_dict"), Mapping):
        saved = saved["state_dict"]
    flat = {str(key): value for key, value in saved.items()}
    for key, value in saved.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": tensor for inner, tensor in value.items()}
    return {key: value for key, value in flat.items() if isinstance(value, torch.Tensor)}


def _shells() -> list[type]:
    """Empty classes for what the first Stable Diffusion checkpoints hold beside their weights (a Lightning callback's score)."""

    class Shell:
        def __init__(self, *_):
            pass

        def __setstate__(self, _):
            pass

    names = (
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy", "dtype"),
    )
    return [type(name, (Shell,), {"__module__": module}) for module, name in names]


def _without_wrapper(named: dict) -> dict:
    """The names without `module.`, which distributed training puts before each."""
    wrapped = named and all(name.startswith("module.") for name in named)
    return {name.removeprefix("module."): value for name, value in named.items()} if wrapped else named


# ---- recognising ----


def recognise(layout: Layout) -> Kind:
    """What a file of this layout is; never fails. Of kinds that look alike the surest sign decides first.

    A motion module is v2 with modules in its mid block, else v3 with a position encoding of 32 frames, else v1, whatever its width;
    AnimateLCM is v2 without position encodings (the rule of ComfyUI-AnimateDiff-Evolved). AnimateDiff-Lightning looks as v2.
    """
    if "avdm2.format_version" in layout.metadata:
        return Kind("student", "an AVDM2 student")
    if "avdm2.style_version" in layout.metadata:
        return Kind("style", "an AVDM2 style, which is laid on a student")
    shapes = layout.shapes
    kind = _lora(shapes) or _control(shapes) or _motion(shapes) or _image_model(shapes) or _part(shapes)
    if kind is not None:
        return kind
    if not shapes:
        return Kind("unknown", "a file without tensors")
    names = ", ".join(repr(name[:80]) for name in sorted(shapes)[:3])
    return Kind("unknown", f"an unknown file with keys such as {names}")


_LORA_KEY = re.compile(r"lora_(down|up|mid|A|B)\.|lora\.(down|up)\.|lora_linear_layer\.|\.(hada|lokr)_w")


def _has(names: Iterable[str], *parts: str) -> bool:
    return any(part in name for name in names for part in parts)


def _lora(shapes: Mapping[str, tuple]) -> Kind | None:
    keys = [name for name in shapes if _LORA_KEY.search(name)]
    others = [name for name in shapes if not _LORA_KEY.search(name) and not name.endswith(("alpha", "dora_scale"))]
    if not keys or len(others) > len(keys) // 4:  # some LoRAs bring a bias or an embedding along
        return None
    naming = "kohya" if keys[0].startswith("lora_") else "peft" if _has(keys, ".lora_A.") else "diffusers"
    if _has(keys, "motion_modules", "temporal_"):
        return Kind("motion-lora", "a motion LoRA")
    if _has(keys, "double_blocks", "single_blocks", "single_transformer_blocks", "joint_blocks", "joint_transformer_blocks"):
        return Kind("lora-other", "a LoRA of another family (Flux or SD3)")
    reads_text = re.compile(r"attn2.*to_k.*(down|lora_A)")
    text_widths = {shapes[name][1] for name in keys if reads_text.search(name) and len(shapes[name]) > 1}
    if 2048 in text_widths or _has(keys, "lora_te2_", "text_encoder_2"):
        return Kind("lora-sdxl", f"an SDXL LoRA ({naming} keys)")
    if _has(keys, "down_blocks", "up_blocks", "mid_block", "input_blocks", "output_blocks", "text_model"):
        return Kind("lora", f"an SD LoRA ({naming} keys)")
    return Kind("lora-other", f"a LoRA of another family ({naming} keys)")


def _control(shapes: Mapping[str, tuple]) -> Kind | None:
    # Before motion modules and image models: a control network holds a copy of an encoder, SparseCtrl's one with motion modules.
    if "lora_controlnet" in shapes or _has(
        shapes, "control_model.", "controlnet_cond_embedding.", "controlnet_down_blocks.", "input_hint_block."
    ):
        return Kind("controlnet", "a ControlNet")
    if all(name.startswith(("image_proj.", "ip_adapter.")) for name in shapes) and shapes:
        return Kind("ip-adapter", "an IP-Adapter")
    if _has(shapes, "adapter.body.") or "body.0.block1.weight" in shapes or "body.0.resnets.0.block1.weight" in shapes:
        return Kind("t2i-adapter", "a T2I-Adapter")
    return None


def _motion(shapes: Mapping[str, tuple]) -> Kind | None:
    if _has(shapes, "temporal_attentions.") and _has(shapes, "pos_encoder.positional_encoding"):
        return Kind("motion-sdxl", "an SDXL motion module (HotshotXL)")
    if not _has(shapes, ".motion_modules."):
        return None
    others = [name for name in shapes if ".motion_modules." not in name]
    if "time_embedding.linear_1.weight" in others:
        return Kind("video-unet", "a whole video UNet")
    if others:
        return Kind("motion-other", f"a motion module with layers that AnimateDiff has not (such as {min(others)[:80]!r})")
    if motion_widths(shapes) == (320, 640, 1280):
        return Kind("motion-sdxl", "an SDXL motion module")
    positions = [shape for name, shape in shapes.items() if name.endswith((".pos_encoder.pe", ".pos_embed.pe"))]
    lengths = {shape[1] for shape in positions if len(shape) == 3}
    if _has(shapes, "mid_block.") and not lengths:
        return Kind("motion-animatelcm", "an AnimateLCM motion module")
    if not lengths:
        return Kind("motion-other", "a motion module without position encodings")
    version = "v2" if _has(shapes, "mid_block.") else "v3" if 32 in lengths else "v1"
    return Kind(f"motion-{version}", f"an AnimateDiff motion module {version}")


def motion_widths(shapes: Mapping[str, tuple]) -> tuple[int, ...]:
    """The width of each down block of a motion module, original or diffusers' names."""
    pattern = re.compile(r"down_blocks\.(\d+)\.motion_modules\.0\.(temporal_transformer\.)?norm\.weight")
    found = {int(match[1]): shape[0] for name, shape in shapes.items() if (match := pattern.fullmatch(name)) and shape}
    return tuple(found[block] for block in sorted(found))


def _image_model(shapes: Mapping[str, tuple]) -> Kind | None:
    whole = any(name.startswith(_ORIGINAL_UNET) for name in shapes)
    alone = "" if whole else "-unet"
    if _has(shapes, "joint_blocks.0."):
        return Kind(f"sd3{alone}", "an SD3 checkpoint")
    if _has(shapes, "double_blocks.0.") and _has(shapes, "single_blocks.0.") and not _has(shapes, "individual_token_refiner"):
        return Kind(f"flux{alone}", "a Flux checkpoint")
    if "transformer_blocks.0.attn.add_q_proj.weight" in shapes and "x_embedder.weight" in shapes:
        return Kind("flux-unet", "a Flux transformer in diffusers' keys")
    if "transformer_blocks.0.attn.add_q_proj.weight" in shapes and "pos_embed.proj.weight" in shapes:
        return Kind("sd3-unet", "an SD3 transformer in diffusers' keys")
    prefix = _ORIGINAL_UNET if whole else ""
    in_diffusers = "down_blocks.0.resnets.0.conv1.weight" in shapes and "time_embedding.linear_1.weight" in shapes
    conv_in = shapes.get("conv_in.weight" if in_diffusers else f"{prefix}input_blocks.0.0.weight", ())
    proj_in = {len(s) for n, s in shapes.items() if n.startswith(prefix) and n.endswith(".proj_in.weight")}
    if len(conv_in) != 4 or not proj_in:
        return None
    if _has(shapes, ".time_stack."):
        family, name = "svd", "a Stable Video Diffusion"
    elif f"{prefix}label_emb.0.0.weight" in shapes or "add_embedding.linear_1.weight" in shapes:
        family, name = "sdxl", "an SDXL"
    else:  # SD 2.x has linear layers where SD1.x has convolutions of one pixel
        family, name = ("sd2", "an SD 2.x") if proj_in == {2} else ("sd15", "an SD1.5")
    inputs = {4: ("", ""), 9: ("-inpainting", "an inpainting"), 8: ("-edit", "an instruct-pix2pix"), 5: ("-depth", "a depth")}
    if family != "svd":
        suffix, words = inputs.get(conv_in[1], ("-other", f"a {conv_in[1]}-channel"))
        family, name = family + suffix, f"{words} {name.split(' ', 1)[1]}" if words else name
    if in_diffusers:
        return Kind(f"{family}-unet", f"{name} UNet in diffusers' keys")
    return Kind(f"{family}{alone}", f"{name} checkpoint" if whole else f"{name} UNet alone")


def _part(shapes: Mapping[str, tuple]) -> Kind | None:
    if _has(shapes, "encoder.conv_in.", "encoder.layers.0.weight") and _has(shapes, "decoder."):
        return Kind("vae", "a VAE")
    # CLIP in all its keys, T5, language models
    if _has(shapes, "token_embedding.weight", "encoder.block.0.layer.0.SelfAttention.", "model.embed_tokens.weight"):
        return Kind("text-encoder", "a text encoder")
    if _has(shapes, "embeddings.class_embedding", "visual.transformer.", "visual.blocks."):
        return Kind("image-encoder", "an image encoder")
    known = _has(shapes, "emb_params", "string_to_param.") or set(shapes) <= {"clip_l", "clip_g"}
    rows = all(len(shape) in (1, 2) and shape[-1] in (768, 1024, 1280) for shape in shapes.values())
    if shapes and len(shapes) <= 3 and (known or rows):
        return Kind("textual-inversion", "a textual inversion")
    return None
