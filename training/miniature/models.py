"""The small stack's parts, untrained: real classes of the real thing at a small width."""

import json
from pathlib import Path

from diffusers import MotionAdapter, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from avdm2_nodes.diffusion.unets import zero_motion

WIDTHS = (64, 96, 96)
HEADS = 4
GROUPS = 8  # of the normalisation: at 32 each would hold two or three channels and swallow the time embedding
TEXT_WIDTH = 128
TOKENS = 32
_START, _END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(folder: Path, captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer with merges for the words of the captions; other words fall to byte pieces, never to unknown.

    As in CLIP's own, a word is one token or a few: where one word's merges fire within another, that one stays in pieces.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = list(bytes_to_unicode().values())
    merges: list[tuple[str, str]] = []
    for word in sorted({word for caption in captions for word in caption.split()}):
        pieces = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(pieces)):
            pair = ("".join(pieces[:i]), pieces[i])
            if pair not in merges:
                merges.append(pair)
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges), _START, _END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": TOKENS,
                "bos_token": _START,
                "eos_token": _END,
                "unk_token": _END,
                "pad_token": _END,
                "do_lower_case": True,
            },
            indent=2,
        )
    )
    return CLIPTokenizer.from_pretrained(folder)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_image_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=HEADS,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=GROUPS,
    )


def new_motion_adapter() -> MotionAdapter:
    """v3-like: no motion module in the mid block, positions for 32 frames, nothing added yet (`proj_out` zero)."""
    return zero_motion(
        MotionAdapter(
            block_out_channels=WIDTHS,
            motion_layers_per_block=1,
            motion_num_attention_heads=HEADS,
            motion_norm_num_groups=GROUPS,
            motion_max_seq_length=32,
            use_motion_mid_block=False,
        )
    )
