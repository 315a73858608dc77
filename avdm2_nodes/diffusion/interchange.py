"""Students as files that other tools load: AnimateDiff's motion modules and a LoRA, under their original names."""

from pathlib import Path

from .motion_file import HEADS_KEY, export_motion_file
from .sd15_file import export_lora_file, lora_layers
from .student_file import SUFFIX, Student, StudentFileError, positions, student_path


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
