"""What is measured: the shipped miniature, and networks of SD1.5's shape with random weights, which cost what real ones do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    LCMScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from torch import Tensor, nn

from avdm2_nodes.diffusion.layers import without_waste
from avdm2_nodes.diffusion.precision import decoding_dtype, sampling_dtype
from avdm2_nodes.diffusion.samplers import ddim_scheduler, draw_noise
from avdm2_nodes.diffusion.schedules import VIDEO, trailing_timesteps
from avdm2_nodes.diffusion.unets import video_predictor
from avdm2_nodes.files.stack import Stack, decode_clips, load_stack
from avdm2_nodes.files.student import read_student
from avdm2_nodes.files.student_unet import student_unet
from benchmarks import nodes
from benchmarks.cost import SD15_UNET, SD15_VAE, STUDENT_STEPS, TEACHER_STEPS
from training.cost.operations import SD15, TOKENS, V3
from training.evaluation.sampling import student_sampler, teacher_sampler

GUIDANCE = 3.0


@dataclass
class Subject:
    """Student and teacher, their decoders, and what a clip is sampled from; all on one device."""

    name: str
    student: UNetMotionModel
    teacher: UNetMotionModel
    vae: AutoencoderKL | AutoencoderTiny
    taesd: AutoencoderTiny | None  # None where the VAE is one already
    text: Tensor  # (1, L, D)
    empty_text: Tensor  # (1, L, D)
    frames: int
    side: int  # pixels
    student_steps: int = STUDENT_STEPS  # that a repetition runs
    teacher_steps: int = TEACHER_STEPS

    @property
    def device(self) -> torch.device:
        return self.text.device

    @property
    def clip(self) -> tuple[int, ...]:
        """The shape of one clip's latents, (1, C, F, h, w)."""
        latent = self.side // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return 1, self.vae.config.latent_channels, self.frames, latent, latent

    @property
    def whole(self) -> bool:
        """Whether a repetition runs all steps of a clip."""
        return (self.student_steps, self.teacher_steps) == (STUDENT_STEPS, TEACHER_STEPS)

    @torch.no_grad()
    def sampled(self, by: str) -> Tensor:
        """A clip's latents by the "student" or the "teacher", as training/sample.py and the nodes sample them."""
        if by == "student":
            sampler = student_sampler(self.student, trailing_timesteps(self.student_steps), self.frames)
        else:
            sampler = teacher_sampler(self.teacher, self.empty_text, self.teacher_steps, GUIDANCE, self.frames)
        generators = [torch.Generator().manual_seed(0)]
        return sampler(draw_noise(self.clip, generators, self.device), self.text, generators)

    def frames_of(self, latents: Tensor, fast: bool = False) -> Tensor:
        """Decoded, (1, F, H, W, 3) uint8 on the CPU."""
        return decode_clips(self.taesd if fast else self.vae, latents)

    def contenders(self) -> dict[str, Callable[[], Tensor]]:
        """What is timed, by name: our way and diffusers' own pipeline, in the same precision, without and with the decoder."""
        latents = torch.randn(self.clip, generator=torch.Generator().manual_seed(0)).to(self.device)
        runs = {
            "student": lambda: self.sampled("student"),
            "diffusers, student": self._pipeline("student"),
            "teacher": lambda: self.sampled("teacher"),
            "VAE": lambda: self.frames_of(latents),
        }
        if nodes.why_not() is None:
            own = without_waste(_as_in_diffusers(self.student))  # ComfyUI's layers take the place of its own
            runs["student's node"] = nodes.student_node(own, self.text, self.clip, self.student_steps)
        if self.taesd is not None:
            runs["TAESD"] = lambda: self.frames_of(latents, fast=True)
        if self.whole:
            runs["diffusers, teacher"] = self._pipeline("teacher")
            runs["student, frames"] = lambda: self.frames_of(self.sampled("student"))
            runs["diffusers, student, frames"] = self._pipeline("student", frames=True)
            runs["teacher, frames"] = lambda: self.frames_of(self.sampled("teacher"))
            if self.taesd is not None:
                runs["student, frames by TAESD"] = lambda: self.frames_of(self.sampled("student"), fast=True)
                runs["teacher, frames by TAESD"] = lambda: self.frames_of(self.sampled("teacher"), fast=True)
        return runs

    def _pipeline(self, by: str, frames: bool = False) -> Callable[[], Tensor]:
        """diffusers' AnimateDiffPipeline with the same weights and steps, from the same embeddings, to latents or to frames."""
        unet = self.student if by == "student" else self.teacher
        scheduler = _scheduler(by, self.student_steps if by == "student" else self.teacher_steps)
        pipeline = AnimateDiffPipeline(self.vae, None, None, _as_in_diffusers(unet), None, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        inputs = {
            "prompt_embeds": self.text.to(unet.dtype),
            "negative_prompt_embeds": self.empty_text.to(unet.dtype) if by == "teacher" else None,
            "guidance_scale": GUIDANCE if by == "teacher" else 1.0,
            "num_inference_steps": self.student_steps if by == "student" else self.teacher_steps,
            "num_frames": self.frames,
            "height": self.side,
            "width": self.side,
            "output_type": "pt" if frames else "latent",
        }
        return lambda: pipeline(**inputs, generator=torch.Generator().manual_seed(0)).frames


def _scheduler(by: str, steps: int) -> LCMScheduler | DDIMScheduler:
    """diffusers' scheduler of our chain: the student's re-noises each x0, as LCM's does but for its boundary scaling."""
    if by == "teacher":
        return ddim_scheduler(steps)
    betas = {"beta_schedule": VIDEO.beta_schedule, "beta_start": VIDEO.beta_start, "beta_end": VIDEO.beta_end}
    return LCMScheduler(**betas, original_inference_steps=100)


def _as_in_diffusers(unet: UNetMotionModel) -> UNetMotionModel:
    """diffusers' own video UNet on the same weights in memory, without what we change in ours."""
    with torch.device("meta"):
        plain = UNetMotionModel.from_config(unet.config)
    plain.load_state_dict(unet.state_dict(), assign=True)
    return plain.eval().requires_grad_(False)


def miniature(folder: Path, device: torch.device) -> Subject:
    """The shipped stack and student, as training/sample.py loads them."""
    stack = load_stack(folder)
    student = read_student(folder / "student.safetensors")
    unets = student_unet(student, stack.image_unet), stack.teacher
    for unet in unets:
        nn.Module.to(unet, device, sampling_dtype(device))
    nn.Module.to(stack.vae, device, decoding_dtype(device))
    text, empty = stack.encode_text(["a large blue circle moving left fast on a checked background", ""]).to(device).split(1)
    return Subject("miniature", *unets, stack.vae, None, text, empty, student.info.frames, student.info.height)


def sd15(
    device: torch.device,
    frames: int,
    side: int,
    steps: Sequence[int] = (STUDENT_STEPS, TEACHER_STEPS),
    unet: dict = SD15_UNET,
    vae: dict = SD15_VAE,
) -> Subject:
    """SD1.5 with AnimateDiff v3's shape and random weights; the student has the teacher's. `steps` of student and teacher.

    `unet` and `vae` are the settings of other shapes.
    """
    with torch.device("meta"):
        unet, vae, taesd = UNetMotionModel(**unet), AutoencoderKL(**vae), AutoencoderTiny()
    unet = without_waste(random_weights(unet, device, sampling_dtype(device)))
    vae, taesd = (random_weights(network, device, decoding_dtype(device)) for network in (without_waste(vae), taesd))
    width = unet.config.cross_attention_dim
    text, empty = torch.randn(2, TOKENS, width, generator=torch.Generator().manual_seed(0)).to(device).split(1)
    return Subject("SD1.5", unet, unet, vae, taesd, text, empty, frames, side, *steps)


def random_stack(unet: dict = SD15, motion: dict = V3, device: torch.device | str = "cpu") -> Stack:
    """The UNet and motion modules of SD1.5's shape, or of these settings, in float32, for training; nothing else."""
    with torch.device("meta"):
        parts = UNet2DConditionModel(**unet), MotionAdapter(**motion)
    unet, motion = (random_weights(part, torch.device(device), torch.float32) for part in parts)
    return Stack(Path("random"), None, None, None, unet, motion)


def random_weights(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network of the meta device on a real one: small random weights in `dtype`, norms that scale by 1, frozen."""
    network = nn.Module.to(network, dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.data.uniform_(-0.03, 0.03, generator=generator)
        else:
            parameter.data.fill_(float(name.endswith("weight")))
    for buffer in network.buffers():
        buffer.zero_()
    return network.eval().requires_grad_(False)


def evaluations(subject: Subject, frames: int, side: int, batch: int) -> Callable[[], Tensor]:
    """One evaluation by the student of `batch` clips of another size."""
    _, channels, _, latent, _ = subject.clip
    latent = side * latent // subject.side
    x_t = torch.randn(batch, channels, frames, latent, latent, generator=torch.Generator().manual_seed(0)).to(subject.device)
    t, text = torch.full((batch,), 999, device=subject.device), subject.text.expand(batch, -1, -1)
    predict = video_predictor(subject.student)

    @torch.no_grad()
    def run() -> Tensor:
        return predict(x_t, t, text)

    return run
