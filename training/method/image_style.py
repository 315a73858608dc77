"""A style from images alone: the teacher's image model learns it as LoRA, before a student does."""

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image, ImageOps
from torch import Tensor, nn

from avdm2_nodes.diffusion.schedules import IMAGE
from avdm2_nodes.diffusion.style import add_change
from avdm2_nodes.diffusion.unets import Predictor, image_predictor
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.lora import lora_products
from avdm2_nodes.files.stack import Stack
from training.data import DataError
from training.data.captions import caption_beside, read_table
from training.data.clips import cover
from training.method.adapters import Adapters
from training.method.stage import adamw, run_stage
from training.run.checkpoint import write_atomically
from training.run.config import DistillConfig
from training.run.folder import RunFolderError
from training.run.parent import Stop, never
from training.run.precision import autocast, lent

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_DROP = 0.1  # share of captions replaced by the empty one, which guidance needs (Ho & Salimans, arXiv 2207.12598)
CPU = torch.device("cpu")


def find_images(folder: Path) -> list[tuple[Path, str]]:
    """The images of a folder and its subfolders, sorted by name, with their captions.

    A caption stands in `captions.csv` or `captions.jsonl` (`file`, `caption`), else in a text file beside the image; one without is
    trained on the empty prompt. DataError for a folder that is missing or has no images.
    """
    if not folder.is_dir():
        raise DataError(f"Expected a folder of images at {folder}, found {'a file' if folder.exists() else 'nothing'}.")
    paths = [p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    if not paths:
        raise DataError(f"Expected images ({', '.join(IMAGE_SUFFIXES)}) in {folder}, found none; put some there.")
    table = read_table(folder)
    return [(path, table.get(path.relative_to(folder).as_posix()) or caption_beside(path)) for path in sorted(paths)]


def read_image(path: Path, height: int, width: int) -> Tensor:
    """(height, width, 3) uint8: turned as its EXIF says, resized to cover, the centre cut out. DataError where it is no image."""
    try:
        with Image.open(path) as image:
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"Expected an image at {path}, found: {error}; mend it or take it out of the folder.") from error
    return cover(torch.from_numpy(pixels)[None], height, width)[0]


def dropped(captions: list[str], generator: torch.Generator) -> list[str]:
    """The captions, some of them empty in their place."""
    keep = torch.rand(len(captions), generator=generator) >= CAPTION_DROP
    return [caption if kept else "" for caption, kept in zip(captions, keep.tolist(), strict=True)]


def image_losses(
    latents: Tensor,
    captions: list[str],
    encode_text,
    predict: Predictor,
    batch: int = 64,
    device: torch.device = CPU,
    precision: str = "auto",
):
    """The loss function of an image stage: epsilon-MSE on single frames of latents (N, C, F, h, w), image schedule, t uniform."""

    def losses(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        clips = torch.randint(len(latents), (batch,), generator=generator)
        frames = torch.randint(latents.shape[2], (batch,), generator=generator)
        x0 = latents[clips, :, frames].contiguous(memory_format=torch.channels_last)
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(0, 1000, (batch,), generator=generator)
        x0, noise, t = x0.to(device), noise.to(device), t.to(device)
        with autocast(device, precision):
            text = encode_text(dropped([captions[i] for i in clips.tolist()], generator))
            eps = predict(IMAGE.diffuse(x0, noise, t), t, text)
        return {"loss": (eps - noise).square().mean()}

    return losses


def learn_style(
    config: DistillConfig, stack: Stack, folder: Path, device: torch.device, stop: Stop = never
) -> UNet2DConditionModel:
    """The teacher's image UNet after it has learnt the look of `style.images`: float32, frozen, on the CPU.

    Work in progress lies in `folder`; called again it goes on there, and when it is done gives the same. DataError for images that
    cannot be used, RunFolderError where the folder was begun with other images or settings, StoppedError as `run_stage`.
    """
    style, rank = config.style, config.model.lora_rank
    images = find_images(style.images)
    pixels = torch.stack([read_image(path, config.data.height, config.data.width) for path, _ in images])
    captions = [caption for _, caption in images]
    _require_same(folder, _settings(config, stack, pixels, captions))
    with lent(device, stack.vae), autocast(device, config.run.precision):
        latents = torch.cat([stack.encode_clips(part[:, None]).cpu() for part in pixels.split(32)])
    unet, adapters = copy.deepcopy(stack.image_unet).to(device), Adapters()
    lora = adapters.add(unet, "style", rank, config.run.seed)
    for name, weight in unet.named_parameters():
        weight.requires_grad_(".style." in name)
    predict = adapters.bind("style", image_predictor(unet))
    losses = image_losses(latents, captions, stack.encode_text, predict, style.image_batch, device, config.run.precision)
    with lent(device, stack.text_encoder):
        run_stage(
            folder.name, folder.parent, nn.ModuleList([unet]), losses, optimisers=[adamw(lora.values(), style.image_lr)],
            steps=style.image_steps, seed=config.run.seed, ema_decay=0.98, save_every=100, log_every=10, stop=stop,
        )  # fmt: skip
    learnt = copy.deepcopy(stack.image_unet)
    add_change(learnt, lora_products({name: weight.detach().cpu() for name, weight in lora.items()}), 1.0)
    return learnt.requires_grad_(False).eval()


def _settings(config: DistillConfig, stack: Stack, pixels: Tensor, captions: list[str]) -> dict:
    style = config.style
    return {
        "images": hashlib.sha256(pixels.numpy()).hexdigest(),
        "captions": hashlib.sha256(json.dumps(captions).encode()).hexdigest(),
        "base": weights_hash(stack.image_unet),
        "rank": config.model.lora_rank,
        "steps": style.image_steps,
        "batch": style.image_batch,
        "lr": style.image_lr,
        "seed": config.run.seed,
    }


def _require_same(folder: Path, settings: dict) -> None:
    path = folder / "settings.json"
    folder.mkdir(exist_ok=True)
    if not path.exists():
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(settings, indent=1)))
        return
    earlier = json.loads(path.read_text())
    if other := [key for key, value in settings.items() if earlier.get(key) != value]:
        raise RunFolderError(
            f"Expected to go on with the image model in {folder}, found that it was begun with another {', '.join(other)}; "
            "set that back, or name another folder with --run.folder."
        )
