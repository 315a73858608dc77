"""Measures the ways to give a student another image model's style: `python training/evaluate_styles.py [--style FOLDER] [--clips N]`.

Transplant, guidance and fine-tuned style file at several strengths, beside the unswapped student, the style's own image model and the
teacher on it. The style must be one of a rendered world, whose oracle reads it, as the miniature's neon is.

Every row is kept as soon as it is measured; the same command goes on where it was stopped.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository in place of this folder: runs from anywhere
    from training.run import entry

    entry.begin()
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; nothing is looked up anywhere

import argparse
import hashlib
import json
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from avdm2_nodes.diffusion.guidance import PULL_GUIDANCE, PULL_TIMESTEP, pull_evaluations, pull_generators, pulled
from avdm2_nodes.diffusion.samplers import sample_student, sample_teacher
from avdm2_nodes.diffusion.schedules import IMAGE
from avdm2_nodes.diffusion.style import StyleError, add_change, style_change
from avdm2_nodes.diffusion.unets import Predictor, image_predictor, video_predictor, video_unet
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.stack import Stack, load_image_unet, load_stack
from avdm2_nodes.files.student import Student, read_student
from avdm2_nodes.files.student_info import StudentInfo
from avdm2_nodes.files.student_unet import student_unet
from avdm2_nodes.files.style import StyleFileError, lora_change, read_style, require_student
from training.evaluation.feature_net import content_hash, load_features_of
from training.evaluation.pictures import contact_sheet
from training.evaluation.report import tables_by_question, write_report
from training.evaluation.rows import Bench, Method, student_method, teacher_method
from training.evaluation.table import Table, insert, require_page
from training.method.errors import EXPECTED_ERRORS
from training.run import console
from training.run.config import MODEL, ROOT
from training.run.console import between, scale
from training.run.folder import require_writable, told_of_disk
from training.run.precision import pick_device
from training.world import scenes

logger = logging.getLogger("evaluate_styles")

STRENGTHS = (0.25, 0.5, 0.75, 1.0)  # the last is the default of every mode
UNSWAPPED, MODES = "student, unswapped", ("transplant", "guidance", "fine-tuned")
FRAMES, TEACHER = "style's image model, single frames, 25 steps", "teacher on the style, 25 steps"
OF_FRAMES = ("style", "frame accuracy", "size", "colour", "shape", "background")  # figures that single frames have
PICTURED = slice(1, 4)  # of the prompts whose clips are kept
FIGURES = (
    "style", "accuracy", "frame accuracy", "motion", "motion error", "dynamic degree", "jitter", "diversity", "Fréchet distance",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_help = "the student's teacher, a diffusers folder with a rendered world's feature net (default: the miniature)"
    parser.add_argument("--model", type=console.path, default=MODEL, metavar="FOLDER", help=model_help)
    student_help = "student file (default: the teacher's student.safetensors)"
    parser.add_argument("--student", type=console.path, metavar="FILE", help=student_help)
    style_help = "the image model whose style is wanted (default: the teacher's styles/neon)"
    parser.add_argument("--style", type=console.path, metavar="PATH", help=style_help)
    look_help = "what the oracle should read in its pictures (default: neon)"
    parser.add_argument("--look", choices=scenes.STYLES, default="neon", help=look_help)
    file_help = (
        "style file that was fine-tuned (default: STYLE.safetensors beside the style; without one its rows are left out)"
    )
    parser.add_argument("--style-file", type=console.path, metavar="FILE", help=file_help)
    parser.add_argument("--clips", type=between(6, 2**20), default=1024, help="clips a row (default: 1024)")
    parser.add_argument("--guidance", type=scale, default=3.0, help="CFG scale of the 25 steps (default: 3)")
    parser.add_argument("--out", type=console.path, default=ROOT / "runs" / "styles", help="where rows and reports are kept")
    page_help = "a page, such as docs/styles.md, whose tables are to be replaced"
    parser.add_argument("--page", type=console.path, metavar="FILE", help=page_help)
    args = parser.parse_args(argv)
    args.student = args.student or args.model / "student.safetensors"
    args.style = args.style or args.model / "styles" / "neon"
    beside = args.style.parent / f"{args.style.name}.safetensors"
    args.style_file = args.style_file or (beside if beside.is_file() else None)

    require_writable(args.out)  # before hours of measuring
    require_page(args.page, ["styles"])
    device = pick_device()
    stack, style = load_stack(args.model), load_image_unet(args.style).to(device)
    stack.image_unet.to(device)
    student = read_student(args.student)
    bench = Bench(stack, load_features_of(stack), args.clips, style=args.look, judge_style=True, device=device)
    about = {
        "clips a row": len(bench.prompts),
        "style": f"{args.style.name}, as an image model and as rendered clips, which the distances are to",
        "guidance": f"one pull after each step, at timestep {PULL_TIMESTEP}, CFG {PULL_GUIDANCE:g} (1: none)",
        "25 steps": f"DDIM, trailing spacing, CFG {args.guidance:g}",
        "student": f"{args.student.name}, sha256 {content_hash(args.student)[:12]}",
        "style file": f"{args.style_file.name}, sha256 {content_hash(args.style_file)[:12]}" if args.style_file else "none",
        "feature net": f"sha256 {content_hash(stack.folder / 'feature_net.safetensors')[:12]}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {device.type}",
        "torch": torch.__version__,
    }
    # Rows belong to what they were measured with; a style file and the guidance's settings concern their own rows only.
    of = [weights_hash(stack.image_unet), weights_hash(style), args.look, args.guidance, about["feature net"], bench.shape]
    key = content_hash(args.student)[:8] + hashlib.sha256(json.dumps(of).encode()).hexdigest()[:8]
    table = Table(bench, args.out / f"{key}-{len(bench.prompts)}")
    table.add("real clips (VAE)", bench.floor_clips)
    for method, settings in methods(stack, student, style, args.style_file, args.guidance):
        table.add_method(method, settings)
    table.rows[FRAMES] = {key: table.rows[FRAMES][key] for key in OF_FRAMES}
    write(table, about, args.page)
    logger.info("Figures: %s", table.folder / "report.md")


def methods(
    stack: Stack, student: Student, style: UNet2DConditionModel, style_file: Path | None, guidance: float
) -> Iterator[tuple[Method, str]]:
    """The rows but the real clips', each with the settings that its name does not say. StyleError, StyleFileError."""
    info, device = student.info, style.device
    plain = restyled(student, stack, {}, 0.0)
    yield student_method(UNSWAPPED, plain, info.timesteps, info.chain), ""
    changes = {"transplant": (style_change(stack.image_unet, style), "")}
    if style_file is not None:
        learnt = read_style(style_file)
        require_student(learnt, student)
        changes["fine-tuned"] = (lora_change(learnt), content_hash(style_file)[:8])
    pull = image_predictor(style), image_predictor(stack.image_unet), stack.encode_text([""]).float().to(device)
    for mode in MODES:
        for strength in STRENGTHS:
            name = f"{mode} {strength:g}"
            if mode == "guidance":
                yield guided_method(name, plain, *pull, info, strength), f"t{PULL_TIMESTEP} cfg{PULL_GUIDANCE:g}"
            elif mode in changes:
                change, settings = changes[mode]
                predict = restyled(student, stack, change, strength)
                yield student_method(name, predict, info.timesteps, info.chain), settings
    yield frames_method(FRAMES, pull[0], stack, 25, guidance), ""
    teacher = video_unet(style, stack.motion).to(device)
    yield teacher_method(TEACHER, video_predictor(teacher), stack, 25, guidance), ""


def restyled(student: Student, stack: Stack, change: Mapping[str, Tensor], strength: float) -> Predictor:
    """The student with a change of its weights."""
    unet = student_unet(student, stack.image_unet)
    add_change(unet, change, strength)
    return video_predictor(unet.to(stack.image_unet.device))


def guided_method(
    name: str, student: Predictor, style: Predictor, source: Predictor, empty_text: Tensor, info: StudentInfo, strength: float
) -> Method:
    """The student, pulled after each of its steps; a clip's pulls have the seed after its own, as in ComfyUI."""

    def sample(noise: Tensor, text: Tensor, generators: list[torch.Generator]) -> Tensor:
        own = pull_generators(g.initial_seed() for g in generators)
        refine = pulled(style, source, text, empty_text, strength, own)
        return sample_student(student, noise, text, info.timesteps, generators, refine=refine, chain=info.chain)

    return Method(name, sample, len(info.timesteps), pull_evaluations(len(info.timesteps)) if strength else 0)


def frames_method(name: str, image: Predictor, stack: Stack, steps: int, guidance: float) -> Method:
    """The image model itself by guided DDIM: one picture a prompt, shown as a clip that stands still."""

    def sample(noise: Tensor, text: Tensor, generators) -> Tensor:
        empty = stack.encode_text([""]).to(noise)
        pictures = sample_teacher(image, noise[:, :, 0], text, empty, steps, guidance, schedule=IMAGE)
        return pictures[:, :, None].expand_as(noise)

    return Method(name, sample, 0, steps * (1 if guidance == 1 else 2))


def write(table: Table, about: dict, page: Path | None) -> None:
    """report.json, report.md, styles.jpg, strength.jpg; and the tables into `page`, between its markers.

    RunFolderError where one cannot be written.
    """
    with told_of_disk(table.folder):
        _write(table, about)
    if page is not None:
        rows = {name: {key: row[key] for key in FIGURES if key in row} for name, row in table.rows.items()}
        insert(page, "styles", tables_by_question(rows, table.costs), about)


def _write(table: Table, about: dict) -> None:
    write_report(table.folder, "Ways to another style", table.rows, table.costs, about)
    modes = [mode for mode in MODES if f"{mode} {STRENGTHS[-1]:g}" in table.rows]
    captions = table.bench.prompts[PICTURED]
    best = {
        name: table.shown[name][PICTURED] for name in (UNSWAPPED, *(f"{mode} {STRENGTHS[-1]:g}" for mode in modes), TEACHER)
    }
    contact_sheet(best, captions, table.folder / "styles.jpg", shown=3)
    sweeps = {
        mode: sweep([table.shown[name][PICTURED] for name in (UNSWAPPED, *(f"{mode} {s:g}" for s in STRENGTHS))])
        for mode in modes
    }
    said = ", ".join(f"{s:g}" for s in (0, *STRENGTHS))
    titles = [f"{caption}, strength {said}" for caption in captions]
    contact_sheet(sweeps, titles, table.folder / "strength.jpg", shown=1 + len(STRENGTHS))


def sweep(rows: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """For each prompt the middle frames of the rows' clips, (rows, H, W, 3)."""
    return [np.stack([clip[len(clip) // 2] for clip in clips]) for clips in zip(*rows, strict=True)]


if __name__ == "__main__":
    console.set_up()
    entry.run(main, (*EXPECTED_ERRORS, FileNotFoundError, StyleError, StyleFileError), "Interrupted; the same command goes on.")
