"""The parts of `benchmarks/on_gpu.py`: each measures one thing after another and gives a row for it at once."""

import contextlib
import copy
import gc
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.pool import AsyncResult

import torch
from torch import Tensor

from avdm2_nodes.diffusion.compiled import compile_layers, recorded
from avdm2_nodes.diffusion.precision import decoding_dtype, sampling_dtype
from avdm2_nodes.diffusion.samplers import draw_noise, sample_student, sample_teacher
from avdm2_nodes.diffusion.schedules import trailing_timesteps
from avdm2_nodes.diffusion.unets import Predictor, video_predictor
from avdm2_nodes.files.stack import decode_clips
from benchmarks.cost import SD15_UNET, SD15_VAE, STUDENT_STEPS, decoder_operations, unet_operations
from benchmarks.kernels import Kernels, kernels_of
from benchmarks.subjects import GUIDANCE, Subject, random_stack, sd15
from training.cost.launches import Launches, casts
from training.cost.operations import SD15, TOKENS, V3
from training.run.config import ROOT
from training.run.precision import uses_bf16
from training.run.timing import interleaved, matmul_ceiling, peak_bytes, timed

CONFIGS = ROOT / "training" / "configs"
CARD_24 = int(23.5 * 2**30)  # bytes that are free on a card of 24 GB


@dataclass
class Row:
    """What was measured of one thing; None is not measured."""

    part: str
    what: str
    seconds: float | None = None  # of a clip
    operations: float | None = None  # likewise
    ceiling: float | None = None  # operations a second of plain products in the same format
    launches: float | None = None  # likewise
    kernel_seconds: float | None = None  # likewise
    peak: int | None = None  # bytes
    planned: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Size:
    """What is measured: SD1.5 with AnimateDiff's v3, or its likeness in small."""

    unet: dict
    motion: dict
    vae: dict
    frames: int
    side: int  # pixels
    teacher_steps: int
    repetitions: int
    clips: int  # of a batch in training; four are at each step of the student's chain, so that one update is the mean


FULL = Size(SD15, V3, SD15_VAE, frames=16, side=512, teacher_steps=25, repetitions=5, clips=4)
_WIDTHS = {"block_out_channels": (32,) * 4}
SMALL = Size(
    SD15 | _WIDTHS | {"layers_per_block": 1, "cross_attention_dim": 32, "sample_size": 8},
    V3 | _WIDTHS | {"motion_layers_per_block": 1},
    SD15_VAE | _WIDTHS | {"layers_per_block": 1},
    frames=4,
    side=64,
    teacher_steps=2,
    repetitions=1,
    clips=1,
)


@dataclass
class Session:
    """What the parts share: the device, the size, and what earlier ones found."""

    device: torch.device
    size: Size
    plans: dict[str, AsyncResult] = field(default_factory=dict)  # by configuration, made beside the first parts
    ceilings: dict[torch.dtype, float] = field(default_factory=dict)
    kernels: dict[str, Kernels] = field(default_factory=dict)

    def ceiling(self, dtype: torch.dtype) -> float:
        """Operations a second of plain products, measured once."""
        if dtype not in self.ceilings:
            self.ceilings[dtype] = matmul_ceiling(self.device, dtype)["wall"]
        return self.ceilings[dtype]

    @cached_property
    def subject(self) -> Subject:
        size = self.size
        unet = SD15_UNET | {key: value for key, value in size.unet.items() if key in SD15 | _WIDTHS | {"layers_per_block": 1}}
        return sd15(self.device, size.frames, size.side, (STUDENT_STEPS, size.teacher_steps), unet, size.vae)

    @cached_property
    def operations(self) -> dict[str, int]:
        """Of a clip by name."""
        subject = self.subject
        config, (_, channels, frames, height, width) = dict(subject.student.config), subject.clip
        evaluation, guided = (unet_operations(config, subject.clip, TOKENS, classifier_free=both) for both in (False, True))
        decoders = {name: decoder_operations(vae, (frames, channels, height, width)) for name, vae in self.decoders.items()}
        return {
            "evaluation": evaluation,
            "student": STUDENT_STEPS * evaluation,
            "teacher": self.size.teacher_steps * guided,
        } | decoders

    @property
    def decoders(self) -> dict:
        return {"VAE": self.subject.vae, "TAESD": self.subject.taesd}

    def free(self) -> None:
        """Lets go of what a part left on the device."""
        self.__dict__.pop("subject", None)
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        return peak_bytes(self.device) if self.device.type == "cuda" else None

    def noise(self) -> Tensor:
        return draw_noise(self.subject.clip, [torch.Generator().manual_seed(0)], self.device)

    @torch.no_grad()
    def student_clip(self, predict: Predictor) -> Tensor:
        generators = [torch.Generator().manual_seed(0)]
        return sample_student(predict, self.noise(), self.subject.text, trailing_timesteps(STUDENT_STEPS), generators)

    @torch.no_grad()
    def teacher_clip(self, predict: Predictor) -> Tensor:
        subject = self.subject
        return sample_teacher(predict, self.noise(), subject.text, subject.empty_text, subject.teacher_steps, GUIDANCE)

    @torch.no_grad()
    def evaluation(self, predict: Predictor) -> Tensor:
        return predict(self.noise(), torch.full((1,), 999, device=self.device), self.subject.text)


# ---- sampling ----


def ceilings(session: Session) -> Iterator[Row]:
    device = session.device
    others = (decoding_dtype(device), torch.bfloat16, torch.float32) if session.size is FULL else ()
    for dtype in dict.fromkeys((sampling_dtype(device), *others)):
        rate = session.ceiling(dtype)
        yield Row("ceilings", f"products of square matrices in {_name(dtype)}", operations=rate, seconds=1.0, ceiling=rate)


def sampling(session: Session) -> Iterator[Row]:
    """Eager: ours and diffusers' own pipeline, to latents and to frames; the teacher last, for its clips are long."""
    subject, contenders = session.subject, session.subject.contenders()
    contenders["student, frames"] = lambda: subject.frames_of(subject.sampled("student"))
    contenders["student, frames by TAESD"] = lambda: subject.frames_of(subject.sampled("student"), fast=True)
    quick = ("student", "diffusers, student", "VAE", "TAESD", "student, frames", "student, frames by TAESD")
    times = interleaved({name: contenders[name] for name in quick}, session.size.repetitions, session.device)
    for name in quick:
        yield _sampled(session, name, statistics.median(times[name].wall))
    yield _sampled(session, "teacher", _teacher_seconds(session, contenders["teacher"]))
    if subject.whole:
        yield _sampled(session, "diffusers, teacher", timed(contenders["diffusers, teacher"], session.device)[0])


def _sampled(session: Session, name: str, seconds: float, note: str = "") -> Row:
    decoder = next((d for d in ("TAESD", "VAE") if d in name), "VAE" if "frames" in name else None)
    by = next((by for by in ("student", "teacher") if by in name), None)
    count = sum(session.operations[part] for part in (by, decoder) if part)
    dtype = decoding_dtype(session.device) if by is None else sampling_dtype(session.device)
    return Row("sampling", name, seconds, count, session.ceiling(dtype), peak=session.peak(), note=note)


def compiled(session: Session) -> Iterator[Row]:
    """With and without layers compiled and evaluations recorded: from nothing, from the cache on disk, and then."""
    subject, device, cuda = session.subject, session.device, session.device.type == "cuda"
    plain, unet = video_predictor(subject.student), subject.student
    expected = session.evaluation(plain)

    def told(predict: Predictor) -> str:
        """How far an evaluation is from the plain one."""
        difference = (session.evaluation(predict) - expected).abs().max() / expected.std()
        return f"largest difference {difference:.1e} of the deviation"

    def row(name: str, predict: Predictor) -> Row:
        session.student_clip(predict)
        run = {name: lambda: session.student_clip(predict)}
        seconds = interleaved(run, session.size.repetitions, device)[name].median
        return _sampled(session, f"student, {name}", seconds, told(predict))

    if cuda:
        yield row("recorded", recorded(plain))
    with tempfile.TemporaryDirectory() as cache, _environment(TORCHINDUCTOR_CACHE_DIR=cache):
        predict = video_predictor(compile_layers(unet, _backend(session)))
        for name in ("the first clip, compiled from nothing", "the first clip, compiled from the cache on disk"):
            torch._dynamo.reset()
            seconds, _ = timed(lambda: session.student_clip(predict), device)
            yield Row("compiled", name, seconds, note="within one process")
        yield row("compiled", predict)
        if cuda:
            yield row("compiled and recorded", recorded(predict))


def teacher_compiled(session: Session) -> Iterator[Row]:
    """The teacher's batch of two, which is compiled anew."""
    predict = video_predictor(compile_layers(session.subject.teacher, _backend(session)))
    yield _sampled(session, "teacher, compiled", _teacher_seconds(session, lambda: session.teacher_clip(predict)))
    if session.device.type == "cuda":
        predict = recorded(predict)
        yield _sampled(
            session, "teacher, compiled and recorded", _teacher_seconds(session, lambda: session.teacher_clip(predict))
        )


def _teacher_seconds(session: Session, clip: Callable[[], Tensor]) -> float:
    """Of one clip, after one step of another, which compiles and warms up."""
    subject, steps = session.subject, session.subject.teacher_steps
    subject.teacher_steps = 1
    clip()
    subject.teacher_steps = steps
    return timed(clip, session.device)[0]


def _backend(session: Session) -> str:
    return "inductor" if session.size is FULL else "eager"  # on a CPU a compiler of C++ would take minutes


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def decoders(session: Session) -> Iterator[Row]:
    """The VAE in other parts, in channels_last, and compiled."""
    subject, size = session.subject, session.size
    latents = session.noise()

    def row(name: str, vae, batch: int | None = None) -> Row:
        run = {name: lambda: decode_clips(vae, latents, batch)}
        return _sampled(session, f"VAE, {name}", interleaved(run, size.repetitions, session.device)[name].median)

    yield row("as it is", subject.vae)
    for batch in (1, 2, 8, 16):
        if batch <= size.frames:
            yield row(f"{batch} frames at once", subject.vae, batch)
    session.kernels["the VAE"] = kernels_of(lambda: decode_clips(subject.vae, latents), session.device)
    last = copy.deepcopy(subject.vae).to(memory_format=torch.channels_last)
    yield row("channels_last", last)
    if size is FULL:
        yield row("compiled", compile_layers(subject.vae))
        yield row("channels_last, compiled", compile_layers(last))


def profiled(session: Session) -> Iterator[Row]:
    """One evaluation: its launches and its kernels."""
    predict = video_predictor(session.subject.student)
    with Launches() as launches:
        session.evaluation(predict)
    seconds, _ = timed(lambda: session.evaluation(predict), session.device)
    kernels = session.kernels["an evaluation"] = kernels_of(lambda: session.evaluation(predict), session.device)
    yield Row(
        "sampling", "an evaluation", seconds, session.operations["evaluation"], session.ceiling(sampling_dtype(session.device)),
        launches.counts.total(), kernels.seconds, session.peak(), note=f"{kernels.count} kernels",
    )  # fmt: skip


# ---- training ----


def planned(file: str, memory: int | None, size: Size) -> tuple[list[str], int]:
    """(the settings that `auto` becomes with so many bytes, the bytes that they take by the plan); for a process beside this one."""
    from training.cost.memory_plan import fitted, memory_plan

    unets = size.unet, size.motion
    config = fitted(_config(file, size), memory, 1, *unets)
    plan = memory_plan(config, *unets, config.run.clips_at_once)
    chosen = str(config.run.accumulate), str(config.model.gradient_checkpointing).lower()
    return ["--run.accumulate", chosen[0], "--model.gradient_checkpointing", chosen[1]], plan.total


def _config(file: str, size: Size, *options: str):
    from training.run.command_line import load_config

    shape = "--data.frames", str(size.frames), "--data.height", str(size.side), "--data.width", str(size.side)
    return load_config(["--config", str(CONFIGS / file), "--run.batch", str(size.clips), *shape, *options])


def training(name: str, file: str) -> Callable[[Session], Iterator[Row]]:
    """A part: the phases of a run of a configuration, as `auto` fits it into memory; the matching ones first."""

    def part(session: Session) -> Iterator[Row]:
        from benchmarks.training_modes import Noise
        from training.method.loop import Distillation
        from training.method.setup import new_heads, new_roles
        from training.run.meter import Operations

        session.free()
        device, size = session.device, session.size
        options, plan = session.plans[name].get()
        config = _config(file, size, *options)
        half = uses_bf16(device, config.run.precision)
        stack = random_stack(size.unet, size.motion, device)
        text, empty = torch.randn(2, TOKENS, stack.image_unet.config.cross_attention_dim).to(device).split(1)
        roles = new_roles(config, stack, None, half=half, device=device)
        del stack
        data = Noise((1, 4, size.frames, size.side // 8, size.side // 8), text)
        run = Distillation(config, roles, new_heads(config, roles, data).to(device), empty, device)
        warmup, dtype = config.warmup, torch.bfloat16 if half else torch.float32
        steps = {
            "SDM and ADM": warmup.updates + config.adm.start_update,
            "SDM": warmup.updates + 1,
            "warm-up with critics": warmup.critics_from,
            "warm-up": 0,
        }
        part = f"{config.run.clips_at_once} clips a part" + (", checkpointing" if config.model.gradient_checkpointing else "")
        for phase, step in steps.items():

            def update(step: int = step) -> None:
                run.update(step, data)

            with Launches() as launches, Operations() as operations:  # the first of a phase, whose time says little
                update()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds, _ = timed(update, device)
            peak = session.peak()
            note = f"{part}; {casts(launches.counts) / size.clips:.0f} casts a clip"
            row = Row(
                name, phase, seconds / size.clips, operations.count / size.clips, session.ceiling(dtype),
                launches.counts.total() / size.clips, peak=peak, planned=plan, note=note,
            )  # fmt: skip
            if device.type == "cuda":  # a CPU's profile takes minutes
                kernels = session.kernels[f"an update, {name}, {phase}"] = kernels_of(update, device)
                row.kernel_seconds = kernels.seconds / size.clips
                row.note += f", {kernels.count / size.clips:.0f} kernels"
            yield row

    return part


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
