"""diffusers' networks and ComfyUI's own: a stack as native MODEL, CLIP and VAE, and a native MODEL as a diffusers UNet."""

from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import comfy.latent_formats
import comfy.lora
import comfy.model_base
import comfy.model_management as management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import nn

from ..errors import SentenceError
from ..files.stack import Stack, load_stack
from .motion import core_patcher


class NativeModelError(SentenceError, ValueError):
    """A MODEL or VAE that does not fit; the message is one sentence."""


class _Multiple(Fraction):
    """A level's width as a multiple of the first's; core multiplies it by whole numbers and wants these back, 1.5 x 64 among them."""

    def __mul__(self, other):
        return int(Fraction.__mul__(self, other))

    __rmul__ = __mul__


class StackConfig(comfy.supported_models.SD15):
    """Core's configuration of a stack of SD1.5's kind and any size."""

    norm_groups = 32  # that core's layers have built in

    def inpaint_model(self) -> bool:
        return False


def load_native_stack(folder: Path):
    """A stack of diffusers' layout as (MODEL, CLIP, VAE), all native. StackError or NativeModelError where it cannot be."""
    stack = load_stack(folder, with_motion=False)
    return stack_model(folder, stack=stack), stack_clip(stack), native_vae(stack.vae)


def stack_model(folder: Path, disable_dynamic: bool = False, stack: Stack | None = None):
    """A stack's image model as a native MODEL."""
    stack = stack or load_stack(folder, with_motion=False)
    _require_sd15_kind(stack.image_unet.config, stack.folder)
    patcher = image_model(stack.image_unet, stack_latent_format(stack), disable_dynamic)
    patcher.cached_patcher_init = (stack_model, (folder,))  # core makes a second one of it, for another GPU or for hooks
    return patcher


def image_model(unet: UNet2DConditionModel, latent_format, disable_dynamic: bool = False):
    """A diffusers UNet of SD1.5's kind as a native MODEL of its own, its weights copied."""
    said = unet.config
    config = StackConfig(_comfy_config(said))
    config.unet_config["num_heads"] = said.attention_head_dim  # as diffusers names it
    config.latent_format, config.norm_groups = latent_format, said.norm_num_groups
    parameters = sum(p.numel() for p in unet.parameters())
    device, offload = management.get_torch_device(), management.unet_offload_device()
    dtype = management.unet_dtype(device, parameters, [torch.float16, torch.bfloat16, torch.float32])
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device))
    model = _network(config, offload)
    ours, names = unet.state_dict(), comfy.utils.unet_to_diffusers(config.unet_config)
    model.load_model_weights({theirs: ours[name].to(dtype) for name, theirs in names.items() if name in ours})
    model.eval().requires_grad_(False)  # 0.8 leaves gradients on
    return core_patcher(disable_dynamic)(model, load_device=device, offload_device=offload)


def apart(model):
    """A MODEL's weights and patches in a network of its own, so that core can hold both at once, each with other patches.

    Nothing is copied: the tensors are the MODEL's, without its patches, until core moves or patches one of the two; it does so with
    tensors of its own, but for hooks on prompts, which write into a network's tensors while they act.
    """
    held = model.get_key_patches("diffusion_model.")
    made = _network(model.model.model_config, torch.device("meta"))
    weights = {key.removeprefix("diffusion_model."): entry[0][0].detach() for key, entry in held.items()}
    made.diffusion_model.load_state_dict(
        {name: weight.to(model.offload_device) for name, weight in weights.items()}, assign=True
    )
    made.device = model.offload_device
    made.eval().requires_grad_(False)
    patcher = core_patcher()(made, load_device=model.load_device, offload_device=model.offload_device)
    patcher.patches = {key: list(changes) for key, changes in model.patches.items()}
    patcher.patches_uuid = model.patches_uuid
    return patcher


def _network(config, device: torch.device) -> comfy.model_base.BaseModel:
    model = comfy.model_base.BaseModel(config, device=device)
    if isinstance(config, StackConfig):
        for module in model.diffusion_model.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = config.norm_groups
    return model


def _require_sd15_kind(said, folder: Path) -> None:
    """NativeModelError for an image UNet that core's SD1.5 network does not describe."""
    found = {
        "block_out_channels": all(width % 32 == 0 for width in said.block_out_channels),  # by the groups of core's layers
        "layers_per_block": isinstance(said.layers_per_block, int),
        "attention_head_dim": isinstance(said.attention_head_dim, int),
        "num_attention_heads": said.num_attention_heads is None,
        "use_linear_projection": not said.use_linear_projection,
        "transformer_layers_per_block": said.transformer_layers_per_block == 1,
        "class_embed_type": said.class_embed_type is None and said.addition_embed_type is None,
    }
    if other := [key for key, good in found.items() if not good]:
        raise NativeModelError(
            f"Expected an image UNet of SD1.5's kind in {folder}, found another by its {' and '.join(other)}; use an SD1.5 stack."
        )


def _comfy_config(said) -> dict:
    """What builds core's UNet from what diffusers says of its shape."""
    widths, layers = said.block_out_channels, said.layers_per_block
    attends = [int("CrossAttn" in kind) for kind in said.down_block_types]
    return {
        "image_size": 32,
        "use_checkpoint": False,
        "use_spatial_transformer": True,
        "legacy": False,
        "in_channels": said.in_channels,
        "out_channels": said.out_channels,
        "model_channels": widths[0],
        "channel_mult": [_Multiple(width, widths[0]) for width in widths],
        "num_res_blocks": [layers] * len(widths),
        "transformer_depth": [here for here in attends for _ in range(layers)],
        "transformer_depth_output": [here for here in attends for _ in range(layers + 1)],
        "transformer_depth_middle": 1,
        "context_dim": said.cross_attention_dim,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
    }


def stack_clip(stack: Stack) -> comfy.sd.CLIP:
    """A stack's tokenizer and text encoder as core's CLIP, with all that core's nodes do to one."""
    config = stack.text_encoder.config
    tokenizer, length = stack.tokenizer, stack.tokenizer.model_max_length
    special = {"start": tokenizer.bos_token_id, "end": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    encoder = partial(
        comfy.sd1_clip.SDClipModel, max_length=length, textmodel_json_config=config.to_dict() | {"eos_token_id": special["end"]},
        special_tokens=special, return_projected_pooled=False,
    )  # fmt: skip
    words = partial(
        comfy.sd1_clip.SDTokenizer, tokenizer_path=str(stack.folder / "tokenizer"), max_length=length,
        embedding_size=config.hidden_size, pad_token=special["pad"],
    )  # fmt: skip
    target = SimpleNamespace(
        params={},
        clip=partial(comfy.sd1_clip.SD1ClipModel, clip_model=encoder),
        tokenizer=partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=words),
    )
    clip = comfy.sd.CLIP(target, embedding_directory=folder_paths.get_folder_paths("embeddings"))
    weights = {_text_key(name): weight for name, weight in stack.text_encoder.state_dict().items()}
    rows = clip.cond_stage_model.clip_l.transformer.text_model.embeddings.token_embedding.weight.shape[0]
    table = weights["text_model.embeddings.token_embedding.weight"]
    weights["text_model.embeddings.token_embedding.weight"] = nn.functional.pad(table, (0, 0, 0, rows - len(table)))
    clip.cond_stage_model.load_sd(weights)
    return clip


def _text_key(name: str) -> str:
    return name if name.startswith("text_model.") else f"text_model.{name}"


def require_sd15(model, name: str = "the MODEL") -> None:
    """NativeModelError for anything that is not an SD1.5 image model predicting noise."""
    base = model.model
    if not isinstance(base.model_config, comfy.supported_models.SD15):
        raise NativeModelError(f"Expected an SD1.5 model in {name}, found {_kind(model)}; choose one that was made from SD1.5.")
    sampling = model.get_model_object("model_sampling")
    predicts = type(sampling).calculate_denoised
    if base.model_type != comfy.model_base.ModelType.EPS or predicts in _NOT_NOISE:
        found = "v prediction" if predicts is comfy.model_sampling.V_PREDICTION.calculate_denoised else "another prediction"
        raise NativeModelError(
            f"Expected a model that predicts noise in {name}, found {found}; AnimateDiff and its students need the common SD1.5 kind."
        )
    if getattr(sampling, "zsnr", False):
        raise NativeModelError(
            f"Expected a model of SD1.5's noise schedule in {name}, found one of zero terminal SNR; "
            "AnimateDiff and its students need the common SD1.5 kind."
        )


_NOT_NOISE = {
    getattr(comfy.model_sampling, kind).calculate_denoised
    for kind in ("V_PREDICTION", "V_PREDICTION_DDPM", "EDM", "X0", "CONST", "IMG_TO_IMG")
    if hasattr(comfy.model_sampling, kind)
}


def base_weights(model) -> dict[str, torch.Tensor]:
    """A MODEL's UNet as its file holds it, without LoRAs, by diffusers' names; in the dtype that core loaded it in, on the CPU."""
    patches = model.get_key_patches("diffusion_model.")
    return {
        ours: entry[0][1](entry[0][0].to("cpu"), inplace=False)
        for ours, theirs in comfy.utils.unet_to_diffusers(model.model.model_config.unet_config).items()
        if (entry := patches.get(f"diffusion_model.{theirs}")) is not None
    }


def unet_shell(model, name: str = "the MODEL") -> UNet2DConditionModel:
    """A native MODEL's UNet as diffusers has it, on the meta device, without its weights.

    NativeModelError for anything that is not an SD1.5 image model predicting noise, or one with more inputs than a latent.
    """
    require_sd15(model, name)
    said = model.model.model_config.unet_config
    if said.get("in_channels") != 4:
        raise NativeModelError(
            f"Expected an SD1.5 model of 4 input channels in {name}, found {said.get('in_channels')}; an inpainting or pix2pix model "
            "cannot take its place."
        )
    with torch.device("meta"):
        return UNet2DConditionModel(**diffusers_config(model.model.model_config))


def image_unet_of(model, name: str = "the MODEL") -> UNet2DConditionModel:
    """A native MODEL's UNet with the user's LoRAs in it, as diffusers has it: float32, on the CPU, frozen. Errors as `unet_shell`."""
    unet, said = unet_shell(model, name), model.model.model_config.unet_config
    patches = model.get_key_patches("diffusion_model.")
    weights = {}
    for ours, theirs in comfy.utils.unet_to_diffusers(said).items():
        entry = patches.get(f"diffusion_model.{theirs}")
        if entry is not None:  # the map also names samplers that the outermost blocks do not have
            (weight, convert), *changes = entry
            weight = convert(weight.to("cpu", torch.float32, copy=True), inplace=True)
            weights[ours] = comfy.lora.calculate_weight(changes, weight, f"diffusion_model.{theirs}")
    unet.load_state_dict(weights, assign=True)
    return unet.eval().requires_grad_(False)


def _kind(model) -> str:
    return f"a model of ComfyUI's kind {model.model.model_config.__class__.__name__}"


def diffusers_config(config) -> dict:
    """What builds the UNet in diffusers from what ComfyUI found of its shape."""
    said = config.unet_config
    depth, layers = said["transformer_depth"], said["num_res_blocks"][0]
    attends = [depth[i * layers] > 0 for i in range(len(said["channel_mult"]))]
    down = ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends]
    up = ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)]
    return {
        "sample_size": 64,
        "in_channels": said["in_channels"],
        "out_channels": said["out_channels"],
        "block_out_channels": tuple(int(said["model_channels"] * m) for m in said["channel_mult"]),
        "layers_per_block": layers,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "cross_attention_dim": said["context_dim"],
        "attention_head_dim": said["num_heads"],
        "norm_num_groups": config.norm_groups if isinstance(config, StackConfig) else 32,
    }


def stack_latent_format(stack: Stack) -> comfy.latent_formats.LatentFormat:
    """The latent format of a stack: its VAE's scale, and its own colours of previews where it has them, else SD1.5's."""
    latent_format = comfy.latent_formats.SD15(stack.vae.config.scaling_factor)
    latent_format.latent_channels = stack.vae.config.latent_channels
    for name in ("latent_rgb_factors", "latent_rgb_factors_bias"):
        if name in stack.facts:
            setattr(latent_format, name, stack.facts[name])
    return latent_format


def native_vae(vae) -> comfy.sd.VAE:
    """A stack's VAE as ComfyUI's own, which VAE Decode and VAE Encode take. NativeModelError where ComfyUI has no such VAE."""
    weights = vae.state_dict()
    if isinstance(vae, AutoencoderTiny):
        widths = {*vae.config.encoder_block_out_channels, *vae.config.decoder_block_out_channels}
        if widths != {64}:
            raise NativeModelError(
                f"Expected a VAE of the TAESD architecture at width 64, which ComfyUI has, found widths {sorted(widths)}; "
                "use another VAE."
            )
        weights = {_taesd_key(key): weight for key, weight in weights.items()}
        weights |= {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    return comfy.sd.VAE(sd=weights)


def _taesd_key(key: str) -> str:
    half, _, layer, rest = key.split(".", 3)
    return f"taesd_{half}.{int(layer) + (half == 'decoder')}.{rest}"  # core's decoder begins with a clamp
