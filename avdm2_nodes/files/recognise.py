"""What a model file is, told from the names and shapes of its tensors: neither weights nor a library of models are read for it."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .containers import Layout, read_layout
from .sentences import FileFormatError

_ORIGINAL_UNET = "model.diffusion_model."


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


def require(path: Path, ids: Collection[str], expected: str, layout: Layout | None = None) -> Kind:
    """The kind of the file at `path`; FileFormatError, which says `expected`, where its id is none of `ids`.

    Who has read its `layout` gives it, for a pickle's takes seconds.
    """
    kind = recognise(layout or read_layout(path))
    if kind.id not in ids:
        raise FileFormatError(f"Expected {expected} at {path}, found {kind.phrase}; choose another file.")
    return kind


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
    if _has(shapes, "mid_block.") and not positions:
        return Kind("motion-animatelcm", "an AnimateLCM motion module")
    if not lengths:
        return Kind("motion-other", "a motion module without position encodings")
    version = "v2" if _has(shapes, "mid_block.") else "v3" if 32 in lengths else "v1"
    return Kind(f"motion-{version}", f"an AnimateDiff motion module {version}")


def motion_widths(shapes: Mapping[str, tuple]) -> tuple[int, ...]:
    """The width of each down block of a motion module, original or diffusers' names."""
    pattern = re.compile(r"down_blocks\.(\d{1,4})\.motion_modules\.0\.(temporal_transformer\.)?norm\.weight")
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
