"""Operations counted on the meta device, which has shapes and no numbers: two for each multiplication with its addition."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel, UNetMotionModel

from avdm2_nodes.diffusion.layers import without_waste
from avdm2_nodes.diffusion.unets import guided, video_predictor
from training.cost.operations import SD15, TOKENS, V3, operations

SD15_UNET = SD15 | V3  # of diffusers' UNetMotionModel
SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}
STUDENT_STEPS, TEACHER_STEPS = 4, 25


@torch.no_grad()
def unet_operations(config: dict, clip: tuple[int, ...], tokens: int = TOKENS, classifier_free: bool = False) -> int:
    """Of one evaluation by a UNetMotionModel of this configuration, for clips (B, C, F, h, w); guided, of both halves."""
    with torch.device("meta"):
        unet = without_waste(
            UNetMotionModel.from_config(config) if "_class_name" in config else UNetMotionModel(**config)
        ).eval()
        x_t, t = torch.empty(clip), torch.empty(clip[0], dtype=torch.long)
        text = torch.empty(clip[0], tokens, unet.config.cross_attention_dim)
    predict = video_predictor(unet)
    predict = guided(predict, text[:1], 3.0) if classifier_free else predict
    return operations(lambda: predict(x_t, t, text))


@torch.no_grad()
def image_unet_operations(frames: int, height: int, width: int, tokens: int = TOKENS) -> int:
    """Of SD1.5's image UNet, for `frames` images of height x width pixels."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15).eval()
        x_t, text = torch.empty(frames, 4, height // 8, width // 8), torch.empty(frames, tokens, SD15["cross_attention_dim"])
        return operations(lambda: unet(x_t, torch.empty(frames), text))


@torch.no_grad()
def decoder_operations(vae, latents: tuple[int, ...]) -> int:
    """Of decoding latents (N, C, h, w) by an autoencoder of this kind."""
    with torch.device("meta"):
        copy, z = type(vae).from_config(vae.config).eval(), torch.empty(latents)
        return operations(lambda: copy.decode(z))


def sd15_table(frames: int = 16, side: int = 512) -> dict[str, float]:
    """Tera-operations of SD1.5's parts for a clip, and of whole clips by student and teacher."""
    latent = side // 8
    with torch.device("meta"):
        vae, taesd = AutoencoderKL(**SD15_VAE), AutoencoderTiny()
    evaluation = unet_operations(SD15_UNET, (1, 4, frames, latent, latent))
    step = unet_operations(SD15_UNET, (1, 4, frames, latent, latent), classifier_free=True)
    decoding, fast = (decoder_operations(kind, (frames, 4, latent, latent)) for kind in (vae, taesd))
    student, teacher = STUDENT_STEPS * evaluation, TEACHER_STEPS * step
    counted = {
        "image UNet, an evaluation of every frame": image_unet_operations(frames, side, side),
        "video UNet, an evaluation": evaluation,
        f"student, {STUDENT_STEPS} evaluations": student,
        f"teacher, {TEACHER_STEPS} guided steps": teacher,
        "VAE, decoding": decoding,
        "TAESD, decoding": fast,
        "student's clip, VAE": student + decoding,
        "student's clip, TAESD": student + fast,
        "teacher's clip, VAE": teacher + decoding,
    }
    return {name: count / 1e12 for name, count in counted.items()}
