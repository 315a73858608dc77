"""ComfyUI's own models and ours: a native SD1.5 MODEL as a diffusers UNet, a stack's VAE as a native VAE."""

import comfy.latent_formats
import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel

from ..files.stack import Stack


class NativeModelError(ValueError):
    """A MODEL or VAE that does not fit; the message is one sentence."""


def image_unet_of(model, name: str = "the MODEL") -> UNet2DConditionModel:
    """A native MODEL's UNet with the user's LoRAs in it, as diffusers has it: float32, on the CPU, frozen.

    NativeModelError for anything that is not an SD1.5 image model predicting noise.
    """
    config = model.model.model_config
    said = config.unet_config
    if config.__class__.__name__ not in ("SD15", "SD15_instructpix2pix") or said.get("in_channels") != 4:
        raise NativeModelError(f"Expected an SD1.5 model in {name}, found {_kind(model)}; choose one that was made from SD1.5.")
    if model.model.model_type != comfy.model_base.ModelType.EPS:
        raise NativeModelError(
            f"Expected a model that predicts noise in {name}, found {model.model.model_type.name.lower()} prediction; "
            "AnimateDiff and this student need the common SD1.5 kind."
        )
    with torch.device("meta"):  # its weights come from the MODEL
        unet = UNet2DConditionModel(**_diffusers_config(said))
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


def _diffusers_config(said: dict) -> dict:
    """What builds the UNet in diffusers from what ComfyUI found of its shape."""
    depth, layers = said["transformer_depth"], said["num_res_blocks"][0]
    attends = [depth[i * layers] > 0 for i in range(len(said["channel_mult"]))]
    down = ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends]
    up = ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)]
    return {
        "sample_size": 64,
        "in_channels": said["in_channels"],
        "out_channels": said["out_channels"],
        "block_out_channels": tuple(said["model_channels"] * m for m in said["channel_mult"]),
        "layers_per_block": layers,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "cross_attention_dim": said["context_dim"],
        "attention_head_dim": said["num_heads"],
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
