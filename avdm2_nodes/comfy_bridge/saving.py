"""Students as files: with the styles that are in their weights, in the folders where they are looked for."""

from dataclasses import replace
from pathlib import Path

from ..diffusion.style import add_change
from ..files.hashes import weights_hash
from ..files.interchange import export_animatediff
from ..files.student import Student, student_path, write_student
from ..files.student_info import StudentFileError
from ..files.student_unet import student_unet
from . import folders, native
from .facts import Facts, student_facts


def save_student(model, name: str) -> Path:
    """Writes a student below the folder of students; its path.

    StudentFileError for a name that leaves it or exists, and for a style that no file can hold.
    """
    facts = student_facts(model)
    path = student_path(folders.saving_folder(folders.STUDENTS), name)
    if path.exists():
        raise StudentFileError(f"Expected a new name, found {path.name} there already; choose another name.")
    whole = as_one_file(facts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudentFileError(
            f"Expected a folder that can be made at {path.parent}, found: {error.strerror}; choose another name."
        ) from error
    write_student(path, whole.tensors, whole.info)
    return path


def export_student(model, name: str) -> list[Path]:
    """Writes a student where other packs find AnimateDiff's motion modules and LoRA; the paths. Errors as `export_animatediff`."""
    facts = student_facts(model)
    require_no_guide(facts)
    if facts.changes:
        raise StudentFileError(
            f"Expected a student without styles for AnimateDiff files, found one with {_names(facts)} in its weights, "
            "which these formats have no place for; save it as a student file."
        )
    return export_animatediff(facts.student, folders.saving_folder(folders.MOTION), name, folders.saving_folder(folders.LORAS))


def as_one_file(facts: Facts) -> Student:
    """The student as its file has it, or, with styles in its weights, one of whole weights with these merged, in float16.

    StudentFileError for a style that guides the sampling.
    """
    require_no_guide(facts)
    student = facts.student
    if not facts.changes:
        return student
    base = native.image_unet_of(facts.image_model)
    info = replace(student.info, base_hash=weights_hash(base)) if student.info.holds != "all" else student.info
    unet = student_unet(replace(student, info=info), base)
    for change in facts.changes:
        add_change(unet, change.tensors(), change.use.strength)
    uses = (*info.styles, *(change.use for change in facts.changes))
    whole = replace(info, holds="all", lora_rank=None, lora_alpha=None, styles=uses)
    tensors = dict(unet.named_parameters()) | dict(unet.named_buffers())
    return Student(whole, {name: t.detach().half() for name, t in tensors.items()}, student.name)


def require_no_guide(facts: Facts) -> None:
    if facts.guides:
        raise StudentFileError(
            f"Expected styles that are in the student's weights, found {' and '.join(facts.guides)}, which guides the sampling and which "
            "no file can hold; use the mode transplant or a style file, or wire the student from before the Style Transfer."
        )


def _names(facts: Facts) -> str:
    return " and ".join(change.use.name for change in facts.changes)
