"""Small networks, and what tests of student files do with them."""

import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from avdm2_nodes.files.student_info import StudentFileError


def image_unet(widths=(32, 64), **settings):
    kinds = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    settings = {"sample_size": 8, "layers_per_block": 1, "attention_head_dim": 4, "cross_attention_dim": 16} | kinds | settings
    torch.manual_seed(0)
    return UNet2DConditionModel(block_out_channels=widths, **settings).eval().requires_grad_(False)


def motion_adapter(widths=(32, 64)):
    torch.manual_seed(1)
    return MotionAdapter(
        block_out_channels=widths, motion_layers_per_block=1, motion_num_attention_heads=4, use_motion_mid_block=False
    )


TARGETS = r".*\.(to_q|ff\.net\.2|conv1|conv_shortcut|proj_in|time_emb_proj)"
RANK, ALPHA = 3, 7.5


def predictions(*unets):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, 3, 8, 8, generator=generator)
    text = torch.randn(3, 5, 16, generator=generator)
    with torch.no_grad():
        return [unet(x, torch.tensor([500]), text, return_dict=False)[0] for unet in unets]


def refusal(function, *args):
    with pytest.raises(StudentFileError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def edited(path, tensors=None, **metadata):
    """The file at `path` with other tensors or metadata (None: left out)."""
    with safe_open(path, "pt") as file:
        old = file.metadata()
    new = old | {f"avdm2.{key}": value for key, value in metadata.items()}
    save_file(load_file(path) if tensors is None else tensors, path, {k: v for k, v in new.items() if v is not None})
    return path
