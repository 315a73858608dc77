"""Distils a video diffusion teacher into a few-step student: `python training/distill.py [--config FILE] [--section.key VALUE ...]`.

Without arguments it distils the miniature. A run that was interrupted goes on when the same command is given again.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository in place of this folder: runs from anywhere
    from training.run import entry

    entry.begin()
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; nothing is looked up anywhere

import contextlib
import logging

import torch

from avdm2_nodes.diffusion.unets import Predictor
from avdm2_nodes.files.stack import Stack, load_image_unet, load_stack
from avdm2_nodes.files.student import Student
from training.cost.memory_plan import fitted
from training.data.sources import open_data
from training.evaluation.pictures import contact_sheet
from training.evaluation.rows import Gallery, student_method
from training.evaluation.run_report import SHOWN, new_gallery, write_run_report
from training.method.errors import EXPECTED_ERRORS
from training.method.export import STUDENT, STYLE, export, export_style
from training.method.image_style import learn_style
from training.method.loop import Distillation, train
from training.method.setup import begin_from, new_heads, new_roles
from training.run import console
from training.run.checkpoint import Checkpoints
from training.run.command_line import load_config
from training.run.config import DistillConfig
from training.run.folder import RunFolder, told_of_disk
from training.run.packages import needs
from training.run.parent import Stop, never, watch
from training.run.precision import free_bytes, uses_bf16
from training.run.processes import Processes, require_equal_parts

logger = logging.getLogger("distill")


def main(argv: list[str] | None = None) -> None:
    config = load_config(argv)
    processes = Processes(config.run.device)
    require_equal_parts(config.run, processes)
    stop = watch() if config.run.attached else never
    with RunFolder(config.run.folder, hold=processes.main) as run:
        distil(config, run, config.evaluation.report, stop, processes)
    processes.end()


def distil(
    config: DistillConfig, run: RunFolder, report: bool = True, stop: Stop = never, processes: Processes | None = None
) -> Path:
    """The whole job in an open run folder; returns the student's or the style's file.

    `stop` ends its training early, as `train` does. All processes of a run call it together; without `processes` this one is alone.
    """
    processes = processes or Processes(config.run.device)
    path, *shown = _trained(config, run, stop, processes)
    if report and processes.main:
        with told_of_disk(run.path):
            write_run_report(config, path, *shown)
        logger.info("Beside it: its clips and its teacher's (clips.png, clips.webp) and the figures (report.md).")
    return path


def _trained(
    config: DistillConfig, run: RunFolder, stop: Stop, processes: Processes
) -> tuple[Path, Stack, Predictor, Gallery, Student | None]:
    """(the file that training left, and what the report needs beside it): everything else is let go of, which is most of memory."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    board_of = needs("torch.utils.tensorboard", "to write the curves of a run", "tensorboard").SummaryWriter
    device = processes.device

    begun = begin_from(config)
    stack = load_stack(config.model.teacher, config.model.motion, tokenizer=config.model.tokenizer)
    score_unet = load_image_unet(config.model.score_unet) if config.model.score_unet else None
    if config.style.images:
        with processes.first_alone():
            score_unet = learn_style(config, stack, run.path / "images", device, stop)
    unets = dict(stack.image_unet.config), dict(stack.motion.config)
    config = fitted(config, free_bytes(device), processes.count, *unets)
    half = uses_bf16(device, config.run.precision)
    roles = new_roles(config, stack, score_unet, begun, half, device)
    with processes.first_alone():
        data = open_data(config, run.path, stack, roles.teacher, score_unet, device)
    processes.require_same("clips", data.captions)
    if processes.main:
        run.hold_to(data.identity(), resumes=bool(Checkpoints(run.path / "checkpoints", config.run.keep).paths()))
    heads = new_heads(config, roles, data).to(device)
    distillation = Distillation(config, roles, heads, data.text([""]), device, processes)

    gallery = new_gallery(config, stack, data.captions, device)
    own = student_method("student", roles.student, config.student.steps)

    def show(step: int) -> None:
        shown, _ = gallery.sample(own, SHOWN)
        with told_of_disk(run.path):
            (run.path / "samples").mkdir(exist_ok=True)
            contact_sheet(
                {own.name: list(shown)}, gallery.prompts[: len(shown)], run.path / "samples" / f"update-{step:06d}.png"
            )

    with board_of(run.path / "tensorboard") if processes.main else contextlib.nullcontext() as board:

        def log(step: int, figures: dict) -> None:
            for name, value in figures.items():
                board.add_scalar(name, value, step)

        train(distillation, data, run, log, show, stop)

    styled = config.model.train == "style"
    path = run.path / (STYLE if styled else STUDENT)
    if processes.main:
        if styled:
            export_style(config, run, stack, roles, score_unet, begun)
        else:
            export(config, run, stack, roles, score_unet)
        logger.info("The %s is %s.", path.stem, path)
        if not config.evaluation.report:
            show(config.warmup.updates + config.run.updates)
    return path, stack, roles.teacher, gallery, begun


if __name__ == "__main__":
    console.set_up()
    entry.run(main, EXPECTED_ERRORS, "Interrupted; the same command goes on from the last checkpoint.")
