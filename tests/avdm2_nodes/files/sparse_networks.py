"""SparseCtrl files as AnimateDiff publishes them, small and random."""

import torch
from diffusers import SparseControlNetModel
from safetensors.torch import save_file

from avdm2_nodes.files.motion import to_original_keys

HEADS = 4


def new_network(latents: bool) -> SparseControlNetModel:
    """diffusers' network, every zero layer moved so that it acts; for latents or for pictures."""
    torch.manual_seed(int(latents))
    network = SparseControlNetModel(
        conditioning_channels=4 if latents else 3,
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=HEADS,
        motion_num_attention_heads=HEADS,
        use_simplified_condition_embedding=latents,
    ).eval()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network.requires_grad_(False)


def write_network(network: SparseControlNetModel, path, prefix: str = "") -> None:
    """Under the original names of motion modules, with a prefix before all of them."""
    save_file({prefix + name: t.clone().contiguous() for name, t in to_original_keys(network.state_dict()).items()}, path)
