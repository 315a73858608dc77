"""The network of a student: what its file holds, on the base that it was made for."""

from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from torch import Tensor

from ..diffusion.layers import without_waste
from .architecture import meta_unet, require_architecture
from .hashes import weights_hash
from .lora import lora_pairs, lora_product
from .student import Student
from .student_info import ANY_BASE, StudentFileError


def require_base(student: Student, image_unet: UNet2DConditionModel, base_hash: str | None = None) -> None:
    """StudentFileError unless the student runs on this base.

    One that holds all its weights needs the architecture only (which may lie on the meta device), any other the very weights;
    `base_hash` is their `weights_hash`, computed where it is not given.
    """
    require_architecture(student.info, image_unet, student.name)
    info = student.info
    if info.holds == "all" or info.base_hash == ANY_BASE:
        return
    found = base_hash or weights_hash(image_unet)
    if found != info.base_hash:
        raise StudentFileError(
            f"Expected the base {info.base_name} (hash {info.base_hash[:12]}) beside {student.name}, which holds "
            f"{info.holds} only, found one of hash {found[:12]}; load the base that it was made for."
        )


def student_unet(student: Student, image_unet: UNet2DConditionModel | None = None) -> UNetMotionModel:
    """The student's video UNet: float32, on the CPU, frozen, in evaluation mode, LoRA layers merged into the weights.

    `image_unet` is the base, of any floating dtype; a student that holds all its weights does without, and is only checked
    to be of the base's architecture. StudentFileError for a base of another architecture or, where the student is
    made of its weights, of another hash, or none.
    """
    info = student.info
    if image_unet is not None:
        require_base(student, image_unet)
    elif info.holds != "all":
        raise StudentFileError(
            f"Expected the base {info.base_name} beside {student.name}, which holds {info.holds} only, found none; load it."
        )
    weights = student.tensors
    if info.holds != "all":
        weights = _merged(dict(image_unet.named_parameters()), student)
    unet = meta_unet(info, student.name)  # no weight is drawn at random first, nor held twice
    weights = {name: w.detach().to("cpu", torch.float32, copy=True) for name, w in {**weights, **positions(student)}.items()}
    unet.load_state_dict(weights, assign=True)
    return without_waste(unet).eval().requires_grad_(False)


def positions(student: Student) -> dict[str, Tensor]:
    """The position encodings of the student's motion modules, by name: the file's, or diffusers' own where it has none."""
    found = {}
    for name, module in meta_unet(student.info, student.name).named_modules():
        if isinstance(module, SinusoidalPositionalEmbedding):
            _, length, width = module.pe.shape
            key = f"{name}.pe"
            found[key] = student.tensors[key] if key in student.tensors else SinusoidalPositionalEmbedding(width, length).pe
    return found


def _merged(base: Mapping[str, Tensor], student: Student) -> dict[str, Tensor]:
    """The base's weights with the student's, LoRA layers merged: W + alpha / rank * B A, in float32."""
    info = student.info
    weights = dict(base) | {
        key: t for key, t in student.tensors.items() if not key.endswith((".lora_A.weight", ".lora_B.weight"))
    }
    for module, down, up in lora_pairs(student.tensors):
        weight = weights[f"{module}.weight"].detach().float().cpu()
        weights[f"{module}.weight"] = weight + lora_product(down, up, info.lora_alpha / info.lora_rank)
    return weights
