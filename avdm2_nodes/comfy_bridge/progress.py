"""Progress, previews and interruption, as ComfyUI has them."""

import math

import comfy.utils
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ..diffusion.samplers import Callback
from ..diffusion.unets import Predictor

PREVIEW_SIDE = 512  # pixels, of the whole picture
SHOWN_FRAMES = 16


def interruptible(predict: Predictor) -> Predictor:
    """A predictor that stops before its next evaluation when a person has asked for it."""

    def eps(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        throw_exception_if_processing_interrupted()
        return predict(x_t, t, text)

    return eps


def show_text(text: str) -> None:
    """Shows a text on the node that is being run; where no server runs it, nobody looks on."""
    context = get_executing_context()
    if context is not None:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, context.node_id, PromptServer.instance.client_id)


def sampling_callback(steps: int, latent_format) -> Callback:
    """Moves ComfyUI's bar at each step and shows the frames that the step predicts, side by side."""
    bar = comfy.utils.ProgressBar(steps)

    def callback(done: int, x0: Tensor) -> None:
        throw_exception_if_processing_interrupted()
        picture = frames_picture(x0[0].transpose(0, 1), latent_format)
        bar.update_absolute(done, steps, ("JPEG", picture, PREVIEW_SIDE) if picture else None)

    return callback


def frames_picture(latents: Tensor, latent_format) -> Image.Image | None:
    """Up to 16 frames of a clip in model space (F, C, h, w), evenly chosen, in rows; None where the format has no colours."""
    if latent_format.latent_rgb_factors is None:
        return None
    count = min(len(latents), SHOWN_FRAMES)
    chosen = torch.linspace(0, len(latents) - 1, count).round().long()
    latents = latents[chosen.to(latents.device)].float().cpu()
    rgb = torch.einsum("fchw,cr->fhwr", latents, torch.tensor(latent_format.latent_rgb_factors))
    if latent_format.latent_rgb_factors_bias is not None:
        rgb = rgb + torch.tensor(latent_format.latent_rgb_factors_bias)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    height, width = rgb.shape[1:3]
    sheet = torch.full((rows * columns, height, width, 3), -1.0)
    sheet[:count] = rgb
    sheet = sheet.unflatten(0, (rows, columns)).transpose(1, 2).reshape(rows * height, columns * width, 3)
    picture = Image.fromarray(sheet.add(1).mul(127.5).clamp(0, 255).to(torch.uint8).numpy())
    scale = max(1, PREVIEW_SIDE // max(picture.size))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
