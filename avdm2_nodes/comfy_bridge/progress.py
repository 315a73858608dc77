"""Progress, previews and interruption, as ComfyUI has them."""

import logging
import math
from functools import partial
from pathlib import Path

import comfy.utils
import folder_paths
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

logger = logging.getLogger(__name__)

SHOWN_FRAMES, SHOWN_RATE, SHOWN_SIDE = 16, 8, 320  # at most, a second, pixels of the longer side at most


def say(text: str) -> None:
    """Tells a person what to know of a graph that runs all the same: on the node that is being run, and in the log."""
    if text:
        logger.warning("AVDM2: %s", text)
        show_text(f"AVDM2: {text}")  # by which web/readable_warnings.js knows it


def show_text(text: str) -> None:
    """Shows a text on the node that is being run; where no server runs it, nobody looks on."""
    context = get_executing_context()
    if context is not None:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, context.node_id, PromptServer.instance.client_id)


def show_trained(trained) -> dict:
    """A node's output after a training: its file and what to know of it, as text, and the newest clips."""
    texts = [str(trained.file), *([trained.note] if trained.note else [])]
    show_text("\n".join(texts))
    return {"images": shown_files(trained.samples[-1:]), "text": texts}


def shown_files(pictures: list[Path]) -> list[dict]:
    """Pictures below ComfyUI's output folder, as a node's output names them to be shown."""
    root = Path(folder_paths.get_output_directory())
    parts = [picture.relative_to(root) for picture in pictures]
    return [{"filename": part.name, "subfolder": part.parent.as_posix(), "type": "output"} for part in parts]


def with_moving_previews(callback, latent_format, steps: int):
    """Core's callback of a sampler, and after it the clip that moves, where ComfyUI's setting asks for previews at all."""
    if callback is None or args.preview_method == LatentPreviewMethod.NoPreviews:
        return callback
    bar = comfy.utils.ProgressBar(steps)

    def both(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        callback(step, x0, x, total)
        if len(x0) > 1 and (picture := moving_picture(x0, latent_format)):
            bar.update_absolute(step + 1, total, ("PNG", picture, None))

    return both


def moving_picture(latents: Tensor, latent_format) -> Image.Image | None:
    """A clip in model space (F, C, h, w) as a picture that moves once it is saved, in the clip's own time; None without colours.

    ComfyUI's server saves a preview to send it, as one JPEG or PNG. This one saves itself as an animated PNG of up to 16 frames, evenly
    chosen, which an <img> plays. What reads plain PNG finds all of them on one sheet, in rows.
    """
    if latent_format.latent_rgb_factors is None:
        return None
    shown = _evenly(latents, min(len(latents), SHOWN_FRAMES)).float().cpu()
    rgb = torch.einsum("fchw,cr->fhwr", shown, torch.tensor(latent_format.latent_rgb_factors))
    if latent_format.latent_rgb_factors_bias is not None:
        rgb = rgb + torch.tensor(latent_format.latent_rgb_factors_bias)
    rgb = rgb.add(1).mul(127.5).clamp(0, 255).to(torch.uint8)
    columns = math.ceil(math.sqrt(len(rgb)))
    sheet = _evenly(rgb, columns**2).unflatten(0, (columns, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    height, width = rgb.shape[1:3]
    scale = max(1, SHOWN_SIDE // max(height, width))
    sheet, *frames = (
        Image.fromarray(picture.numpy()).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        for picture in (sheet, *rgb)
    )
    sheet.save = partial(_save_moving, sheet, frames, round(1000 / SHOWN_RATE * len(latents) / len(shown)))
    return sheet


def _evenly(frames: Tensor, count: int) -> Tensor:
    return frames[torch.linspace(0, len(frames) - 1, count).round().long().to(frames.device)]


def _save_moving(sheet: Image.Image, frames: list[Image.Image], duration: int, file, format: str = "PNG", **options) -> None:
    moving = {"save_all": True, "append_images": frames, "default_image": True, "duration": duration, "loop": 0}
    Image.Image.save(sheet, file, "PNG", compress_level=1, **moving)
