"""Writes a student as other tools load it: python training/export.py --student FILE --format animatediff|diffusers --out FOLDER."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository in place of this folder: runs from anywhere
    from training.run import entry

    entry.begin()

import argparse

from avdm2_nodes.files.containers import FileFormatError
from avdm2_nodes.files.interchange import export_animatediff, export_diffusers, require_new_folder
from avdm2_nodes.files.stack import StackError, load_stack
from avdm2_nodes.files.student import read_student
from avdm2_nodes.files.student_info import StudentFileError
from training.run import console
from training.run.config import MODEL
from training.run.folder import RunFolderError, require_writable


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a student as other tools load it.")
    parser.add_argument("--student", type=console.path, required=True, metavar="FILE", help="student file")
    format_help = (
        "animatediff: a motion module and, where the student has one, a LoRA, for ComfyUI and diffusers; "
        "diffusers: a folder that AnimateDiffPipeline loads, base included"
    )
    parser.add_argument("--format", choices=("animatediff", "diffusers"), required=True, help=format_help)
    parser.add_argument(
        "--out", type=console.path, required=True, metavar="FOLDER", help="where it is written; for diffusers a new folder"
    )
    model_help = "for diffusers the student's base: a diffusers folder or an SD1.5 checkpoint (default: the miniature)"
    parser.add_argument("--model", type=console.path, default=MODEL, metavar="PATH", help=model_help)
    parser.add_argument(
        "--tokenizer", type=console.path, metavar="FOLDER", help="CLIP's vocabulary, for a checkpoint in one file"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0, or 1 after a sentence on stderr; argparse leaves with 2."""
    args = parse(argv)
    console.set_up()
    try:
        require_writable(args.out)  # before the base is read
        if args.format == "diffusers":
            require_new_folder(args.out)
        student = read_student(args.student)
        if args.format == "animatediff":
            for path in export_animatediff(student, args.out, args.student.stem):
                print(path)
        else:
            export_diffusers(student, load_stack(args.model, with_motion=False, tokenizer=args.tokenizer), args.out)
            print(args.out)
    except (FileFormatError, RunFolderError, StackError, StudentFileError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    entry.run(main)
