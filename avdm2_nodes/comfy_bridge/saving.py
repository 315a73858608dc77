"""Students as files: with the styles that are in their weights, in the folders where they are looked for."""

from dataclasses import replace
from pathlib import Path

from ..diffusion.style import add_change
from ..files import student as student_file
from ..files.interchange import export_animatediff
from ..files.student_info import StudentFileError
from ..files.student_unet import student_unet
from . import folders
from .models import Student


def save_student(student: Student, name: str) -> Path:
    """Writes a student below the folder of students; its path.

    StudentFileError for a name that leaves it or exists, and for a style that no file can hold.
    """
    path = student_file.student_path(folders.saving_folder(folders.STUDENTS), name)
    if path.exists():
        raise StudentFileError(f"Expected a new name, found {path.name} there already; choose another name.")
    whole = as_one_file(student)
    path.parent.mkdir(parents=True, exist_ok=True)
    student_file.write_student(path, whole.tensors, whole.info)
    return path


def export_student(student: Student, name: str) -> list[Path]:
    """Writes a student where other packs find AnimateDiff's motion modules and LoRA; the paths. Errors as `export_animatediff`."""
    require_no_guide(student)
    if student.changes:
        raise StudentFileError(
            f"Expected a student without styles for AnimateDiff files, found one with {_names(student.changes)} in its weights, "
            "which these formats have no place for; save it as a student file."
        )
    return export_animatediff(student.file, folders.saving_folder(folders.MOTION), name, folders.saving_folder(folders.LORAS))


def as_one_file(student: Student) -> student_file.Student:
    """The student as its file has it, or, with styles in its weights, one of whole weights with these merged, in float16.

    StudentFileError for a style that guides the sampling.
    """
    require_no_guide(student)
    if not student.changes:
        return student.file
    unet = student_unet(student.file, student.teacher.image_unet())
    for change in student.changes:
        add_change(unet, change.tensors(), change.use.strength)
    info = student.file.info
    uses = (*info.styles, *(change.use for change in student.changes))
    whole = replace(info, holds="all", lora_rank=None, lora_alpha=None, styles=uses)
    tensors = dict(unet.named_parameters()) | dict(unet.named_buffers())
    return student_file.Student(whole, {name: t.detach().half() for name, t in tensors.items()}, student.file.name)


def require_no_guide(student: Student) -> None:
    if student.guides:
        raise StudentFileError(
            f"Expected styles that are in the student's weights, found {_names(student.guides)}, which guides the sampling and which "
            "no file can hold; use the mode transplant or a style file, or wire the student from before the Style Transfer."
        )


def _names(styles) -> str:
    return " and ".join(getattr(style, "use", style).name for style in styles)
