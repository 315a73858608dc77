"""The networks of a run, as its settings ask for them."""

import torch
from diffusers import UNet2DConditionModel

from avdm2_nodes.files.stack import Stack
from avdm2_nodes.files.student import Student, read_student
from avdm2_nodes.files.student_info import StudentFileError
from training.data.latents import LatentClips
from training.method.discriminator import DiscriminatorHeads, heads_for
from training.method.roles import Roles, build_roles
from training.run.config import DistillConfig
from training.run.precision import autocast


def begin_from(config: DistillConfig) -> Student | None:
    """The finished student that the run goes on from, if any. StudentFileError where a style's steps or chain are not that student's."""
    if config.model.student is None:
        return None
    student = read_student(config.model.student)
    if config.model.train == "style" and student.info.chain != "renoise":
        raise StudentFileError(
            f"Expected a student whose steps draw fresh noise, beside which a style is learnt, found {student.name} of another method "
            f"(chain {student.info.chain}); choose one that was distilled by training/distill.py."
        )
    if config.model.train == "style" and student.info.timesteps != config.student.steps:
        raise StudentFileError(
            f"Expected student.steps as {student.name} has them, for a style leaves them as they are, found {list(config.student.steps)}; "
            f"set {','.join(map(str, student.info.timesteps))}."
        )
    return student


def new_roles(
    config: DistillConfig,
    stack: Stack,
    score_unet: UNet2DConditionModel | None,
    begun: Student | None = None,
    half: bool = False,
    device: torch.device | None = None,
) -> Roles:
    """The networks that a run's settings ask for, on `device`; with `half` in bf16."""
    return build_roles(
        stack,
        train=config.model.train,
        score_unet=score_unet,
        share_base=config.model.share_base,
        lora_rank=config.model.lora_rank,
        gradient_checkpointing=config.model.gradient_checkpointing,
        seed=config.run.seed,
        student=begun,
        half=half,
        device=device,
    )


def new_heads(config: DistillConfig, roles: Roles, data: LatentClips) -> DiscriminatorHeads:
    """Discriminator heads for the features that this teacher's encoder gives, initialised from the run's seed."""
    clips, text = data.batch([0])
    with torch.no_grad(), autocast(clips.device, config.run.precision):
        features = roles.encoder(clips, torch.zeros(1, dtype=torch.long, device=clips.device), text)
    torch.manual_seed(config.run.seed)
    return heads_for([feature.shape[1] for feature in features], config)
