"""The report of a run: its student beside its teacher, shown and, in a world with an oracle, measured."""

from pathlib import Path

import torch

from avdm2_nodes.diffusion.style import add_change
from avdm2_nodes.diffusion.unets import Predictor, video_predictor
from avdm2_nodes.files.stack import Stack
from avdm2_nodes.files.student import Student, read_student
from avdm2_nodes.files.student_unet import student_unet
from avdm2_nodes.files.style import lora_change, read_style
from training.evaluation.feature_net import content_hash, load_features_of
from training.evaluation.pictures import animated, contact_sheet
from training.evaluation.report import write_report
from training.evaluation.rows import Bench, Gallery, steps_in_words, student_method, teacher_method
from training.run.config import DistillConfig

SHOWN = 5  # clips a row of the pictures


def new_gallery(config: DistillConfig, stack: Stack, captions: list[str], device: torch.device) -> Gallery:
    """The prompts that the run shows: those of the world that can measure it, else the first of its data."""
    precision = config.run.precision
    if config.evaluation.world is None:
        size = config.data.frames, config.data.height, config.data.width
        return Gallery(stack, captions[:SHOWN], *size, config.run.seed, precision, device)
    return Bench(stack, load_features_of(stack), config.evaluation.clips, precision=precision, device=device)


def write_run_report(
    config: DistillConfig, file: Path, stack: Stack, teacher: Predictor, gallery: Gallery, begun: Student | None = None
) -> None:
    """Shows the student, as its file has it (a style's on the student it was trained on), beside its teacher: clips.png and clips.webp.

    Where the gallery is a bench it is measured too: report.json and report.md.
    """
    folder, steps, guidance = file.parent, config.evaluation.teacher_steps, config.evaluation.teacher_guidance
    few, styled = len(config.student.steps), config.model.train == "style"
    student = student_unet(begun if styled else read_student(file), stack.image_unet).to(gallery.device)
    predict, sampled = video_predictor(student), {}
    if styled:  # sampled before the style is added in place: at full size a second UNet for it would be 5 GB
        unstyled = student_method(f"student {steps_in_words(few)}, unstyled", predict, config.student.steps)
        sampled[unstyled] = gallery.sample(unstyled)
        add_change(student, lora_change(read_style(file)), 1.0)
    methods = [
        teacher_method(f"teacher {steps_in_words(steps)}", teacher, stack, steps, guidance),
        teacher_method(f"teacher {steps_in_words(few)}, no guidance", teacher, stack, few, 1.0),
        student_method(f"teacher {steps_in_words(few)}, as a student", teacher, config.student.steps),
        *([teacher_method(f"teacher {steps_in_words(few // 2)}", teacher, stack, few // 2, guidance)] if few > 1 else []),
        student_method(f"student {steps_in_words(few)}", predict, config.student.steps),
    ]
    sampled |= {method: gallery.sample(method) for method in methods}
    shown = {method.name: list(clips[:SHOWN]) for method, (clips, _) in sampled.items()}
    contact_sheet(shown, gallery.prompts[:SHOWN], folder / "clips.png")
    animated(shown, folder / "clips.webp", captions=gallery.prompts[:SHOWN])
    if not isinstance(gallery, Bench):
        return
    reference = gallery.reference()
    rows = {"real clips (VAE)": gallery.figures(gallery.measure(gallery.floor_clips()), reference)}
    rows |= {method.name: gallery.figures(gallery.measure(clips), reference) for method, (clips, _) in sampled.items()}
    costs = {m.name: {"evaluations": m.evaluations, "seconds": seconds} for m, (_, seconds) in sampled.items()}
    about = {
        "clips a row": len(gallery.prompts),
        "prompts": "held-out combinations",
        "guidance of the teacher": guidance,
        "spacing": "trailing",
        "feature net": content_hash(stack.folder / "feature_net.safetensors")[:12],
        "updates": config.run.updates,
    }
    write_report(folder, "Student beside its teacher", rows, costs, about)
