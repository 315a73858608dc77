"""A diffusion stack (tokenizer, text encoder, VAE, image UNet, motion adapter): a diffusers folder, or files as people have them."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, MotionAdapter, UNet2DConditionModel
from einops import rearrange
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..diffusion.layers import without_waste
from ..diffusion.unets import require_matching_motion, video_unet
from ..diffusion.windows import ANIMATEDIFF_FRAMES
from .bounds import immodest
from .clip import clip_tokenizer
from .containers import PICKLES, SAFETENSORS, SUFFIX
from .motion import load_motion_file
from .paths import is_file, is_folder, lies_at, read_json
from .prediction import require_epsilon_scheduler
from .sd15 import load_sd15_file
from .sentences import FileError, is_text, one_line, reason, told
from .weights import not_finite


class StackError(FileError):
    """A stack folder that cannot be used; the message is one sentence that names it."""


_VAES = {"AutoencoderTiny": AutoencoderTiny, "AutoencoderKL": AutoencoderKL}


_MOST_FRAMES, _BRIGHTEST = 1024, 1e6  # of `stack.json`


@dataclass
class Stack:
    """The parts of a teacher, loaded from `folder` (or one file) in float32 on the CPU, in evaluation mode and frozen."""

    folder: Path
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderTiny | AutoencoderKL
    image_unet: UNet2DConditionModel
    motion: MotionAdapter | None  # None for image models alone
    facts: dict = field(default_factory=dict)  # of `stack.json`, which has what diffusers' own files have no place for

    @cached_property
    def teacher(self):
        """The video UNet: the image UNet with the motion modules in it (weights copied), frozen."""
        return _frozen(video_unet(self.image_unet, self.motion))

    @property
    def pixels(self) -> int:
        """Pixels a side of a latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def frames(self) -> int:
        """Frames of the clips that the motion modules were trained on: `stack.json`'s, else AnimateDiff's."""
        return self.facts.get("frames", ANIMATEDIFF_FRAMES)

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> Tensor:
        """(B, L, D) embeddings of captions; longer ones are cut at the tokenizer's length. StackError for what is no text."""
        for caption in captions:
            if not is_text(caption):
                raise StackError(
                    f"Expected a prompt of whole characters, found half of one in {one_line(caption)!r}; write it anew in UTF-8."
                )
        device = next(self.text_encoder.parameters()).device
        tokens = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.tokenizer.model_max_length, return_tensors="pt"
        )
        return self.text_encoder(tokens.input_ids.to(device)).last_hidden_state

    def encode_clips(self, frames: Tensor) -> Tensor:
        """As the function `encode_clips`, with this stack's VAE."""
        return encode_clips(self.vae, frames)

    def decode_clips(self, clips: Tensor) -> Tensor:
        """As the function `decode_clips`, with this stack's VAE."""
        return decode_clips(self.vae, clips)


VAE_ROOM = 2 * 2**30  # bytes that the activations of frames may take which go through a VAE together
_VAE_FRAMES = 32  # at once at most: beyond, nothing is gained


def frames_at_once(vae, height: int, width: int, room: int = VAE_ROOM) -> int:
    """How many frames of height x width pixels go through a VAE together within `room` bytes of activations, 1 at least.

    Its largest are those of full size: three live at once, as wide as the wider of the two outermost blocks.
    """
    weight = next(vae.parameters())
    frame = 3 * max(vae.config.block_out_channels[:2]) * height * width * weight.element_size()
    return max(1, min(_VAE_FRAMES, room // frame))


def _equally(frames: Tensor, most: int) -> tuple[Tensor, ...]:
    """Parts of `most` frames at most, as few and as equal as can be: 16 by at most 5 are four of 4, and no single one is left."""
    return frames.chunk(-(-len(frames) // most))


@torch.no_grad()
def encode_clips(vae, frames: Tensor, batch: int | None = None) -> Tensor:
    """(B, F, H, W, 3) uint8 -> clips in model space (B, C, F, h, w) float32, at most `batch` frames at a time, else `frames_at_once`."""
    weight = next(vae.parameters())
    parts = []
    pictures = rearrange(frames, "b f h w c -> (b f) c h w")
    for images in _equally(pictures, batch or frames_at_once(vae, *frames.shape[2:4])):
        encoded = vae.encode((images.to(weight.device).float() / 127.5 - 1).to(weight.dtype))
        parts.append((encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()).float())
    return rearrange(torch.cat(parts).mul(vae.config.scaling_factor), "(b f) c h w -> b c f h w", f=frames.shape[1])


@torch.no_grad()
def decode_clips(vae, clips: Tensor, batch: int | None = None) -> Tensor:
    """Clips in model space (B, C, F, h, w) -> (B, F, H, W, 3) uint8 on the CPU; `batch` as above."""
    weight, factor = next(vae.parameters()), 2 ** (len(vae.config.block_out_channels) - 1)
    latents = rearrange(clips, "b c f h w -> (b f) c h w") / vae.config.scaling_factor
    parts = []
    for part in _equally(latents, batch or frames_at_once(vae, factor * clips.shape[3], factor * clips.shape[4])):
        pixels = vae.decode(part.to(weight.device, weight.dtype)).sample.float()
        parts.append(pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu())
    return rearrange(torch.cat(parts), "(b f) c h w -> b f h w c", f=clips.shape[2])


def load_stack(path: Path, motion: Path | None = None, with_motion: bool = True, tokenizer: Path | None = None) -> Stack:
    """Loads a stack: a folder in the diffusers layout, or an SD1.5 checkpoint in one file.

    `motion` names a motion adapter's folder or a file of motion modules, which a checkpoint in one file needs; `tokenizer` a folder
    with CLIP's vocabulary for it (else `clip.clip_tokenizer`'s). Raises StackError, naming what is missing or wrong.
    """
    path = Path(path)
    if is_file(path):
        unet, vae, text_encoder = _told(load_sd15_file, path)
        tokenizer = _told(clip_tokenizer, tokenizer)
        if with_motion and motion is None:
            raise StackError(f"Expected motion modules for {path}, which holds none, found none named; name a file or folder.")
    else:
        _require_folder(path)
        _told(require_epsilon_scheduler, path)
        tokenizer = load_tokenizer(tokenizer or path / "tokenizer")
        text_encoder, vae = _frozen(_load(CLIPTextModel, path / "text_encoder")), load_vae(path / "vae")
        unet = load_image_unet(path / "unet")
    adapter = load_motion(motion or path / "motion_adapter") if with_motion else None
    facts = _facts(path / "stack.json")
    stack = Stack(path, tokenizer, text_encoder, without_waste(vae), unet, adapter, facts)
    _require_matching_parts(stack)
    return stack


def _fits(longest: object, tokens: int, text) -> bool:
    """Whether prompts up to `longest`, of so many tokens, are ones for a text encoder of these settings."""
    return isinstance(longest, (int, float)) and longest <= text.max_position_embeddings and tokens <= text.vocab_size


def _require_matching_parts(stack: Stack) -> None:
    """StackError unless the parts of a stack were made for one another, as far as their settings say."""
    unet, text, tokenizer, motion = stack.image_unet.config, stack.text_encoder.config, stack.tokenizer, stack.motion
    latents, inputs = stack.vae.config.latent_channels, unet.in_channels
    kind = {9: " (an inpainting model)", 8: " (an instruct-pix2pix model)", 5: " (a depth model)"}.get(inputs, "")
    _require_equal(stack, "in_channels of the UNet", latents, inputs, f"{kind}, and the VAE's latents have {latents}")
    _require_equal(stack, "out_channels of the UNet", latents, unet.out_channels, f", and the VAE's latents have {latents}")
    width = unet.cross_attention_dim
    width = width[0] if isinstance(width, (list, tuple)) and len(set(width)) == 1 else width  # said once a block
    _require_equal(stack, "a text encoder of the width that the UNet reads", width, text.hidden_size)
    for setting in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        _require_equal(stack, setting, None, unet.get(setting), ", as of another family than SD1.5")
    # Of a checkpoint in one file the tokenizer is CLIP's, checked for itself.
    longest = tokenizer.model_max_length if stack.folder.is_dir() else None
    if longest is not None and not _fits(longest, len(tokenizer), text):
        raise StackError(
            f"Expected a tokenizer for the text encoder in {stack.folder} ({text.vocab_size} tokens, prompts of "
            f"{text.max_position_embeddings}), found one of {len(tokenizer)} tokens and prompts of {one_line(longest)}; "
            "choose a folder whose parts belong together."
        )
    if motion is None:
        return
    _told(require_matching_motion, stack.image_unet, motion)
    positions = motion.config.motion_max_seq_length
    if stack.facts.get("frames", 1) > positions:
        raise StackError(
            f"Expected frames in {stack.folder / 'stack.json'} up to the motion modules' {positions} position encodings, found "
            f"{stack.facts['frames']}; correct it."
        )


def _require_equal(stack: Stack, what: str, expected: object, found: object, why: str = "") -> None:
    if found != expected:
        raise StackError(
            f"Expected {what} in {stack.folder} to be {expected}, found {found}{why}; choose a folder whose parts belong together."
        )


def _told(function, *args):
    """What `function` gives; its ValueError, a sentence already, as StackError."""
    try:
        return function(*args)
    except ValueError as error:
        raise StackError(str(error)) from error


def _facts(path: Path) -> dict:
    """`frames` of the clips trained on, and `latent_rgb_factors` (C, 3) and `latent_rgb_factors_bias` (3) for previews; each may lack."""
    if not is_file(path):
        return {}
    facts = _told(read_json, path, "JSON")
    frames = facts.get("frames", 1) if isinstance(facts, dict) else None
    if type(frames) is not int or not 1 <= frames <= _MOST_FRAMES:
        raise StackError(f"Expected an object whose frames are a whole number in {path}, found another; correct or remove it.")
    factors, bias = facts.get("latent_rgb_factors", [[0, 0, 0]]), facts.get("latent_rgb_factors_bias", [0, 0, 0])
    if not (isinstance(factors, list) and factors and all(_is_colour(row) for row in factors) and _is_colour(bias)):
        raise StackError(
            f"Expected latent_rgb_factors of three numbers a channel, and latent_rgb_factors_bias of three, in {path}, found others; "
            "correct or remove them."
        )
    return facts


def stack_frames(folder: Path) -> int:
    """Frames of the clips that a stack's motion modules were trained on, as `Stack.frames`. StackError as `load_stack`."""
    return _facts(Path(folder) / "stack.json").get("frames", ANIMATEDIFF_FRAMES)


def _is_colour(row: object) -> bool:
    return isinstance(row, list) and len(row) == 3 and all(type(n) in (int, float) and abs(n) < _BRIGHTEST for n in row)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in a diffusers folder. StackError without its vocabulary, which transformers would take for an empty one."""
    folder = Path(folder)
    _require_folder(folder)
    if not is_file(folder / "tokenizer.json"):
        missing = [name for name in ("vocab.json", "merges.txt") if not is_file(folder / name)]
        if missing:
            raise StackError(
                f"Expected CLIP's vocabulary (vocab.json and merges.txt, or tokenizer.json) in {folder}, found no {missing[0]}; "
                "name another folder."
            )
    return _load(CLIPTokenizer, folder)


def load_vae(folder: Path) -> AutoencoderTiny | AutoencoderKL:
    """The VAE in a diffusers folder, of the class that its config names, float32 and frozen."""
    name = _config(Path(folder)).get("_class_name", "")
    if name not in [*_VAES]:
        raise StackError(f"Expected {folder} to hold one of {', '.join(_VAES)}, found {one_line(name)!r}; name another folder.")
    return _frozen(_load(_VAES[name], Path(folder)))


def load_image_unet(path: Path) -> UNet2DConditionModel:
    """An image UNet, float32 and frozen: a diffusers folder (of its own, or with `unet` in it) or an SD1.5 checkpoint in one file."""
    path = Path(path)
    if is_file(path):
        return _told(load_sd15_file, path)[0]
    within = path / "unet"
    _told(require_epsilon_scheduler, path if is_folder(within) else path.parent)
    return _frozen(_load(UNet2DConditionModel, within if is_folder(within) else path))


def load_motion(path: Path) -> MotionAdapter:
    """Motion modules, float32 and frozen: a diffusers folder, or a file as people have them (`motion.load_motion_file`)."""
    path = Path(path)
    return _told(load_motion_file, path) if is_file(path) else _frozen(_load(MotionAdapter, path))


def _frozen(module):
    return module.eval().requires_grad_(False)


def _require_folder(folder: Path) -> None:
    if is_folder(folder):
        return
    if folder.suffix.lower() in (*SAFETENSORS, *PICKLES):
        raise StackError(f"Expected a model file at {folder}, found {lies_at(folder)}; check the path.")
    raise StackError(f"Expected a model folder in the diffusers layout at {folder}, found {lies_at(folder)}; check the path.")


def _config(folder: Path) -> dict:
    """What config.json in a diffusers folder says, within the bounds of `bounds.immodest`."""
    _require_folder(folder)
    said = _told(read_json, folder / "config.json", "a readable config.json")
    if not isinstance(said, dict):
        raise StackError(
            f"Expected settings by name in {folder / 'config.json'}, found none; copy or download the folder again."
        )
    if found := immodest(said):
        raise StackError(
            f"Expected the settings of a model in {folder / 'config.json'}, found {found}, which no such model has."
        )
    return said


def _load(cls, folder: Path):
    """`cls.from_pretrained` on a local folder, never on a hub, with its many errors told as one sentence."""
    _require_folder(folder)
    if cls is CLIPTokenizer:
        return _pretrained(cls, folder)
    named = _config(folder).get("_class_name", cls.__name__)  # transformers' text encoder has none
    if named != cls.__name__:
        raise StackError(f"Expected a {cls.__name__} in {folder}, found a {one_line(named)}; name another folder.")
    _told(_require_readable_weights, folder)
    # transformers and diffusers name the same option differently.
    options = {"dtype" if cls is CLIPTextModel else "torch_dtype": torch.float32, "use_safetensors": True}
    model, loading = _pretrained(cls, folder, output_loading_info=True, **options)
    missing = [name for name in loading["missing_keys"] if not name.endswith("position_ids")]
    if missing:
        raise StackError(
            f"Expected the weights of a {cls.__name__} in {folder}, found none for {len(missing)} of its tensors (such as "
            f"{one_line(min(missing))}); copy or download the folder again."
        )
    if wrong := not_finite(dict(model.named_parameters())):
        raise StackError(
            f"Expected the weights of a {cls.__name__} in {folder}, found NaN or infinite numbers in {len(wrong)} of its tensors "
            f"(such as {min(wrong)}); choose another."
        )
    return model


def _require_readable_weights(folder: Path) -> None:
    """StackError where weights lie in the folder, but none under the name that is loaded: what to do is told."""
    with told(folder, "a model folder"):
        names = sorted(path.name for path in folder.iterdir() if path.suffix in (SUFFIX, ".bin"))
    variants = [name for name in names if name.endswith(SUFFIX) and name.count(".") > 1]
    if len(variants) < len([name for name in names if name.endswith(SUFFIX)]) or not names:
        return
    if variants:
        stem, *variant = variants[0].removesuffix(SUFFIX).split(".")
        raise StackError(
            f"Expected weights as {stem}{SUFFIX} in {folder}, found the variant {one_line('.'.join(variant))} alone; rename "
            f"{one_line(variants[0])} to {stem}{SUFFIX}."
        )
    raise StackError(
        f"Expected weights as {SUFFIX} in {folder}, found pickles alone ({one_line(names[0])}); download the folder with its {SUFFIX}, "
        "or load the model in its own program and save it so."
    )


def _pretrained(cls, folder: Path, **options):
    try:
        return cls.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # the libraries raise a dozen kinds for one cause: the folder does not hold what it should
        raise StackError(
            f"Expected a {cls.__name__} in {folder}, found: {reason(error)}; copy or download the folder again."
        ) from error
