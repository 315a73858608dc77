"""What travels along the wires of our nodes: teachers, students and styles, and how they are loaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import comfy.latent_formats
import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter.lora import LoRAAdapter
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..diffusion.unets import Predictor, image_predictor, video_predictor, video_unet
from ..diffusion.windows import ANIMATEDIFF_FRAMES, windowed
from ..files import student as student_file
from ..files import student_unet as student_network
from ..files.hashes import weights_hash
from ..files.peers import is_peer, load_peer, lora_beside
from ..files.recognise import require
from ..files.stack import load_image_unet, load_motion, load_stack
from ..files.student_info import StyleUse
from . import folders, memory, native
from .progress import interruptible
from .text import StackCLIP


@dataclass(frozen=True)
class Teacher:
    """AVDM2_TEACHER: a video UNet under ComfyUI's memory management, and what its students have to know of it."""

    name: str
    patcher: ModelPatcher
    architecture: UNet2DConditionModel  # on the meta device
    base_hash: str
    empty_text: Tensor  # (1, L, D), the empty prompt's embedding
    frames: int  # of a context window
    image_unet: Callable[[], UNet2DConditionModel]  # loads the base once more, float32 on the CPU
    path: Path | None  # of the checkpoint or the stack; None where a MODEL took its place
    motion_path: Path

    @property
    def latent_format(self):
        return self.patcher.model.latent_format

    @property
    def text_width(self) -> int:
        return self.architecture.config.cross_attention_dim

    @property
    def pixels(self) -> int:
        """What a clip's sides in pixels are a multiple of: the VAE's factor times the UNet's."""
        return 8 * 2 ** (len(self.architecture.config.block_out_channels) - 1)


@dataclass(frozen=True)
class Guide:
    """A style that guides a student's sampling: an image model, and the one that it is compared with."""

    name: str
    patcher: ModelPatcher
    source: ModelPatcher
    strength: float
    pulls: int
    text: Tensor | None = None  # (1, L, D) the prompt by its own text encoder; None: the student's


@dataclass(frozen=True)
class Change:
    """A style that is in a student's weights."""

    use: StyleUse
    tensors: Callable[[], dict[str, Tensor]] = field(repr=False)  # what is added to its weights at strength 1, by their names


@dataclass(frozen=True)
class Student:
    """AVDM2_STUDENT: a student file's weights, and those of styles, as patches on its teacher's UNet."""

    file: student_file.Student
    patcher: ModelPatcher
    teacher: Teacher
    guides: tuple[Guide, ...] = ()
    changes: tuple[Change, ...] = ()


def load_teacher(checkpoint: str, motion: str, model: ModelPatcher | None = None):
    """(Teacher, CLIP, VAE) by the names that a person picked; a native MODEL takes the place of the checkpoint's UNet.

    One of the errors of the rooms below where something is missing or does not fit.
    """
    folder = folders.stack_folders().get(checkpoint)
    motion_path = motion_choice(motion, folder)
    adapter = load_motion(motion_path)  # before the checkpoint: the smaller file fails faster
    if folder:
        stack = load_stack(folder, with_motion=False)
        clip, vae = StackCLIP(stack.tokenizer, stack.text_encoder), native.native_vae(stack.vae)
        latent_format, frames = native.stack_latent_format(stack), stack.frames
        image_unet = partial(load_image_unet, folder)
    else:
        path = folders.model_file(folders.CHECKPOINTS, checkpoint)
        _, clip, vae = load_checkpoint(path, model=False)
        latent_format, frames = comfy.latent_formats.SD15(), ANIMATEDIFF_FRAMES
        image_unet = partial(checkpoint_unet, path)
    if model is not None:
        image_unet = partial(native.image_unet_of, model)
    base = image_unet()
    with torch.device("meta"):
        architecture = UNet2DConditionModel.from_config(base.config)
    teacher = Teacher(
        name=checkpoint,
        patcher=memory.unet_patcher(video_unet(base, adapter), latent_format),
        architecture=architecture,
        base_hash=weights_hash(base),
        empty_text=clip.encode_from_tokens_scheduled(clip.tokenize(""))[0][0].float().cpu(),
        frames=min(frames, adapter.config.motion_max_seq_length),
        image_unet=image_unet,
        path=(folder or path) if model is None else None,
        motion_path=motion_path,
    )
    return teacher, clip, vae


def load_checkpoint(path: Path, model: bool = True, clip: bool = True, vae: bool = True):
    """ComfyUI's (MODEL, CLIP, VAE) of an SD1.5 checkpoint, None for what is not asked for.

    FileFormatError, before it is loaded, for any other file.
    """
    require(path, ("sd15",), "an SD1.5 checkpoint")
    embeddings = folder_paths.get_folder_paths("embeddings")
    return comfy.sd.load_checkpoint_guess_config(
        str(path), output_vae=vae, output_clip=clip, embedding_directory=embeddings, output_model=model
    )[:3]


def checkpoint_unet(path: Path) -> UNet2DConditionModel:
    """The image UNet of an SD1.5 checkpoint, float32 on the CPU. Errors as `load_checkpoint` and `native.image_unet_of`."""
    return native.image_unet_of(load_checkpoint(path, clip=False, vae=False)[0], str(path))


def motion_choice(name: str, folder: Path | None) -> Path:
    """Where the motion modules lie that a person picked, or those in the stack's own folder."""
    if name != folders.OWN_MOTION:
        return folders.model_file(folders.MOTION, name)
    if folder is None:
        raise folders.ModelFileError(
            "Expected a motion module for this checkpoint, found none chosen; choose one from models/animatediff_models."
        )
    return folder / "motion_adapter"


def load_student(name: str, teacher: Teacher) -> Student:
    """A student by the name that a person picked, as patches on a clone of its teacher's patcher; `load_peer`'s too.

    One whose motion modules lie elsewhere than its teacher's gets a network of its own. StudentFileError as `require_base`.
    """
    path = folders.student_file(name)
    if is_peer(path):
        read = load_peer(path, teacher.architecture, folders.lora_file(lora_beside(path)))
    else:
        read = student_file.read_student(path)
    student_network.require_base(read, teacher.architecture, teacher.base_hash)
    if not _same_motion(read, teacher):
        unet = student_network.student_unet(read, teacher.image_unet())
        return Student(read, memory.unet_patcher(unet, teacher.latent_format), teacher)
    patcher = teacher.patcher.clone()
    patches = weight_patches(read.tensors, read.info.lora_alpha)
    patcher.add_patches({f"diffusion_model.{key}": patch for key, patch in patches.items()})
    dtype = patcher.model.get_dtype()
    for key, positions in student_network.positions(read).items():  # buffers, which weight patches do not reach
        patcher.add_object_patch(f"diffusion_model.{key}", positions.to(dtype))
    return Student(read, patcher, teacher)


def _same_motion(student: student_file.Student, teacher: Teacher) -> bool:
    """True where both have the same motion modules: v2 has some in its mid block, v1 and v3 have none there."""
    names = {name for name, _ in teacher.patcher.model.diffusion_model.named_parameters() if "motion_modules." in name}
    return names == {name for name in student.tensors if "motion_modules." in name and not name.endswith(".pe")}


def weight_patches(tensors: Mapping[str, Tensor], lora_alpha: float | None) -> dict:
    """A file's weights, by the names of those they change, as ComfyUI's patches: LoRA where it is LoRA, else the weight itself."""
    patches = {}
    for key, tensor in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            up = tensors[f"{module}.lora_B.weight"]
            patches[f"{module}.weight"] = LoRAAdapter(set(), (up, tensor, lora_alpha, None, None, None))
        elif not key.endswith((".lora_B.weight", ".pe")):
            patches[key] = ("set", (tensor,))
    return patches


def loaded_predictors(
    patcher: ModelPatcher, frames: int, shape, guides=()
) -> tuple[Predictor, list[tuple[Predictor, Predictor]]]:
    """Has the networks loaded; the video predictor, in windows of `frames`, and (style, source) predictors of each guide."""
    patchers = list(dict.fromkeys([patcher, *(p for guide in guides for p in (guide.patcher, guide.source))]))
    unet, *images = memory.load(patchers, shape)
    by_patcher = dict(zip(patchers, [unet, *images], strict=True))
    video = windowed(interruptible(video_predictor(unet)), frames)
    pairs = [tuple(interruptible(image_predictor(by_patcher[p])) for p in (guide.patcher, guide.source)) for guide in guides]
    return video, pairs
