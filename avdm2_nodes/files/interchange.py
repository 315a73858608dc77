"""Students as other tools load them: AnimateDiff's motion modules and a LoRA under their original names, or a diffusers folder."""

import os
import shutil
from pathlib import Path

from diffusers import EulerDiscreteScheduler, LCMScheduler
from safetensors import SafetensorError
from torch import nn

from ..diffusion.schedules import VIDEO
from .containers import SUFFIX
from .lora import export_lora_file, lora_layers
from .motion import HEADS_KEY, export_motion_file
from .sentences import reason, told_writing
from .stack import Stack
from .student import Student, student_path
from .student_info import StudentFileError, StudentInfo
from .student_unet import positions, student_unet


def export_animatediff(student: Student, folder: Path, name: str, lora_folder: Path | None = None) -> list[Path]:
    """Writes `<name>_motion.safetensors` into `folder` and, with LoRA, `<name>_lora.safetensors` into `lora_folder`; the paths.

    Both go into `folder` where no other is given.

    Such files run in ComfyUI-AnimateDiff-Evolved and diffusers as the metadata's usage hint says. StudentFileError for a student
    that holds all its weights, which these formats have no place for, for a name that leaves the folder or exists, and where
    nothing can be written.
    """
    info = student.info
    if info.holds == "all":
        raise StudentFileError(
            f"Expected a student of motion modules, with or without LoRA, to export from {student.name}, found one that holds all "
            "its weights; save it as a student file, or train one with model.train=motion+lora."
        )
    stems = [student_path(place, name).with_suffix("") for place in (folder, lora_folder or folder)]
    paths = [stem.with_name(f"{stem.name}_{part}{SUFFIX}") for stem, part in zip(stems, ("motion", "lora"), strict=True)]
    paths = paths[:1] if info.holds == "motion" else paths
    with told_writing(paths[0], StudentFileError):
        if taken := next((path for path in paths if path.exists()), None):
            raise StudentFileError(f"Expected a new name, found {taken.name} there already; choose another name.")
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {key: text for key, text in info.to_metadata().items() if key.startswith("modelspec.")}
    metadata[HEADS_KEY] = str(info.unet_config.get("motion_num_attention_heads", 8))
    try:
        export_motion_file(student.tensors | positions(student), paths[0], metadata)
        for path in paths[1:]:
            export_lora_file(path, lora_layers(student.tensors, info.lora_alpha), metadata)
    except (OSError, ValueError):
        paths[0].unlink(missing_ok=True)  # one without the other is no student
        raise
    return paths


def export_diffusers(student: Student, stack: Stack, folder: Path) -> None:
    """Writes a folder that `AnimateDiffPipeline.from_pretrained` loads: the student on its base `stack`, with a scheduler of its steps.

    LoRA layers are merged into the UNet, which is float16; README.md says how it is sampled, and its licence. StudentFileError as
    `student_unet`, for a folder that is not empty, for steps that no scheduler of diffusers has, and where nothing can be written.
    """
    from diffusers import AnimateDiffPipeline  # imports much that nothing else here needs

    folder, info = Path(folder), student.info
    require_new_folder(folder)
    with told_writing(folder, StudentFileError):
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    scheduler = diffusers_scheduler(info)
    unet = nn.Module.half(student_unet(student, stack.image_unet))  # diffusers' own warns of parts that this UNet does not have
    pipeline = AnimateDiffPipeline(stack.vae, stack.text_encoder, stack.tokenizer, unet, None, scheduler)
    try:
        with told_writing(folder, StudentFileError):
            pipeline.save_pretrained(temporary)
            (temporary / "README.md").write_text(_readme(info), encoding="utf-8")
            if folder.exists():
                folder.rmdir()
            temporary.rename(folder)
    except SafetensorError as error:  # of its own, though the system's is behind it
        raise StudentFileError(
            f"Expected room to write {folder}, found: {reason(error)}; name another place or make room."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_new_folder(folder: Path) -> None:
    """StudentFileError for a folder that holds something, and for a path that is none."""
    with told_writing(folder, StudentFileError):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StudentFileError(f"Expected a new or empty folder at {folder}, found something in it; name another.")


def diffusers_scheduler(info: StudentInfo) -> LCMScheduler | EulerDiscreteScheduler:
    """diffusers' scheduler that samples as `sample_student` does at the student's own timesteps; StudentFileError where it has none.

    Our chain is LCMScheduler's but for its boundary scaling, which is 1 - c_out < 1e-6 from t = 99 upwards.
    """
    betas = {"beta_schedule": VIDEO.beta_schedule, "beta_start": VIDEO.beta_start, "beta_end": VIDEO.beta_end}
    if info.chain == "euler":
        scheduler = EulerDiscreteScheduler(**betas, timestep_spacing="trailing")
    else:
        scheduler = LCMScheduler(**betas, original_inference_steps=100)
    scheduler.set_timesteps(len(info.timesteps))
    found = [int(t) for t in scheduler.timesteps]
    if found != list(info.timesteps):
        raise StudentFileError(
            f"Expected a student of the timesteps that diffusers has for {len(found)} steps, {found}, found one of "
            f"{list(info.timesteps)}; export it for AnimateDiff, or train one at these steps."
        )
    return scheduler


def _readme(info: StudentInfo) -> str:
    """The model card of a diffusers folder."""
    return f"""---
license: other
license_name: {info.license}
library_name: diffusers
pipeline_tag: text-to-video
---

# {info.title}

A video UNet of {len(info.timesteps)} steps without guidance, for clips of {info.frames} frames of {info.width}x{info.height} pixels, made
from {info.base_name}. Licence: {info.license}.

```python
import torch
from diffusers import AnimateDiffPipeline

pipeline = AnimateDiffPipeline.from_pretrained("this folder", torch_dtype=torch.float16).to("cuda")
frames = pipeline(
    "a prompt", num_frames={info.frames}, width={info.width}, height={info.height},
    num_inference_steps={len(info.timesteps)}, guidance_scale=1.0,
).frames[0]
```
"""
