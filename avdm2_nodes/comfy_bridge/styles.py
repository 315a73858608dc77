"""Styles on a student: an image model that guides its sampling, or one in its weights, as patches on a clone of its MODEL."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from einops import rearrange
from torch import Tensor

from ..diffusion.guidance import pull_generators, pulled
from ..diffusion.samplers import draw_noise
from ..diffusion.style import StyleChange, require_same_family
from ..diffusion.unets import Predictor
from ..files.hashes import weights_hash
from ..files.stack import load_image_unet
from ..files.student_info import StyleUse
from ..files.style import lora_change, read_style, require_student
from . import folders, native
from .facts import Change, ModelError, require_finite, student_facts
from .models import checkpoint_unet, load_checkpoint, with_weights
from .motion import KEY, attention_options, computed_in

GUIDANCE, TRANSPLANT = "guidance", "transplant"


def with_style(
    model: ModelPatcher,
    style: str,
    strength: float,
    style_model: ModelPatcher | None = None,
    mode: str = GUIDANCE,
    prompt: list | None = None,
    pulls: int = 1,
) -> ModelPatcher:
    """The student with one more style; at strength 0 the student itself, once the style is known to fit.

    A style file is put into its weights; an image model, by name or as a MODEL, guides its sampling or is transplanted. Errors of the
    rooms below, sentences all.
    """
    require_finite(strength=strength)
    student_facts(model)  # an error for what is no student, before anything is read
    if style_model is None and (path := folders.style_files().get(style)):
        return with_style_file(model, path, strength)
    if mode == TRANSPLANT:
        return _transplanted(model, style, strength, style_model)
    return _guided(model, style, strength, style_model, prompt, pulls)


def with_style_file(model: ModelPatcher, path: Path, strength: float) -> ModelPatcher:
    """The student with a style that was learnt for it. Errors as `read_style` and `require_student`."""
    style = read_style(path)
    require_student(style, student_facts(model).student)
    if strength == 0:
        return model
    use = StyleUse(name=style.info.name, hash=style.info.hash, mode="fine-tuned", strength=strength)
    return _changed(model, Change(use, partial(lora_change, style)), style.tensors, style.info.lora_alpha, strength)


def _changed(model, change: Change, tensors, lora_alpha: float | None, strength: float) -> ModelPatcher:
    made = with_weights(model, tensors, lora_alpha, strength, kind="diff")
    facts = student_facts(model)
    made.set_attachments(KEY, replace(facts, changes=(*facts.changes, change)))
    return made


def _transplanted(model, style: str, strength: float, style_model: ModelPatcher | None) -> ModelPatcher:
    """The student on `style` in place of its base, by what the two have otherwise."""
    if style_model is not None:
        name, unet = "the MODEL", native.image_unet_of(style_model)
    elif folder := folders.style_folders().get(style):
        name, unet = style, load_image_unet(folder)
    else:
        name, unet = style, checkpoint_unet(folders.model_file(folders.CHECKPOINTS, style))
    base = native.image_unet_of(student_facts(model).image_model)
    require_same_family(unet, base)
    if strength == 0:
        return model
    use = StyleUse(name=name, hash=weights_hash(unet), mode="transplant", strength=strength)
    # As student files have theirs, and half the memory.
    half = {key: change.half() for key, change in StyleChange(base, unet).items() if change.any()}
    return _changed(model, Change(use, lambda: half), half, None, strength)


# ---- guidance ----

SOURCE = f"{KEY}_source"  # the student's own image model, against which styles pull
FRAMES_AT_ONCE = 32  # that an image model sees together


@dataclass(frozen=True)
class Guide:
    """A style that pulls a student's frames after each step; its network and `SOURCE` are additional models of the MODEL."""

    number: int  # of the guides that the MODEL has: each has its own noise
    strength: float
    pulls: int
    text: Tensor | None  # (1, L, D) the prompt by the style's own text encoder; None: the student's

    @property
    def key(self) -> str:
        return f"{KEY}_guide_{self.number}"

    def __call__(self, executor, x, timestep, model_options=None, seed=None):
        """Core's wrapper around what a step predicts, x0 (F, C, h, w), after guidance by the prompts."""
        options = model_options or {}
        x0, guider = executor(x, timestep, options, seed), executor.class_obj
        model = guider.model_patcher
        model.model.current_patcher.apply_hooks(hooks=None)  # those of the prompts, which the source would see too
        style, source = (
            native_predictor(patcher.model)
            for key in (self.key, SOURCE)
            for patcher in model.get_additional_models_with_key(key)
        )
        text = guider.conds["positive"][0]["cross_attn"].to(x0.device)
        own = None if self.text is None else [self.text.to(x0.device)] * 2
        (generator,) = pull_generators([seed or 0], self.number)
        for _ in range(self.pulls * step_of(timestep, options)):  # the noise of the steps before
            draw_noise((1, *x0.shape[1:]), generator)
        refine = pulled(style, source, text, text, self.strength, generator, style_texts=own, pulls=self.pulls)
        clip = refine(rearrange(x0, "f c h w -> 1 c f h w").float(), 0)
        return rearrange(clip, "1 c f h w -> f c h w").to(x0.dtype)


def step_of(timestep: Tensor, model_options: dict) -> int:
    """Which step of a sampling this evaluation belongs to, from 0."""
    sigmas = model_options["transformer_options"]["sample_sigmas"]
    return int((sigmas[:-1] - timestep.flatten()[0].to(sigmas)).abs().argmin())


def native_predictor(base) -> Predictor:
    """eps(x_t (N, C, h, w), t (N,), text (N, L, D)) by a native image model."""

    def eps(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        management.throw_exception_if_processing_interrupted()
        dtype, options = computed_in(base), attention_options({}, x_t.device)
        parts = zip(*(tensor.split(FRAMES_AT_ONCE) for tensor in (x_t.to(dtype), t.float(), text.to(dtype))), strict=True)
        return torch.cat(
            [base.diffusion_model(x, at, context=words, transformer_options=dict(options)).float() for x, at, words in parts]
        )

    return eps


def _guided(
    model, style: str, strength: float, style_model: ModelPatcher | None, prompt: list | None, pulls: int
) -> ModelPatcher:
    """The student pulled towards what `style` sees in a frame otherwise than the student's own image model."""
    facts = student_facts(model)
    if style_model is not None:
        name, shell = "the MODEL", native.unet_shell(style_model)
        guiding = native.apart(style_model)
    elif folder := folders.style_folders().get(style):
        name, shell = style, load_image_unet(folder)
        guiding = native.image_model(shell, model.model.latent_format)
    else:
        name, path = style, folders.model_file(folders.CHECKPOINTS, style)
        guiding = load_checkpoint(path, clip=False, vae=False)[0]
        shell = native.unet_shell(guiding, str(path))
    require_same_family(shell, native.unet_shell(facts.image_model))
    if strength == 0:
        return model
    if prompt is not None and len(prompt) != 1:
        raise ModelError(f"Expected one prompt for the style, found {len(prompt)}; wire one CLIP Text Encode.")
    if prompt is not None and prompt[0][0].shape[-1] != shell.config.cross_attention_dim:
        raise ModelError(
            f"Expected text embeddings of width {shell.config.cross_attention_dim} for the style, found {prompt[0][0].shape[-1]}; "
            "encode the prompt by the style model's own CLIP."
        )
    made = model.clone()
    guide = Guide(len(facts.guides), strength, pulls, None if prompt is None else prompt[0][0].float())
    made.set_additional_models(guide.key, [guiding])
    if not made.get_additional_models_with_key(SOURCE):  # one for all guides
        made.set_additional_models(SOURCE, [native.apart(facts.image_model)])
    made.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, guide.key, guide)
    made.set_attachments(KEY, replace(facts, guides=(*facts.guides, name)))
    return made
