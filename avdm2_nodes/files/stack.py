"""A diffusion stack (tokenizer, text encoder, VAE, image UNet, motion adapter): a diffusers folder, or files as people have them."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, MotionAdapter, UNet2DConditionModel
from einops import rearrange
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..diffusion.unets import require_matching_motion, video_unet
from ..diffusion.windows import ANIMATEDIFF_FRAMES
from ..errors import SentenceError
from .clip import clip_tokenizer
from .motion import load_motion_file
from .sd15 import load_sd15_file


class StackError(SentenceError, ValueError):
    """A stack folder that cannot be used; the message is one sentence that names it."""


_VAES = {"AutoencoderTiny": AutoencoderTiny, "AutoencoderKL": AutoencoderKL}


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
        """(B, L, D) embeddings of captions; longer ones are cut at the tokenizer's length."""
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


@torch.no_grad()
def encode_clips(vae, frames: Tensor, batch: int | None = None) -> Tensor:
    """(B, F, H, W, 3) uint8 -> clips in model space (B, C, F, h, w) float32, `batch` frames at a time (else `frames_at_once`)."""
    weight = next(vae.parameters())
    parts = []
    for images in rearrange(frames, "b f h w c -> (b f) c h w").split(batch or frames_at_once(vae, *frames.shape[2:4])):
        encoded = vae.encode((images.to(weight.device).float() / 127.5 - 1).to(weight.dtype))
        parts.append((encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()).float())
    return rearrange(torch.cat(parts).mul(vae.config.scaling_factor), "(b f) c h w -> b c f h w", f=frames.shape[1])


@torch.no_grad()
def decode_clips(vae, clips: Tensor, batch: int | None = None) -> Tensor:
    """Clips in model space (B, C, F, h, w) -> (B, F, H, W, 3) uint8 on the CPU, `batch` frames at a time (else `frames_at_once`)."""
    weight, factor = next(vae.parameters()), 2 ** (len(vae.config.block_out_channels) - 1)
    latents = rearrange(clips, "b c f h w -> (b f) c h w") / vae.config.scaling_factor
    parts = []
    for part in latents.split(batch or frames_at_once(vae, factor * clips.shape[3], factor * clips.shape[4])):
        pixels = vae.decode(part.to(weight.device, weight.dtype)).sample.float()
        parts.append(pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu())
    return rearrange(torch.cat(parts), "(b f) c h w -> b f h w c", f=clips.shape[2])


def load_stack(path: Path, motion: Path | None = None, with_motion: bool = True, tokenizer: Path | None = None) -> Stack:
    """Loads a stack: a folder in the diffusers layout, or an SD1.5 checkpoint in one file.

    `motion` names a motion adapter's folder or a file of motion modules, which a checkpoint in one file needs; `tokenizer` a folder
    with CLIP's vocabulary for it (else `clip.clip_tokenizer`'s). Raises StackError, naming what is missing or wrong.
    """
    path = Path(path)
    if path.is_file():
        unet, vae, text_encoder = _told(load_sd15_file, path)
        tokenizer = _told(clip_tokenizer, tokenizer)
        if with_motion and motion is None:
            raise StackError(f"Expected motion modules for {path}, which holds none, found none named; name a file or folder.")
    else:
        _require_folder(path)
        tokenizer = load_tokenizer(tokenizer or path / "tokenizer")
        text_encoder, vae = _frozen(_load(CLIPTextModel, path / "text_encoder")), load_vae(path / "vae")
        unet = load_image_unet(path / "unet")
    adapter = load_motion(motion or path / "motion_adapter") if with_motion else None
    if adapter is not None:
        _told(require_matching_motion, unet, adapter)
    return Stack(path, tokenizer, text_encoder, vae, unet, adapter, _facts(path / "stack.json"))


def _told(function, *args):
    """What `function` gives; its ValueError, a sentence already, as StackError."""
    try:
        return function(*args)
    except ValueError as error:
        raise StackError(str(error)) from error


def _facts(path: Path) -> dict:
    """`frames` of the clips trained on, and `latent_rgb_factors` (C, 3) and `latent_rgb_factors_bias` (3) for previews; each may lack."""
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StackError(f"Expected JSON in {path}, found: {error}; correct or remove it.") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("frames", 1), int):
        raise StackError(f"Expected an object whose frames are a whole number in {path}, found another; correct or remove it.")
    return facts


def stack_frames(folder: Path) -> int:
    """Frames of the clips that a stack's motion modules were trained on, as `Stack.frames`. StackError as `load_stack`."""
    return _facts(Path(folder) / "stack.json").get("frames", ANIMATEDIFF_FRAMES)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in a diffusers folder. StackError without its vocabulary, which transformers would take for an empty one."""
    folder = Path(folder)
    _require_folder(folder)
    if not (folder / "tokenizer.json").is_file():
        missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
        if missing:
            raise StackError(
                f"Expected CLIP's vocabulary (vocab.json and merges.txt, or tokenizer.json) in {folder}, found no {missing[0]}; "
                "name another folder."
            )
    return _load(CLIPTokenizer, folder)


def load_vae(folder: Path) -> AutoencoderTiny | AutoencoderKL:
    """The VAE in a diffusers folder, of the class that its config names, float32 and frozen."""
    name = _class_name(Path(folder))
    if name not in _VAES:
        raise StackError(f"Expected {folder} to hold one of {', '.join(_VAES)}, found {name!r}.")
    return _frozen(_load(_VAES[name], Path(folder)))


def load_image_unet(path: Path) -> UNet2DConditionModel:
    """An image UNet, float32 and frozen: a diffusers folder (of its own, or with `unet` in it) or an SD1.5 checkpoint in one file."""
    path = Path(path)
    if path.is_file():
        return _told(load_sd15_file, path)[0]
    return _frozen(_load(UNet2DConditionModel, path / "unet" if (path / "unet").is_dir() else path))


def load_motion(path: Path) -> MotionAdapter:
    """Motion modules, float32 and frozen: a diffusers folder, or a file as people have them (`motion.load_motion_file`)."""
    path = Path(path)
    return _told(load_motion_file, path) if path.is_file() else _frozen(_load(MotionAdapter, path))


def _frozen(module):
    return module.eval().requires_grad_(False)


def _require_folder(folder: Path) -> None:
    if folder.suffix in (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin") and not folder.exists():
        raise StackError(f"Expected a model file at {folder}, found nothing; check the path.")
    if not folder.is_dir():
        raise StackError(f"Expected a model folder in the diffusers layout at {folder}, found none; check the path.")


def _class_name(folder: Path) -> str:
    _require_folder(folder)
    try:
        return json.loads((folder / "config.json").read_text()).get("_class_name", "")
    except (OSError, ValueError) as error:
        raise StackError(f"Expected a readable config.json in {folder}, found: {error}.") from error


def _load(cls, folder: Path):
    """`cls.from_pretrained` on a local folder, never on a hub, with its many errors told as one sentence."""
    _require_folder(folder)
    options = {}
    if cls is not CLIPTokenizer:
        # transformers and diffusers name the same option differently.
        options = {"dtype" if cls is CLIPTextModel else "torch_dtype": torch.float32, "use_safetensors": True}
    try:
        return cls.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # the libraries raise a dozen kinds for one cause: the folder does not hold what it should
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StackError(f"Expected a {cls.__name__} in {folder}, found: {first_line}") from error
