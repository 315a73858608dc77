"""Sampling a teacher or a student by core's own samplers: the video schedule, the exact steps, and what a person should be told."""

from collections.abc import Sequence

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import latent_preview
import torch
from comfy.k_diffusion.sampling import sample_lcm
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..diffusion.samplers import Chain, boundary_scaling, draw_noise, kept_timesteps, student_timesteps
from ..diffusion.schedules import VIDEO, trailing_timesteps
from .facts import ModelError, facts_of, require_finite, student_facts
from .motion import KEY
from .progress import say, with_moving_previews
from .prompt_graph import step_loras

NEAR = 3  # timesteps that a scheduler may miss the trained ones by, as sgm_uniform does by one
MUCH_CFG = 3.0  # beyond it a student, which has its guidance in it, burns colours


class VideoSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    """Core's discrete sampling on AnimateDiff's schedule, which is called sqrt_linear there and linear in diffusers."""

    def __init__(self):
        super().__init__()
        self._register_schedule(
            beta_schedule="sqrt_linear", timesteps=1000, linear_start=VIDEO.beta_start, linear_end=VIDEO.beta_end
        )


def look_after(model):
    """A clone of a MODEL with motion that is sampled on the video schedule, shows moving previews and warns of what does not fit."""
    model = model.clone()
    model.add_object_patch("model_sampling", VideoSampling())
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sample_looked_after)
    return model


def sample_looked_after(
    executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None, **kwargs
):
    """Core's wrapper around a whole sampling."""
    guider = executor.class_obj
    model = guider.model_patcher
    say("\n".join([*warnings_of(model, sigmas, len(noise), getattr(guider, "cfg", 1.0)), *other_sampler(model, sampler)]))
    callback = with_moving_previews(callback, model.model.latent_format, len(sigmas) - 1)
    sampler = with_own_noise(model, sampler)
    return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs)


def warnings_of(model, sigmas: Tensor, frames: int, cfg: float) -> list[str]:
    """Sentences on what will not come out as it could; each says what to do."""
    told, facts = [], facts_of(model)
    student = facts.student if facts else None
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, VideoSampling):
        told.append(
            "A node after the motion module has changed the noise schedule (ModelSamplingDiscrete?), which makes noise of clips; "
            "take it out, or put it before the motion module."
        )
    elif student is not None and (missed := missed_steps(student.info, sampling.timestep(sigmas[:-1].cpu()).tolist())):
        told.append(missed)
    if student is not None and cfg > MUCH_CFG:
        told.append(
            f"The student has its guidance in it: cfg {cfg:g} burns colours; 1 is what it was trained for, up to 2 works."
        )
    if student is not None and (loras := step_loras()):
        told.append(
            f"{' and '.join(loras)} also shortens sampling: on a student, which needs {len(student.info.timesteps)} steps as it is, "
            "it washes colours out; take it out."
        )
    if frames == 1:
        told.append("One frame only: for a clip set batch_size of the latent to the number of frames.")
    return told


def other_sampler(model, sampler) -> list[str]:
    """A sentence where a student is sampled by another of core's samplers than the one it was trained for."""
    facts = facts_of(model)
    if facts is None or facts.student is None or not isinstance(sampler, comfy.samplers.KSAMPLER):
        return []
    expected = "euler" if facts.student.info.chain == "euler" else "lcm"
    found = getattr(sampler.sampler_function, "__name__", "").removeprefix("sample_")
    if found in (expected, sample_chain.__name__.removeprefix("sample_")):
        return []
    return [f"The student was trained for the sampler {expected}, this is {found}; take {expected}, or AVDM2 Steps."]


def missed_steps(info, used: Sequence[int]) -> str:
    """What to tell of a scheduler that samples a student where it was not trained; nothing where it fits."""
    count = len(used)
    for total in range(count, max(50, count) + 1):  # with denoise below 1 a scheduler takes the last of more steps
        if info.chain == "lcm" and total > 100:
            break
        expected = student_timesteps(info.timesteps, total, info.chain)[total - count :]
        if all(abs(a - b) <= NEAR for a, b in zip(expected, used, strict=True)):
            return ""
    if all(min(abs(a - b) for b in info.timesteps) <= NEAR for a in used):
        return ""
    trained, found = (", ".join(map(str, map(int, steps))) for steps in (info.timesteps, used))
    return (
        f"The student was trained at the timesteps {trained}, this scheduler samples at {found}; take the scheduler simple with "
        f"{len(info.timesteps)} steps, or AVDM2 Steps."
    )


# ---- the steps of a student ----


def student_steps(model, steps: int = 0, denoise: float = 1.0) -> tuple[Tensor, comfy.samplers.KSAMPLER]:
    """(SIGMAS, SAMPLER) of a student in `steps` evaluations, 0 for its own number. ModelError, or ValueError for a denoise too low."""
    require_finite(denoise=denoise)
    info = student_facts(model).student.info
    timesteps = student_timesteps(info.timesteps, steps or len(info.timesteps), info.chain)
    return sigmas_of(model, kept_timesteps(timesteps, denoise)), chain_sampler(info.chain)


def sigmas_of(model, timesteps: Sequence[int]) -> Tensor:
    """Core's sigmas at these timesteps of the video schedule, and the 0 that they end in."""
    sigmas = model.get_model_object("model_sampling").sigmas
    return torch.cat([sigmas[list(timesteps)].float().cpu(), torch.zeros(1)])


def chain_sampler(chain: Chain, index: Sequence[int] | None = None) -> comfy.samplers.KSAMPLER:
    """The SAMPLER of a student's chain, as `sample_student` has it; `index` (F) says which frames of a longer clip these are."""
    if chain == "euler":
        return comfy.samplers.sampler_object("euler")
    return comfy.samplers.KSAMPLER(sample_chain, {"chain": chain, "index": index})


def with_own_noise(model, sampler):
    """Core's `lcm` on a student draws its noise as the student's own sampler does: KSampler gives the clip that all others give."""
    facts = facts_of(model)
    plain = (
        isinstance(sampler, comfy.samplers.KSAMPLER) and sampler.sampler_function is sample_lcm and not sampler.extra_options
    )
    if facts is None or facts.student is None or facts.student.info.chain == "euler" or not plain:
        return sampler
    own = chain_sampler(facts.student.info.chain)
    own.inpaint_options = sampler.inpaint_options
    return own


@torch.no_grad()
def sample_chain(model, x, sigmas, extra_args=None, callback=None, disable=None, chain: Chain = "renoise", index=None):
    """`sample_student`'s "renoise" and "lcm" in core's terms: x (F, C, h, w) is alpha's share larger, x_t / alpha_t.

    The noise between the steps goes on where the first one ended, drawn on the CPU: a seed gives the same clip on every device.
    """
    extra_args = extra_args or {}
    generator = torch.Generator().manual_seed(extra_args.get("seed") or 0)
    frames, channels, height, width = x.shape
    shape, ones = (1, channels, frames, height, width), x.new_ones([frames])
    draw_noise(shape, generator, index=index)  # what the clip began from
    for i in range(len(sigmas) - 1):
        x0 = model(x, sigmas[i] * ones, **extra_args)
        if chain == "lcm":
            t = int(model.inner_model.model_patcher.get_model_object("model_sampling").timestep(sigmas[i : i + 1]))
            c_skip, c_out = boundary_scaling(t)
            x0 = c_skip * x / (sigmas[i] ** 2 + 1) ** 0.5 + c_out * x0
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": x0})
        x = x0
        if sigmas[i + 1] > 0:
            x = x0 + sigmas[i + 1] * draw_noise(shape, generator, x.device, index)[0].transpose(0, 1).to(x.dtype)
    return x


def sample_latent(model, latent: dict, seed: int, cfg: float, sampler, sigmas: Tensor, positive, negative) -> dict:
    """A LATENT sampled as core's SamplerCustom does it, with its previews; all other keys are kept."""
    samples = frames_of_latent(model, latent)
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
    sampled = comfy.sample.sample_custom(
        model, noise, cfg, sampler, sigmas, positive, negative, samples,
        noise_mask=latent.get("noise_mask"), callback=callback, seed=seed,
    )  # fmt: skip
    return {**latent, "samples": sampled}


def student_latent(
    model, positive, latent: dict, seed: int, steps: int, denoise: float, cfg: float = 1.0, negative=None
) -> dict:
    """A student's clip in its own steps, the same that KSampler makes of it. Errors as `student_steps`."""
    require_finite(cfg=cfg)
    sigmas, sampler = student_steps(model, steps, denoise)
    if cfg != 1.0 and negative is None:
        raise ModelError(f"Expected a negative prompt with cfg {cfg:g}, found none; wire one, or set cfg to 1.")
    index = frame_index(latent)
    if sampler.sampler_function is sample_chain:
        sampler.extra_options["index"] = index
    return sample_latent(model, latent, seed, cfg, sampler, sigmas, positive, positive if negative is None else negative)


def teacher_latent(model, positive, negative, latent: dict, seed: int, steps: int, cfg: float, denoise: float) -> dict:
    """A teacher's clip in `steps` guided DDIM steps at trailing timesteps; without `negative` guided away from the empty prompt.

    ModelError where neither is there.
    """
    require_finite(cfg=cfg, denoise=denoise)
    facts = facts_of(model)
    if facts is None:
        raise ModelError(
            "Expected a teacher, found a MODEL without motion; put AVDM2 Motion Module or AVDM2 Teacher Loader before it."
        )
    if negative is None:
        if facts.empty_text is None:
            raise ModelError("Expected a negative prompt, found none; wire CLIP Text Encode with an empty text.")
        negative = [[facts.empty_text, {}]]
    sigmas = sigmas_of(model, kept_timesteps(trailing_timesteps(steps), denoise))
    return sample_latent(model, latent, seed, cfg, comfy.samplers.sampler_object("euler"), sigmas, positive, negative)


def frames_of_latent(model, latent: dict) -> Tensor:
    """The samples (F, C, h, w) of a LATENT, an empty one's in this MODEL's channels. ModelError for latents of another kind."""
    samples, channels = latent["samples"], model.model.latent_format.latent_channels
    found = comfy.sample.fix_empty_latent_channels(model, samples) if samples.ndim == 4 else samples
    if found.ndim != 4 or found.shape[1] != channels:
        raise ModelError(
            f"Expected a latent of (frames, {channels}, height, width), found {tuple(samples.shape)}; use Empty Latent Image, or "
            "VAE Encode with this model's VAE."
        )
    return found


def frame_index(latent: dict) -> list[int] | None:
    """Which frames of a longer clip these are, where core's batch nodes say so of each. ModelError for an index of another length."""
    index = latent.get("batch_index")
    if index is None:
        return None
    if len(index) != len(latent["samples"]):
        raise ModelError(
            f"Expected a batch_index for each of {len(latent['samples'])} frames in the latent, found {len(index)}; "
            "make the latent anew with Latent From Batch or Rebatch Latents."
        )
    return [int(i) for i in index]
