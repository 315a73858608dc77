"""An SD1.5 checkpoint in one file: image UNet, VAE and text encoder without a hub.

Its original names are those of CompVis' latent diffusion (github.com/CompVis/stable-diffusion), which ComfyUI reads.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from .containers import read_layout, read_tensors
from .prediction import require_epsilon
from .recognise import require
from .sentences import FileFormatError, one_line, reason
from .weights import require_weights

_UNET, _VAE, _TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
_BLOCKS, _LAYERS, _HEADS, _GROUPS = 4, 2, 8, 32  # of SD1.5's UNet; the autoencoder has as many blocks and layers
_CLIP_HEAD_WIDTH = 64
_MOST_TEXT_LAYERS = 64  # CLIP of SD1.5 has 12, the largest CLIP 48
_POSITION_IDS = "embeddings.position_ids"  # 0, 1, 2, …: no weight, and in old files alone


def load_sd15_file(path: Path) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """Image UNet, VAE and text encoder of an SD1.5 checkpoint with original names, float32 on the CPU, frozen.

    Widths come from the shapes, the rest is SD1.5's. Weights of an exponential moving average (`model_ema.`) are left alone.
    FileFormatError for a file that is something else, is damaged, lacks one of the three, or predicts something else than noise.
    """
    path = Path(path)
    layout = read_layout(path)
    require(path, ("sd15",), "an SD1.5 checkpoint", layout)
    require_epsilon(path, layout)
    tensors = read_tensors(path)
    parts = {
        "the UNet": (_new_unet, _unet_to_diffusers(_below(tensors, _UNET))),
        "a VAE": (_new_vae, _vae_to_diffusers(_below(tensors, _VAE))),
        "a CLIP text encoder": (_new_text_encoder, _text_to_transformers(_below(tensors, _TEXT))),
    }
    for what, (_, own) in parts.items():  # before the long work
        if not own:
            raise FileFormatError(
                f"Expected {what} in {path}, found none; choose a checkpoint that holds UNet, VAE and text encoder."
            )
    unet, vae, text_encoder = (_loaded(own, new, what, path) for what, (new, own) in parts.items())
    return unet, vae, text_encoder


def unet_to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of SD1.5's UNet -> original names, as they stand in a checkpoint.

    Of a video UNet the spatial layers alone: motion modules are a file of their own.
    """
    names = {theirs: original for original, theirs in _unet_names().items()}
    spatial = {key: tensor for key, tensor in state.items() if "motion_modules." not in key}
    return {_UNET + key: tensor for key, tensor in _renamed(spatial, names).items()}


# ---- names ----


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors with the longest module of `names` that their own name lies in spelt anew; other names stay."""
    renamed = {}
    for key, tensor in tensors.items():
        module = key
        while module and module not in names:
            module = module.rpartition(".")[0]
        renamed[names.get(module, "") + key[len(module) :]] = tensor
    return renamed


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix`, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _unet_names() -> dict[str, str]:
    """Module of the original UNet -> module of diffusers'; below an attention both have the same names."""
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    last = _BLOCKS - 1
    for block in range(_BLOCKS):
        for layer in range(_LAYERS):
            entry = f"input_blocks.{1 + block * (_LAYERS + 1) + layer}"
            resnets[f"{entry}.0"] = f"down_blocks.{block}.resnets.{layer}"
            if block != last:
                names[f"{entry}.1"] = f"down_blocks.{block}.attentions.{layer}"
        if block != last:
            names[f"input_blocks.{(block + 1) * (_LAYERS + 1)}.0.op"] = f"down_blocks.{block}.downsamplers.0.conv"
        for layer in range(_LAYERS + 1):
            entry = f"output_blocks.{block * (_LAYERS + 1) + layer}"
            resnets[f"{entry}.0"] = f"up_blocks.{block}.resnets.{layer}"
            if block != 0:
                names[f"{entry}.1"] = f"up_blocks.{block}.attentions.{layer}"
        if block != last:
            after = 1 if block == 0 else 2  # behind the resnet, or behind resnet and attention
            names[f"{entry}.{after}.conv"] = f"up_blocks.{block}.upsamplers.0.conv"
    within = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    for original, theirs in resnets.items():
        names |= {f"{original}.{a}": f"{theirs}.{b}" for a, b in within.items()}
    return names


def _unet_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _renamed(tensors, _unet_names())


def _vae_names() -> dict[str, str]:
    """Module of the original autoencoder -> module of diffusers'."""
    names, resnets = {}, {}
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    # Some converters write the original file with the names that diffusers has had for an attention, old and new.
    attention |= {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"} | {n: n for n in attention.values()}
    for half in ("encoder", "decoder"):
        names[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        names |= {f"{half}.mid.attn_1.{a}": f"{half}.mid_block.attentions.0.{b}" for a, b in attention.items()}
        resnets |= {f"{half}.mid.block_{i + 1}": f"{half}.mid_block.resnets.{i}" for i in range(2)}
    for block in range(_BLOCKS):
        mirrored = _BLOCKS - 1 - block  # the original decoder counts its blocks from the finest
        resnets |= {f"encoder.down.{block}.block.{i}": f"encoder.down_blocks.{block}.resnets.{i}" for i in range(_LAYERS)}
        resnets |= {f"decoder.up.{mirrored}.block.{i}": f"decoder.up_blocks.{block}.resnets.{i}" for i in range(_LAYERS + 1)}
        names[f"encoder.down.{block}.downsample"] = f"encoder.down_blocks.{block}.downsamplers.0"
        names[f"decoder.up.{mirrored}.upsample"] = f"decoder.up_blocks.{block}.upsamplers.0"
    names |= resnets | {f"{original}.nin_shortcut": f"{theirs}.conv_shortcut" for original, theirs in resnets.items()}
    return names


def _vae_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original -> diffusers' names; the attention's convolutions of one pixel become the linear layers that they are."""
    renamed = _renamed(tensors, _vae_names())
    return {
        key: tensor.flatten(1) if ".attentions.0.to_" in key and tensor.ndim > 2 else tensor for key, tensor in renamed.items()
    }


def _text_to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of transformers' CLIPTextModel since 5.6; some old files have them so already."""
    return {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}


# ---- models ----


def _new_unet(tensors: Mapping[str, Tensor]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=64,
            block_out_channels=[tensors[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(_BLOCKS)],
            layers_per_block=_LAYERS,
            cross_attention_dim=tensors["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
            attention_head_dim=_HEADS,  # diffusers' old misnomer: the number of heads
            norm_num_groups=_GROUPS,
        )


def _new_vae(tensors: Mapping[str, Tensor]) -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(
            sample_size=512,
            block_out_channels=[tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(_BLOCKS)],
            down_block_types=["DownEncoderBlock2D"] * _BLOCKS,
            up_block_types=["UpDecoderBlock2D"] * _BLOCKS,
            layers_per_block=_LAYERS,
            latent_channels=tensors["post_quant_conv.weight"].shape[0],
            norm_num_groups=_GROUPS,
            scaling_factor=0.18215,
        )


def _new_text_encoder(tensors: Mapping[str, Tensor]) -> CLIPTextModel:
    tokens, width = tensors["embeddings.token_embedding.weight"].shape
    layers = {key.split(".")[2] for key in tensors if key.startswith("encoder.layers.")}
    if len(layers) > _MOST_TEXT_LAYERS:
        raise ValueError(f"{len(layers)} layers")
    with torch.device("meta"):
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=tokens,
                hidden_size=width,
                intermediate_size=tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=len(layers),
                num_attention_heads=width // _CLIP_HEAD_WIDTH,
                max_position_embeddings=tensors["embeddings.position_embedding.weight"].shape[0],
                projection_dim=width,
                hidden_act="quick_gelu",
                bos_token_id=tokens - 2,
                eos_token_id=tokens - 1,
                pad_token_id=tokens - 1,
            )
        )


def _loaded(tensors: dict[str, Tensor], new: Callable[[Mapping[str, Tensor]], nn.Module], what: str, path: Path) -> nn.Module:
    """The module that `new` builds for the tensors, with their values in float32; FileFormatError where the two do not match."""
    tensors = {key: tensor for key, tensor in tensors.items() if key != _POSITION_IDS}
    try:
        module = new(tensors)
    except Exception as error:  # diffusers and transformers raise a dozen kinds for one cause
        raise FileFormatError(
            f"Expected {what} of SD1.5 in {path}, found another or part of one ({reason(error)}); choose another checkpoint."
        ) from error
    prefix = "text_model." if hasattr(module, "text_model") else ""  # transformers before 5.6 wraps the text model once more
    expected = {key.removeprefix(prefix): tensor.shape for key, tensor in module.state_dict().items()}
    expected.pop(_POSITION_IDS, None)
    unlike = [key for key, shape in expected.items() if key not in tensors or tensors[key].shape != shape]
    if isinstance(module, UNet2DConditionModel):  # VAE and text encoder bring along what only their training needed
        unlike += tensors.keys() - expected.keys()
    if unlike:
        raise FileFormatError(
            f"Expected {what} of SD1.5 in {path}, found {len(unlike)} layers unlike its own (such as {one_line(min(unlike))}); "
            "choose another checkpoint."
        )
    require_weights({key: tensors[key] for key in expected}, path, f"{what} of SD1.5", "choose another checkpoint")
    # Copies, so that the module does not hang on the file.
    weights = {prefix + key: tensors[key].to(torch.float32, copy=True) for key in expected}
    module.load_state_dict(weights, strict=False, assign=True)
    if isinstance(module, CLIPTextModel):
        embeddings = module.get_submodule(prefix + "embeddings")
        embeddings.position_ids = torch.arange(embeddings.position_ids.shape[1]).expand((1, -1))
    return module.eval().requires_grad_(False)
