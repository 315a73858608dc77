"""Teachers and students as native MODELs: what is put into an SD1.5 MODEL, and what is known of it afterwards."""

import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter.lora import LoRAAdapter
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..diffusion.windows import ANIMATEDIFF_FRAMES
from ..files.architecture import require_architecture
from ..files.hashes import tensors_hash
from ..files.peers import is_peer, load_peer, lora_beside
from ..files.recognise import require
from ..files.stack import load_motion, stack_frames
from ..files.student import Student, read_student
from ..files.student_info import ANY_BASE, StudentFileError
from ..files.student_unet import positions
from . import folders, native
from .facts import Facts, ModelError, facts_of, require_finite
from .motion import KEY, MotionWeights, network_of, with_motion
from .progress import say
from .prompt_graph import STACK, model_loaders
from .sampling import look_after
from .windows import with_windows

# ---- teachers ----


def load_teacher(checkpoint: str, motion: str, model: ModelPatcher | None = None):
    """(MODEL, CLIP, VAE) of a teacher by the names that a person picked; a MODEL that is wired takes the place of the checkpoint's.

    One of the errors of the rooms below where something is missing or does not fit.
    """
    folder = folders.stack_folders().get(checkpoint)
    path = motion_choice(motion, folder)
    weights = motion_weights(path)  # before the checkpoint: the smaller file fails faster
    if folder:
        own, clip, vae = native.load_native_stack(folder)
        frames = stack_frames(folder)
    else:
        file = folders.model_file(folders.CHECKPOINTS, checkpoint)
        own, clip, vae = load_checkpoint(file, model=model is None)
        frames = ANIMATEDIFF_FRAMES
    base = (folder or file) if model is None else checkpoint_of(model)
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))[0][0].float().cpu()
    made = _with_teacher(own if model is None else model, weights, base, path, frames)
    made.set_attachments(KEY, replace(facts_of(made), empty_text=empty))
    return made, clip, vae


def add_motion(model: ModelPatcher, motion: str, strength: float = 1.0, clips: int = 1) -> ModelPatcher:
    """A MODEL with a motion module, by the name that a person picked: a teacher, or plain AnimateDiff."""
    require_finite(strength=strength)
    path = folders.module_file(motion)
    frames = stack_frames(folders.BUNDLED) if motion == folders.BUNDLED_NAME else ANIMATEDIFF_FRAMES
    return _with_teacher(model, motion_weights(path), checkpoint_of(model), path, frames, strength, clips)


def _with_teacher(model, weights: MotionWeights, base, path: Path, frames: int, strength: float = 1.0, clips: int = 1):
    native.require_sd15(model)
    earlier = facts_of(model)
    image_model = earlier.image_model if earlier else model
    groups = native.diffusers_config(image_model.model.model_config)["norm_num_groups"]  # which files do not say: the base's
    made = look_after(with_motion(image_model, replace(weights, groups=groups), strength, clips))
    made = with_windows(made, min(frames, weights.frames))
    made.set_attachments(KEY, Facts(image_model, base, path, min(frames, weights.frames)))
    return made


def motion_weights(path: Path) -> MotionWeights:
    """Motion modules of a file or a diffusers folder. StackError as `load_motion`."""
    adapter = load_motion(path)
    config = adapter.config
    return MotionWeights(adapter.state_dict(), config.motion_num_attention_heads, config.motion_norm_num_groups)


def motion_choice(name: str, folder: Path | None) -> Path:
    """Where the motion modules lie that a person picked, or those in the stack's own folder."""
    if name != folders.OWN_MOTION:
        return folders.model_file(folders.MOTION, name)
    if folder is None:
        raise folders.ModelFileError(
            "Expected a motion module for this checkpoint, found none chosen; choose one from models/animatediff_models."
        )
    return folder / "motion_adapter"


def load_checkpoint(path: Path, model: bool = True, clip: bool = True, vae: bool = True):
    """ComfyUI's (MODEL, CLIP, VAE) of an SD1.5 checkpoint, None for what is not asked for.

    FileFormatError, before it is loaded, for any other file; ModelError for one that ComfyUI does not know.
    """
    require(path, ("sd15",), "an SD1.5 checkpoint")
    embeddings = folder_paths.get_folder_paths("embeddings")
    try:
        return comfy.sd.load_checkpoint_guess_config(
            str(path), output_vae=vae, output_clip=clip, embedding_directory=embeddings, output_model=model
        )[:3]
    except RuntimeError as error:
        raise ModelError(f"Expected a checkpoint that ComfyUI can load at {path}, found: {error}; use another.") from error


def checkpoint_unet(path: Path) -> UNet2DConditionModel:
    """The image UNet of an SD1.5 checkpoint, float32 on the CPU. Errors as `load_checkpoint` and `native.image_unet_of`."""
    return native.image_unet_of(load_checkpoint(path, clip=False, vae=False)[0], str(path))


# ---- students ----


def load_student(name: str, model: ModelPatcher, clips: int = 1) -> ModelPatcher:
    """A student by the name that a person picked, on a clone of an SD1.5 MODEL: `with_student`."""
    return with_student(folders.student_file(name), model, clips)


def with_student(path: Path, model: ModelPatcher, clips: int = 1) -> ModelPatcher:
    """A student's file, or one of `load_peer`, on a clone of an SD1.5 MODEL.

    It takes the place of motion modules and of a student that the MODEL had; LoRAs that a person wired before it stay. On another base
    than its own it runs and the node says so. StudentFileError for a base of another architecture.
    """
    native.require_sd15(model)
    earlier = facts_of(model)
    image_model = earlier.image_model if earlier else model
    with torch.device("meta"):
        architecture = UNet2DConditionModel(**native.diffusers_config(image_model.model.model_config))
    if is_peer(path):
        read = load_peer(path, architecture, folders.lora_file(lora_beside(path)))
    else:
        read = read_student(path)
    info = read.info
    require_architecture(info, architecture, read.name)  # whether it is of the same weights is told below
    if info.holds == "all" and architecture.config.in_channels != info.unet_config.get("in_channels", 4):
        raise StudentFileError(
            f"Expected a base of 4 input channels for {read.name}, found another; use a plain SD1.5 checkpoint."
        )
    say(base_warning(read, image_model))
    made = with_motion(image_model, student_motion(read), clips=clips)
    made = with_weights(made, read.tensors, info.lora_alpha, first=info.holds == "all")
    made = with_windows(look_after(made), info.frames)
    base = earlier.base if earlier and earlier.base else checkpoint_of(image_model)
    facts = Facts(image_model, base, earlier.motion if earlier else None, info.frames, read)
    made.set_attachments(KEY, replace(facts, empty_text=earlier.empty_text if earlier else None))
    return made


def student_motion(student: Student) -> MotionWeights:
    """The motion modules of a student file, with its position encodings or diffusers' own."""
    config = student.info.unet_config
    tensors = {name: tensor for name, tensor in student.tensors.items() if "motion_modules" in name} | positions(student)
    heads = config.get("motion_num_attention_heads") or config.get("num_attention_heads") or 8
    return MotionWeights(tensors, heads, config.get("norm_num_groups", 32))


def with_weights(
    model: ModelPatcher,
    tensors: Mapping[str, Tensor],
    lora_alpha: float | None,
    strength: float = 1.0,
    first: bool = False,
    kind: str = "set",
) -> ModelPatcher:
    """A clone of a MODEL with a file's spatial weights, by diffusers' names, as patches; `first`: before those that it has.

    What is no LoRA takes the weight's place ("set") or is added to it ("diff").
    """
    made = model.clone()
    names = comfy.utils.unet_to_diffusers(made.model.model_config.unet_config)
    wanted = {key: patch for key, patch in weight_patches(tensors, lora_alpha, kind).items() if "motion_modules" not in key}
    before = made.patches if first else {}
    if first:
        made.patches = {}
    added = set(made.add_patches({f"diffusion_model.{names[key]}": wanted[key] for key in wanted if key in names}, strength))
    missing = [key for key in wanted if f"diffusion_model.{names.get(key)}" not in added]
    if missing:
        raise ModelError(f"Expected a MODEL with the layers that this file changes, found none at {min(missing)}.")
    for key, changes in before.items():
        made.patches[key] = made.patches.get(key, []) + changes
    return made


def weight_patches(tensors: Mapping[str, Tensor], lora_alpha: float | None, kind: str = "set") -> dict:
    """A file's weights, by the names of those they change, as ComfyUI's patches: LoRA where it is LoRA, else of this kind."""
    patches = {}
    for key, tensor in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            up = tensors[f"{module}.lora_B.weight"]
            patches[f"{module}.weight"] = LoRAAdapter(set(), (up, tensor, lora_alpha, None, None, None))
        elif not key.endswith((".lora_B.weight", ".pe")):
            patches[key] = (kind, (tensor,))
    return patches


# ---- bases ----

_hashes: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # of networks, which several MODELs share


def checkpoint_of(model: ModelPatcher) -> Path | None:
    """The file or the stack that a MODEL was loaded from; None where that is not known.

    Core remembers it from 0.33 on (not in 0.8); else the graph says it, where one loader alone is behind the node that is run.
    """
    facts = facts_of(model)
    if facts is not None and facts.base is not None:
        return facts.base
    _, *arguments = getattr(model, "cached_patcher_init", None) or (None, ())
    path = Path(arguments[0][0]) if arguments[0] and isinstance(arguments[0][0], (str, Path)) else None
    if path is None and len(loaders := model_loaders()) == 1:
        ((kind, name),) = loaders
        found = folders.stack_folders().get(name) if kind == STACK else folder_paths.get_full_path(folders.CHECKPOINTS, name)
        path = Path(found) if found else None
    return path if path is not None and path.exists() else None


def base_hash(model: ModelPatcher) -> str | None:
    """`tensors_hash` of a MODEL's UNet as its file holds it, whatever core has cast it to; None where that cannot be known."""
    network = network_of(model.model)
    if network not in _hashes:
        weights = native.base_weights(model)
        if all(weight.dtype in (torch.float16, torch.float32) for weight in weights.values()):
            _hashes[network] = tensors_hash(weights)
        else:
            path = checkpoint_of(model)
            _hashes[network] = tensors_hash(_file_weights(path, model)) if path is not None and path.is_file() else None
    return _hashes[network]


def _file_weights(path: Path, model: ModelPatcher) -> dict[str, Tensor]:
    """The UNet's weights in a checkpoint's file, by diffusers' names."""
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    held = comfy.utils.load_torch_file(str(path), safe_load=True)
    prefix = "model.diffusion_model."
    return {ours: held[prefix + theirs] for ours, theirs in names.items() if prefix + theirs in held}


def base_warning(student: Student, model: ModelPatcher) -> str:
    """What to tell of a student on this base; nothing where it is its own, any will do, or the student replaces its weights."""
    info = student.info
    if info.holds == "all" or info.base_hash == ANY_BASE:
        return ""
    found = base_hash(model)
    if found is None:
        return f"Whether this checkpoint is {info.base_name}, which the student was made from, cannot be told; it runs all the same."
    if found != info.base_hash:
        return (
            f"The student was made from {info.base_name}, this checkpoint is another: its clips take on this one's look, and may be less "
            "sharp or move less well."
        )
    return ""
