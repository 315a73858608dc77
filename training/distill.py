"""Distils a video diffusion teacher into a few-step student: `python training/distill.py [--config FILE] [--section.key VALUE ...]`.

Without arguments it distils the miniature. A run that was interrupted goes on when the same command is given again.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository in place of this folder: runs from anywhere
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; nothing is looked up anywhere

import logging
import warnings
from datetime import UTC, datetime

import torch
from torch.utils.tensorboard import SummaryWriter

from avdm2_nodes.diffusion.stack import Stack, StackError, load_image_unet, load_stack
from avdm2_nodes.diffusion.student_file import StudentFileError, StudentInfo, unet_config, weights_hash, write_student
from avdm2_nodes.diffusion.unets import encoder_features
from training.config import ConfigError, DistillConfig, load_config, to_yaml
from training.data import ClipFolder, DataError, needs_clips, write_clips
from training.discriminator import DiscriminatorHeads
from training.evaluation.feature_net import content_hash, load_features
from training.evaluation.pictures import animated, contact_sheet
from training.evaluation.report import write_report
from training.evaluation.rows import Bench, student_method, teacher_method
from training.latents import LatentClips
from training.loop import Distillation, DivergedError, train
from training.miniature import world
from training.precision import pick_device
from training.roles import Roles, build_roles
from training.run_folder import RunFolder, RunFolderError
from training.video import VideoError

logger = logging.getLogger("distill")


def main(argv: list[str] | None = None) -> None:
    config = load_config(argv)
    with RunFolder(config.run.folder) as run:
        distil(config, run)


def distil(config: DistillConfig, run: RunFolder, report: bool = True) -> Path:
    """The whole job in an open run folder; returns the student's file."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = pick_device(config.run.device)

    stack = load_stack(config.model.teacher, config.model.motion)
    score_unet = load_image_unet(config.model.score_unet) if config.model.score_unet else None
    if config.data.render and needs_clips(config.data.folder):
        render_clips(config)
    clips = ClipFolder(config.data.folder, config.data.frames, config.data.height, config.data.width, config.data.stride)
    roles = build_roles(
        stack,
        train=config.model.train,
        score_unet=score_unet,
        share_base=config.model.share_base,
        lora_rank=config.model.lora_rank,
        gradient_checkpointing=config.model.gradient_checkpointing,
        seed=config.run.seed,
    ).to(device)
    for part in (stack.vae, stack.text_encoder):
        part.to(device)
    data = LatentClips(clips, stack, device, config.run.precision)
    heads = new_heads(config, stack, data).to(device)
    distillation = Distillation(config, roles, heads, data.text([""]), device)

    bench = Bench(stack, load_features(stack.folder / "feature_net.safetensors"), config.evaluation.clips)
    own = student_method("student", roles.student, config.student.steps)

    def show(step: int) -> None:
        (run.path / "samples").mkdir(exist_ok=True)
        shown, _ = bench.sample(own, 4)
        contact_sheet({own.name: list(shown)}, bench.prompts[:4], run.path / "samples" / f"update-{step:06d}.png")

    with SummaryWriter(run.path / "tensorboard") as board:

        def log(step: int, figures: dict) -> None:
            for name, value in figures.items():
                board.add_scalar(name, value, step)

        train(distillation, data, run, log, show)

    path = export(config, run, stack, roles, score_unet)
    logger.info("The student is %s.", path)
    if report:
        write_run_report(config, run, stack, roles, bench)
        logger.info("Clips side by side: %s; figures: %s.", run.path / "clips.png", run.path / "report.md")
    return path


def render_clips(config: DistillConfig) -> None:
    """Renders clips of the miniature world into the data folder, as video files like anybody's."""
    from tqdm import tqdm

    clips = world.render_split(config.data.render, style="plain", held_out=False, seed=config.run.seed)
    frames = ((clip.frames, clip.content.caption) for clip in clips)
    write_clips(config.data.folder, tqdm(frames, "rendering clips", config.data.render), world.FPS)


def new_heads(config: DistillConfig, stack: Stack, data: LatentClips) -> DiscriminatorHeads:
    """Discriminator heads for the features that this teacher's encoder gives, initialised from the run's seed."""
    clips, text = data.batch([0])
    with torch.no_grad():
        features = encoder_features(stack.teacher, clips.cpu(), torch.zeros(1, dtype=torch.long), text.cpu())
    torch.manual_seed(config.run.seed)
    return DiscriminatorHeads([feature.shape[1] for feature in features])


def export(config: DistillConfig, run: RunFolder, stack: Stack, roles: Roles, score_unet) -> Path:
    """Writes the trained weights, as float16, and all that is known of them to `student.safetensors`."""
    path = run.path / "student.safetensors"
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
        unet_config=unet_config(stack.teacher),
        base_name=stack.folder.name,
        base_hash=weights_hash(stack.image_unet),
        score_name=(config.model.score_unet or stack.folder).name,
        score_hash=weights_hash(score_unet or stack.image_unet),
        lora_rank=config.model.lora_rank if adapted else None,
        lora_alpha=config.model.lora_rank if adapted else None,
        updates=config.run.updates,
        training_config=to_yaml(config),
    )
    write_student(path, {name: weight.half() for name, weight in roles.student_weights.items()}, info)
    return path


def licence_of(stack: Stack) -> str:
    """The licence that a stack's folder states in a LICENSE file's first line; SD1.5's where it states none."""
    path = stack.folder / "LICENSE"
    return path.read_text().splitlines()[0].strip() if path.exists() else "CreativeML OpenRAIL-M"


def write_run_report(config: DistillConfig, run: RunFolder, stack: Stack, roles: Roles, bench: Bench) -> None:
    """Measures the student beside its teacher; writes report.json, report.md, clips.png and clips.webp."""
    steps, guidance = config.evaluation.teacher_steps, config.evaluation.teacher_guidance
    few = len(config.student.steps)
    methods = [
        teacher_method(f"teacher {steps} steps", roles.teacher, stack, steps, guidance),
        teacher_method(f"teacher {few} steps, no guidance", roles.teacher, stack, few, 1.0),
        *([teacher_method(f"teacher {few // 2} steps", roles.teacher, stack, few // 2, guidance)] if few > 1 else []),
        student_method(f"student {few} steps", roles.student, config.student.steps),
    ]
    reference = bench.reference()
    rows = {"real clips (VAE)": bench.figures(bench.measure(bench.floor_clips()), reference)}
    costs, shown = {}, {}
    for method in methods:
        clips, seconds = bench.sample(method)
        rows[method.name] = bench.figures(bench.measure(clips), reference)
        costs[method.name] = {"evaluations": method.evaluations, "seconds": seconds}
        shown[method.name] = list(clips[:5])
    about = {
        "clips a row": bench.clips,
        "prompts": "held-out combinations",
        "guidance of the teacher": guidance,
        "spacing": "trailing",
        "feature net": content_hash(stack.folder / "feature_net.safetensors")[:12],
        "updates": config.run.updates,
    }
    write_report(run.path, "Student beside its teacher", rows, costs, about)
    contact_sheet(shown, bench.prompts[:5], run.path / "clips.png")
    animated(shown, run.path / "clips.webp", captions=bench.prompts[:5])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        main()
    except (ConfigError, DataError, DivergedError, RunFolderError, StackError, StudentFileError, VideoError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Interrupted; the same command goes on from the last checkpoint.")
