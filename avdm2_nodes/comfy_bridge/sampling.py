"""From a node's inputs to a LATENT: the samplers of `diffusion` on models, prompts and latents of ComfyUI."""

import torch

from ..diffusion.guidance import in_turn, pull_generators, pulled
from ..diffusion.samplers import begin, ddim_scheduler, draw_noise, sample_student, sample_teacher, student_timesteps
from .latents import evaluation_shape, frame_index, from_clip, to_clip
from .models import Student, Teacher, loaded_predictors
from .progress import sampling_callback
from .text import of_one_length, text_of


@torch.no_grad()
def student_latent(student: Student, positive: list, latent: dict, seed: int, steps: int, denoise: float) -> dict:
    """The student's clip in `steps` evaluations (0: its own number) as a LATENT; sentences as errors for what does not fit."""
    teacher, info = student.teacher, student.file.info
    clip = to_clip(latent, teacher.latent_format, teacher.pixels)
    text = text_of(positive, teacher.text_width)
    generator, index = torch.Generator().manual_seed(seed), frame_index(latent)
    noise = draw_noise(clip.shape, generator, index=index)
    all_timesteps = student_timesteps(info.timesteps, steps or len(info.timesteps), info.chain)
    timesteps, x_t = begin(all_timesteps, noise, clip, denoise)
    predict, pairs = loaded_predictors(student.patcher, info.frames, evaluation_shape(clip), student.guides)
    device = student.patcher.load_device
    text, empty = (t.to(device) for t in of_one_length(text, teacher.empty_text))
    pulls = []
    for i, (guide, pair) in enumerate(zip(student.guides, pairs, strict=True)):
        texts = None if guide.text is None else [t.to(device) for t in of_one_length(guide.text, teacher.empty_text)]
        (own,) = pull_generators([seed], i)
        pulls.append(pulled(*pair, text, empty, guide.strength, own, style_texts=texts, pulls=guide.pulls))
    sampled = sample_student(
        predict, x_t.to(device), text, timesteps, generator, sampling_callback(len(timesteps), teacher.latent_format),
        index, in_turn(pulls), info.chain,
    )  # fmt: skip
    return from_clip(sampled, latent, teacher.latent_format)


@torch.no_grad()
def teacher_latent(
    teacher: Teacher, positive: list, negative: list | None, latent: dict, seed: int, steps: int, cfg: float, denoise: float
) -> dict:
    """The teacher's clip in `steps` guided DDIM steps as a LATENT; without `negative` it is guided away from the empty prompt."""
    clip = to_clip(latent, teacher.latent_format, teacher.pixels)
    text = text_of(positive, teacher.text_width)
    empty = teacher.empty_text if negative is None else text_of(negative, teacher.text_width, "negative")
    noise = draw_noise(clip.shape, torch.Generator().manual_seed(seed), index=frame_index(latent))
    timesteps, x_t = begin(ddim_scheduler(steps).timesteps.tolist(), noise, clip, denoise)
    predict, _ = loaded_predictors(teacher.patcher, teacher.frames, evaluation_shape(clip, 1 if cfg == 1 else 2))
    device = teacher.patcher.load_device
    text, empty = (t.to(device) for t in of_one_length(text, empty))
    callback = sampling_callback(len(timesteps), teacher.latent_format)
    sampled = sample_teacher(predict, x_t.to(device), text, empty, steps, cfg, timesteps=timesteps, callback=callback)
    return from_clip(sampled, latent, teacher.latent_format)
