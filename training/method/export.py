"""What training leaves: a student file, or a style file."""

from datetime import UTC, datetime
from pathlib import Path

from diffusers import UNet2DConditionModel

from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.licence import licence_of
from avdm2_nodes.files.stack import Stack
from avdm2_nodes.files.student import Student, write_student
from avdm2_nodes.files.student_info import StudentInfo
from avdm2_nodes.files.style import StyleInfo, student_hash, write_style
from training.method.roles import Roles
from training.run.config import DistillConfig, to_yaml
from training.run.folder import RunFolder

STUDENT, STYLE = "student.safetensors", "style.safetensors"


def export(config: DistillConfig, run: RunFolder, stack: Stack, roles: Roles, score_unet) -> Path:
    """Writes the trained weights, as float16, and all that is known of them to `student.safetensors`."""
    path = run.path / STUDENT
    adapted = config.model.train == "motion+lora"
    info = StudentInfo(
        title=f"{stack.folder.name}, {len(config.student.steps)} steps",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        license=licence_of(stack.folder),
        holds=config.model.train,
        timesteps=config.student.steps,
        frames=config.data.frames,
        height=config.data.height,
        width=config.data.width,
        unet_config=roles.student_config,
        base_name=stack.folder.name,
        base_hash=weights_hash(stack.image_unet),
        score_name=(config.model.score_unet or stack.folder).name,
        score_hash=weights_hash(score_unet or stack.image_unet),
        lora_rank=config.model.lora_rank if adapted else None,
        lora_alpha=config.model.lora_rank if adapted else None,
        updates=config.run.updates,
        training_config=to_yaml(config),
    )
    tensors = roles.student_weights | roles.student_positions
    write_student(path, {name: tensor.half() for name, tensor in tensors.items()}, info)
    return path


def export_style(
    config: DistillConfig, run: RunFolder, stack: Stack, roles: Roles, style: UNet2DConditionModel, student: Student
) -> Path:
    """Writes the trained LoRA, as float16, and all that is known of it to `style.safetensors`."""
    path, name = run.path / STYLE, config.style.name or (config.style.images or config.model.score_unet).stem
    info = StyleInfo(
        name=name,
        hash=weights_hash(style),
        student_name=student.info.title,
        student_hash=student_hash(student),
        lora_rank=config.model.lora_rank,
        lora_alpha=config.style.strength * config.model.lora_rank,
        updates=config.warmup.updates + config.run.updates,
        training_config=to_yaml(config),
        title=f"{name} for {student.info.title}",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        license=licence_of(stack.folder),
    )
    write_style(path, {name: tensor.half() for name, tensor in roles.student_weights.items()}, info)
    return path
