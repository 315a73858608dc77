import json
from pathlib import Path

import pytest
from diffusers import AutoencoderKL, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from transformers import CLIPTextConfig

from avdm2_nodes.files.bounds import immodest

SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 2816,
}
LARGEST_CLIP = {"num_hidden_layers": 48, "hidden_size": 1664, "intermediate_size": 8192, "vocab_size": 49408}


def test_published_models_are_within_them(stack):
    import torch

    with torch.device("meta"):
        made = [UNet2DConditionModel(), UNetMotionModel(), MotionAdapter(motion_max_seq_length=32), AutoencoderKL()]
    for config in (*(dict(one.config) for one in made), SDXL, LARGEST_CLIP, CLIPTextConfig().to_dict(), dict(stack.vae.config)):
        assert immodest(config) is None
    for path in (Path(__file__).parents[3] / "miniature").rglob("config.json"):
        assert immodest(json.loads(path.read_text())) is None


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"layers_per_block": 10**6}, "layers_per_block"),
        ({"layers_per_block": [2, 2, 10**6]}, "layers_per_block"),
        ({"layers_per_block": 60, "transformer_layers_per_block": 60}, "layers in all"),
        ({"transformer_layers_per_block": [[1, 1], [64] * 2, [64] * 2], "layers_per_block": 8}, "layers in all"),
        ({"reverse_transformer_layers_per_block": [64] * 3, "layers_per_block": 8}, "layers in all"),
        ({"motion_mid_block_layers_per_block": 64, "motion_transformer_layers_per_mid_block": 64}, "layers in all"),
        ({"motion_max_seq_length": 10**8}, "motion_max_seq_length"),
        ({"num_hidden_layers": 10**4}, "num_hidden_layers"),
        ({"num_encoder_blocks": [1, 10**4]}, "num_encoder_blocks"),
        ({"block_out_channels": [1] * 2000}, "block_out_channels with a list of 2000 entries"),
        ({"cross_attention_dim": 2**40}, "cross_attention_dim"),
        ({"norm_eps": float("nan")}, "norm_eps nan"),
        ({"norm_eps": 10**400}, "norm_eps"),
        ({"sample_size": [[[[1]]]]}, "sample_size"),
    ],
)
def test_what_is_beyond_them(changed, said):
    assert said in immodest(SDXL | changed)
