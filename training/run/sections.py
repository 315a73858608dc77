"""The sections of a distillation's settings: each setting with its bounds and its default, and what it is for."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from training.run.reading import require_path

ROOT = Path(__file__).resolve().parents[2]


def _absolute(path: Path) -> Path:
    return Path(os.path.normpath(ROOT / require_path(path).expanduser()))


def portable(path: Path) -> str:
    return (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()


# Absolute in use; a relative path starts at the repository's root, or at the working folder if the command line says it.
ProjectPath = Annotated[Path, AfterValidator(_absolute), PlainSerializer(portable)]
Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
Timestep = Annotated[int, Field(ge=0, le=999)]


def _count_or_auto(value):
    """One sentence of what is wrong, where pydantic would say what each kind of value wants."""
    if value != "auto" and not (str(value).isdecimal() and int(value) >= 1):
        raise ValueError("expected a whole number of at least 1, or auto")
    return value if value == "auto" else int(value)


def _flag_or_auto(value):
    if (word := str(value).lower()) not in ("true", "false", "auto"):
        raise ValueError("expected true, false or auto")
    return {"true": True, "false": False}.get(word, word)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class RunConfig(Section):
    folder: ProjectPath = Field(Path("runs/miniature"), description="where everything that the run makes is written")
    seed: int = Field(0, ge=0, description="seed of all randomness")
    updates: int = Field(150, ge=0, description="updates of the student by distribution matching, after the warm-up")
    batch: int = Field(8, ge=1, description="clips per update, over all processes and accumulation steps together")
    accumulate: Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)] = Field(
        1,
        description="steps that a process cuts its part of a batch into, to save memory; auto: as few as a GPU's memory allows",
    )
    sample_every: int = Field(50, ge=1, description="updates between sample clips")
    save_every: int = Field(25, ge=1, description="updates between checkpoints")
    keep: int = Field(3, ge=1, description="newest checkpoints to keep")
    threads: int | None = Field(None, ge=1, description="CPU threads; null is torch's choice")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto (CUDA if there, else the CPU), cpu, cuda, cuda:N"
    )
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto",
        description="of the networks, whose weights are trained in float32 all the same; auto is bf16 on CUDA and on CPUs with bf16 "
        "instructions, else float32",
    )
    optimiser: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = Field(
        "adamw", description="AdamW of all that learns; in 8 bits, and paged out to the CPU's memory too, by bitsandbytes"
    )
    attached: bool = Field(
        False, exclude=True, description="stop, with a checkpoint, when standard input ends: for programs that start this one"
    )

    @property
    def clips_at_once(self) -> int:
        """The clips of a step of one process alone; one where that is still open."""
        return 1 if self.accumulate == "auto" else self.batch // self.accumulate


class DataConfig(Section):
    folder: ProjectPath = Field(
        Path("datasets/miniature"),
        description="folder of captioned videos or of tar shards (or a pattern such as train-*.tar), or what prepare.py made of them",
    )
    frames: int = Field(8, ge=1, description="frames per clip")
    height: int = Field(64, ge=8, multiple_of=8, description="height of a clip, pixels")
    width: int = Field(64, ge=8, multiple_of=8, description="width of a clip, pixels")
    stride: int = Field(1, ge=1, description="video frames from one frame of a clip to the next")
    fps: float | None = Field(
        None, gt=0, le=1000, description="frames a second that videos are resampled to, by time; null takes them frame by frame"
    )
    strict: bool = Field(False, description="a clip, caption or picture that cannot be used is an error, not left out")
    render: int | None = Field(
        None, ge=1, description="clips of the miniature world to render into the folder if it is not there"
    )
    prompts: ProjectPath | None = Field(
        None,
        description="a text with a prompt a line, in place of data.folder: the teacher samples the clips that ADM takes for real",
    )
    clips: int = Field(256, ge=1, description="clips that the teacher samples of data.prompts")


class ModelConfig(Section):
    teacher: ProjectPath = Field(
        Path("miniature"), description="a folder in the diffusers layout, or an SD1.5 checkpoint in one file"
    )
    motion: ProjectPath | None = Field(
        None, description="motion modules, file or folder; null is those in the teacher's folder"
    )
    tokenizer: ProjectPath | None = Field(None, description="folder of CLIP's vocabulary, for a checkpoint in one file")
    score_unet: ProjectPath | None = Field(None, description="2D UNet of the real score (the style); null is the teacher's own")
    student: ProjectPath | None = Field(
        None, description="finished student file that training goes on from; null begins with the teacher's weights"
    )
    train: Literal["all", "motion", "motion+lora", "style"] = Field(
        "all", description="which weights of the student are trained; style: a LoRA on model.student, written as a style file"
    )
    lora_rank: int = Field(16, ge=1, description="rank of the adapters, where there are any")
    share_base: bool = Field(False, description="all networks are adapters on one frozen base, to save memory")
    gradient_checkpointing: Annotated[bool | Literal["auto"], BeforeValidator(_flag_or_auto)] = Field(
        False, description="compute activations twice, to save memory; auto: where a GPU's memory asks for it"
    )


class StudentConfig(Section):
    steps: tuple[Timestep, ...] = Field((999, 749, 499, 249), description="timesteps that it is sampled at, descending")
    phased: bool = Field(True, description="a step's clips are judged at the noise of the next step and above only")
    lr: float = Field(1e-5, gt=0, description="learning rate")
    warmup: int = Field(10, ge=0, description="updates until the full learning rate")
    ema: float = Field(0.97, ge=0, lt=1, description="decay of the averaged weights, per update")
    betas: Betas = Field((0.9, 0.999), description="of its AdamW")
    weight_decay: float = Field(0.01, ge=0, description="of its AdamW")
    clip: float = Field(1.0, gt=0, description="largest norm of a gradient, for the critics' too")


class WarmupConfig(Section):
    updates: int = Field(60, ge=0, description="updates before distribution matching: the critics learn, the student as below")
    guidance: float = Field(
        2.0, ge=1, description="CFG scale of the teacher that the student meanwhile learns to do without; 1 leaves it as it is"
    )
    substeps: int = Field(2, ge=1, description="steps of that teacher for one of the student's")
    lr: float = Field(1e-4, gt=0, description="learning rate of the student meanwhile")
    critics_from: int = Field(0, ge=0, description="updates of it before this one go without the critics")


class MethodConfig(Section):
    kind: Literal["avdm2", "consistency", "progressive", "motion-consistency"] = Field(
        "avdm2",
        description="how the student learns; the others are peers to compare with: AnimateLCM's consistency distillation, "
        "AnimateDiff-Lightning's progressive adversarial one, and MCM's motion consistency",
    )


class SdmConfig(Section):
    weight: float = Field(0.5, ge=0, description="of 2D score distribution matching in the student's loss; 0 leaves it out")
    frames: int = Field(4, ge=1, description="random frames per clip that it looks at")
    shared_noise: bool = Field(
        False, description="frames of a clip get the same timestep and noise, so that they are moved alike"
    )
    guidance: float = Field(1.0, ge=0, description="CFG scale of the real score")
    t_min: Timestep = Field(20, description="lowest timestep that it judges at")
    t_max: Timestep = Field(980, description="highest; it leaves out the steps whose clips it could judge above it only")
    lr: float = Field(5e-5, gt=0, description="learning rate of the fake score")
    betas: Betas = Field((0.9, 0.999), description="of its AdamW")
    updates_per_student: int = Field(2, ge=1, description="updates of the fake score per student update")


class AdmConfig(Section):
    weight: float = Field(0.1, ge=0, description="of adversarial distribution matching in the student's loss; 0 leaves it out")
    t_min: Timestep = Field(20, description="lowest timestep that it judges at")
    t_max: Timestep = Field(980, description="highest; it leaves out the steps whose clips it could judge above it only")
    lr: float = Field(1e-3, gt=0, description="learning rate of the discriminator's heads")
    betas: Betas = Field((0.0, 0.99), description="of its Adam")
    updates_per_student: int = Field(2, ge=1, description="updates of the heads per student update")
    pool: int = Field(
        0,
        ge=0,
        description="updates before the newest whose clips the heads go on learning from, as the encoder saw them; their features stay "
        "in memory; 0: the newest clips alone, with new noise in each of the heads' updates",
    )
    width: int = Field(64, ge=8, multiple_of=8, description="channels of the heads")
    motion: bool = Field(False, description="heads on the differences between frames beside those on the frames")
    relativistic: bool = Field(False, description="a clip of the student is judged against a real one of its caption")
    normalised: bool = Field(False, description="each clip's gradient is brought to a mean size of 1")
    r1_weight: float = Field(0.1, ge=0, description="of the approximate R1 penalty, on real clips; 0 leaves it out")
    r2_weight: float = Field(0.0, ge=0, description="of the same on the student's clips")
    r1_sigma: float = Field(0.1, gt=0, description="standard deviation of their perturbation")
    start_update: int = Field(
        0, ge=0, description="updates before this one go without ADM; without SDM the student waits for the heads"
    )


class StyleConfig(Section):
    name: str | None = Field(
        None, min_length=1, description="of the style, in its file; null is the name of its model or folder"
    )
    images: ProjectPath | None = Field(
        None, description="folder of images that show the style, in place of model.score_unet: an image model learns it first"
    )
    strength: float = Field(
        1.0,
        gt=0,
        description="how much of what was learnt the file's strength 1 stands for; below 1, motion and prompt suffer less",
    )
    image_steps: int = Field(600, ge=1, description="steps of that image model, a LoRA on the teacher's own")
    image_batch: int = Field(32, ge=1, description="images a step")
    image_lr: float = Field(1e-3, gt=0, description="learning rate of that LoRA")


class EvaluationConfig(Section):
    world: Literal["miniature"] | None = Field(
        None, description="world whose oracle measures the student; null: clips are shown, not measured"
    )
    clips: int = Field(128, ge=6, description="clips per row of the report, where there is an oracle")
    teacher_steps: int = Field(25, ge=1, le=1000, description="steps of the teacher it is compared with")
    teacher_guidance: float = Field(3.0, ge=0, description="CFG scale of that teacher")
    report: bool = Field(
        True, description="show the student beside its teacher at the end; false: its own clips alone, among the samples"
    )
