"""Distils a video diffusion teacher into a few-step student: `python training/distill.py [--config FILE] [--section.key VALUE ...]`.

Without arguments it distils the miniature. A run that was interrupted goes on when the same command is given again.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository in place of this folder: runs from anywhere
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; nothing is looked up anywhere

import contextlib
import logging
from datetime import UTC, datetime

import torch
from diffusers import UNet2DConditionModel
from torch.utils.tensorboard import SummaryWriter

from avdm2_nodes.diffusion.style import StyleError, add_change
from avdm2_nodes.diffusion.unets import Predictor, video_predictor
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.stack import Stack, StackError, load_image_unet, load_stack
from avdm2_nodes.files.student import Student, read_student, write_student
from avdm2_nodes.files.student_info import StudentFileError, StudentInfo
from avdm2_nodes.files.student_unet import student_unet
from avdm2_nodes.files.style import (
    StyleFileError,
    StyleInfo,
    lora_change,
    read_style,
    student_hash,
    write_style,
)
from training.data import DataError
from training.data.clips import needs_clips, write_clips
from training.data.latents import Encoder, LatentClips, open_clips
from training.data.teacher_clips import clips_for_prompts
from training.data.video import VideoError
from training.evaluation.feature_net import VideoFeatures, content_hash, load_features
from training.evaluation.pictures import animated, contact_sheet
from training.evaluation.report import write_report
from training.evaluation.rows import Bench, Gallery, steps_in_words, student_method, teacher_method
from training.method.discriminator import DiscriminatorHeads
from training.method.image_style import learn_style
from training.method.learner import DivergedError, OptimiserError
from training.method.loop import Distillation, train
from training.method.roles import Roles, build_roles
from training.run import console
from training.run.checkpoint import CheckpointError
from training.run.command_line import load_config
from training.run.config import ConfigError, DistillConfig, to_yaml
from training.run.folder import RunFolder, RunFolderError
from training.run.parent import Stop, StoppedError, never, watch
from training.run.precision import DeviceError, autocast, uses_bf16
from training.run.processes import LostProcessError, Processes, require_equal_parts
from training.world import scenes

logger = logging.getLogger("distill")

STUDENT, STYLE = "student.safetensors", "style.safetensors"
SHOWN = 5  # clips a row of the pictures

EXPECTED_ERRORS = (  # told in their own words
    CheckpointError, ConfigError, DataError, DeviceError, DivergedError, LostProcessError, OptimiserError, RunFolderError,
    StackError, StoppedError, StudentFileError, StyleError, StyleFileError, VideoError,
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    config = load_config(argv)
    processes = Processes(config.run.device)
    require_equal_parts(config.run, processes)
    stop = watch() if config.run.attached else never
    with RunFolder(config.run.folder, hold=processes.main) as run:
        distil(config, run, stop=stop, processes=processes)
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
        write_run_report(config, path, *shown)
        logger.info("Beside it: its clips and its teacher's (clips.png, clips.webp) and the figures (report.md).")
    return path


def _trained(
    config: DistillConfig, run: RunFolder, stop: Stop, processes: Processes
) -> tuple[Path, Stack, Predictor, Gallery, Student | None]:
    """(the file that training left, and what the report needs beside it): everything else is let go of, which is most of memory."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = processes.device

    begun = begin_from(config)
    stack = load_stack(config.model.teacher, config.model.motion, tokenizer=config.model.tokenizer)
    score_unet = load_image_unet(config.model.score_unet) if config.model.score_unet else None
    if config.style.images:
        with processes.first_alone():
            score_unet = learn_style(config, stack, run.path / "images", device, stop)
    half = uses_bf16(device, config.run.precision)
    roles = new_roles(config, stack, score_unet, begun, half, device)
    with processes.first_alone():
        data = open_data(config, run, stack, roles, score_unet, device)
    processes.require_same("clips", data.captions)
    heads = new_heads(config, roles, data).to(device)
    distillation = Distillation(config, roles, heads, data.text([""]), device, processes)

    gallery = new_gallery(config, stack, data.captions, device)
    own = student_method("student", roles.student, config.student.steps)

    def show(step: int) -> None:
        (run.path / "samples").mkdir(exist_ok=True)
        shown, _ = gallery.sample(own, SHOWN)
        contact_sheet({own.name: list(shown)}, gallery.prompts[: len(shown)], run.path / "samples" / f"update-{step:06d}.png")

    with SummaryWriter(run.path / "tensorboard") if processes.main else contextlib.nullcontext() as board:

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
    return path, stack, roles.teacher, gallery, begun


def begin_from(config: DistillConfig) -> Student | None:
    """The finished student that the run goes on from, if any. StudentFileError where a style's steps are not that student's."""
    if config.model.student is None:
        return None
    student = read_student(config.model.student)
    if config.model.train == "style" and student.info.timesteps != config.student.steps:
        raise StudentFileError(
            f"Expected student.steps as {student.name} has them, for a style leaves them as they are, found {list(config.student.steps)}; "
            f"set {','.join(map(str, student.info.timesteps))}."
        )
    return student


def open_data(
    config: DistillConfig, run: RunFolder, stack: Stack, roles: Roles, score_unet: UNet2DConditionModel | None, device
) -> LatentClips:
    """The clips that the settings name: `data.prompts`, for which the teacher makes them, or `data.folder`."""
    if config.data.prompts:
        encoder = Encoder(stack, device, config.run.precision)
        styled = config.model.train == "style"
        backbone = weights_hash(score_unet if styled else stack.image_unet)
        teacher_hash = f"{backbone} with {weights_hash(stack.motion)}"
        return clips_for_prompts(config, run.path / "clips", roles.teacher, teacher_hash, encoder)
    if config.data.render and needs_clips(config.data.folder):
        render_clips(config)
    return open_clips(config, stack, device)


def render_clips(config: DistillConfig) -> None:
    """Renders clips of the miniature world into the data folder, as video files like anybody's."""
    from tqdm import tqdm

    clips = scenes.render_split(config.data.render, style="plain", held_out=False, seed=config.run.seed)
    frames = ((clip.frames, clip.content.caption) for clip in clips)
    write_clips(config.data.folder, tqdm(frames, "rendering clips", config.data.render), scenes.FPS)


def new_roles(
    config: DistillConfig,
    stack: Stack,
    score_unet: UNet2DConditionModel | None,
    begun: Student | None = None,
    half: bool = False,
    device: torch.device | None = None,
) -> Roles:
    """The networks that a run's settings ask for, on `device`; with `half` for bf16 autocast only."""
    return build_roles(
        stack,
        train=config.model.train,
        score_unet=score_unet,
        share_base=config.model.share_base,
        lora_rank=config.model.lora_rank,
        gradient_checkpointing=config.model.gradient_checkpointing,
        seed=config.run.seed,
        student=begun,
        half=half,
        device=device,
    )


def new_heads(config: DistillConfig, roles: Roles, data: LatentClips) -> DiscriminatorHeads:
    """Discriminator heads for the features that this teacher's encoder gives, initialised from the run's seed."""
    clips, text = data.batch([0])
    with torch.no_grad(), autocast(clips.device, config.run.precision):
        features = roles.encoder(clips, torch.zeros(1, dtype=torch.long, device=clips.device), text)
    torch.manual_seed(config.run.seed)
    return DiscriminatorHeads([feature.shape[1] for feature in features])


def feature_net(stack: Stack) -> VideoFeatures:
    """The net of the evaluation, which lies beside the stack's parts. StackError where it does not."""
    try:
        return load_features(stack.folder / "feature_net.safetensors")
    except (OSError, ValueError) as error:
        raise StackError(str(error)) from error


def export(config: DistillConfig, run: RunFolder, stack: Stack, roles: Roles, score_unet) -> Path:
    """Writes the trained weights, as float16, and all that is known of them to `student.safetensors`."""
    path = run.path / STUDENT
    adapted = config.model.train == "motion+lora"
    info = StudentInfo(
        title=f"{stack.folder.name}, {len(config.student.steps)} steps",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        license=licence_of(stack),
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
        license=licence_of(stack),
    )
    write_style(path, {name: tensor.half() for name, tensor in roles.student_weights.items()}, info)
    return path


def licence_of(stack: Stack) -> str:
    """The licence that a stack's folder states in a LICENSE file's first line; SD1.5's where it states none."""
    path = stack.folder / "LICENSE"
    return path.read_text().splitlines()[0].strip() if path.exists() else "CreativeML OpenRAIL-M"


def new_gallery(config: DistillConfig, stack: Stack, captions: list[str], device: torch.device) -> Gallery:
    """The prompts that the run shows: those of the world that can measure it, else the first of its data."""
    precision = config.run.precision
    if config.evaluation.world is None:
        size = config.data.frames, config.data.height, config.data.width
        return Gallery(stack, captions[:SHOWN], *size, config.run.seed, precision, device)
    return Bench(stack, feature_net(stack), config.evaluation.clips, precision=precision, device=device)


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


if __name__ == "__main__":
    console.set_up()
    try:
        main()
    except EXPECTED_ERRORS as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Interrupted; the same command goes on from the last checkpoint.")
