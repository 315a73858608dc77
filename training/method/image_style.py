"""A style from images alone: the teacher's image model learns it as LoRA, before a student does."""

import copy
import hashlib
import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from avdm2_nodes.diffusion.schedules import IMAGE
from avdm2_nodes.diffusion.style import add_change
from avdm2_nodes.diffusion.unets import Predictor, image_predictor
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.lora import lora_products
from avdm2_nodes.files.stack import Stack
from training.data.pictures import read_pictures
from training.method.adapters import Adapters
from training.method.stage import adamw, run_stage
from training.run.checkpoint import write_atomically
from training.run.config import DistillConfig
from training.run.folder import RunFolderError
from training.run.parent import Stop, never
from training.run.precision import autocast, lent
from training.run.reading import UnreadableError, read_json

CAPTION_DROP = 0.1  # share of captions replaced by the empty one, which guidance needs (Ho & Salimans, arXiv 2207.12598)
CPU = torch.device("cpu")


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
    pixels, captions = read_pictures(style.images, config.data.height, config.data.width, config.data.strict)
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
    try:
        folder.mkdir(exist_ok=True)
        if not path.exists():
            write_atomically(path, lambda temporary: temporary.write_text(json.dumps(settings, indent=1)))
            return
        earlier = dict(read_json(path))
    except (OSError, UnreadableError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"Expected the settings of the image model in {path}, found: {getattr(error, 'strerror', None) or error}; remove {folder} "
            "to have it learnt again, or name another folder with --run.folder."
        ) from error
    if other := [key for key, value in settings.items() if earlier.get(key) != value]:
        raise RunFolderError(
            f"Expected to go on with the image model in {folder}, found that it was begun with another {', '.join(other)}; "
            "set that back, or name another folder with --run.folder."
        )
