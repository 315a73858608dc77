"""The student file: one .safetensors with a student's tensors and, in its metadata, all that is needed to run it.

Tensors have the names of diffusers' UNetMotionModel. A student holds every weight of its UNet ("all"), the motion modules
("motion"), or these and LoRA (arXiv 2106.09685) on the spatial layers ("motion+lora"); the latter two need the base whose hash
they name, or any of its architecture where they were made for any.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from torch import Tensor

from .architecture import require_tensors
from .containers import SUFFIX, read_layout
from .described import read_described, write_described
from .recognise import recognise
from .sentences import FileFormatError, is_text
from .student_info import StudentFileError, StudentInfo
from .weights import require_weights


@dataclass(frozen=True)
class Student:
    """A student as `read_student` found it: its tensors by name, and the file's name for messages."""

    info: StudentInfo
    tensors: dict[str, Tensor] = field(repr=False)
    name: str = "the student"


_LONGEST_PART, _LONGEST_NAME = (
    220,
    1000,
)  # bytes, and letters with all subfolders; 255 bytes are the system's, for our temporary names too


def student_path(folder: Path, name: str) -> Path:
    """`name` (which may have subfolders) in `folder`, with the suffix. StudentFileError for a name that leaves the folder.

    Read as Windows does, whose separators and drives are a superset: a name is refused on every system or on none.
    """
    parts = PureWindowsPath(name)
    impossible = not is_text(name) or any(c in '<>:"|?*' or ord(c) < 32 for c in name)
    if parts.anchor or ".." in parts.parts or not parts.name or impossible:
        raise StudentFileError(
            f"Expected the name of a student below its folder, found {name!r}; leave out .., drives, roots and signs."
        )
    if max(len(part.encode()) for part in parts.parts) > _LONGEST_PART or len(name) > _LONGEST_NAME:
        raise StudentFileError(
            f"Expected the name of a student, {_LONGEST_PART} letters at most, found one of {len(name)}; choose a shorter one."
        )
    path = Path(folder).joinpath(*parts.parts)
    return path if path.name.endswith(SUFFIX) else path.with_name(path.name + SUFFIX)


def write_student(path: Path, tensors: Mapping[str, Tensor], info: StudentInfo) -> None:
    """Writes a student file, whole or not at all.

    `tensors` have the names of UNetMotionModel's parameters (all, or those in motion modules) and, with motion+lora, of `lora_pairs`
    of spatial layers. The motion modules' `pos_embed.pe` may be among them; without them a reader takes diffusers' own.
    StudentFileError for tensors that do not fit `info`, another suffix, no such folder, no right to write or no room.
    """
    require_tensors(info, tensors, path)
    write_described(path, tensors, info)


def read_student(path: Path) -> Student:
    """The student in a file, tensors as there, on the CPU.

    StudentFileError for a file that is missing, truncated, no student's, of a newer format, or whose tensors are not those of
    the UNet that it describes, or are no finite numbers.
    """
    info, tensors = read_described(path, StudentInfo, lambda path: recognise(read_layout(path)).phrase)
    require_tensors(info, tensors, path)
    try:
        require_weights(tensors, path, "a student's weights", StudentInfo.REMEDY)
    except FileFormatError as error:
        raise StudentFileError(str(error)) from error
    return Student(info, tensors, str(path))
