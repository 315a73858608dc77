"""The UNet that a student's settings describe, and what must agree with it: the file's tensors, and a base."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from torch import Tensor

from .bounds import immodest
from .lora import lora_shapes
from .sentences import one_line, reason
from .student_info import StudentFileError, StudentInfo

_CONFIG_KEYS = frozenset(inspect.signature(UNetMotionModel.__init__).parameters) - {"self"}
_MOTION = "motion_modules"


def unet_config(unet: UNetMotionModel) -> dict:
    """What builds the UNet again, `UNetMotionModel(**config)`, as plain JSON values."""
    return json.loads(json.dumps({key: value for key, value in unet.config.items() if key in _CONFIG_KEYS}))


def meta_unet(info: StudentInfo, name: str | Path) -> UNetMotionModel:
    """The student's UNet without memory, for its names and shapes. StudentFileError for settings that build none."""
    if found := immodest(info.unet_config):
        raise StudentFileError(
            f"Expected the settings of a UNetMotionModel in {name}, found {found}, which no such network has."
        )
    try:
        with torch.device("meta"):
            return UNetMotionModel(**info.unet_config)
    except Exception as error:  # diffusers raises a dozen kinds for one cause
        raise StudentFileError(
            f"Expected the settings of a UNetMotionModel in {name}, found some that build none ({reason(error)}); "
            "it is of another architecture."
        ) from error


def require_tensors(info: StudentInfo, tensors: Mapping[str, Tensor], name: str | Path) -> None:
    """StudentFileError unless the tensors are those that `info` announces, in names and shapes."""
    unet = meta_unet(info, name)
    parameters = {key: p.shape for key, p in unet.named_parameters()}
    buffers = {key: b.shape for key, b in unet.named_buffers()}
    expected = {key: shape for key, shape in parameters.items() if info.holds == "all" or _MOTION in key}
    if info.holds == "motion+lora":
        spatial = {key: shape for key, shape in parameters.items() if _MOTION not in key}
        lora = lora_shapes(spatial, tensors, info.lora_rank)
        if not lora:
            raise StudentFileError(f"Expected LoRA tensors of spatial layers in {name}, found none; it holds motion alone.")
        expected |= lora
    shapes = expected | buffers
    problems = {
        "missing": [key for key in expected if key not in tensors],
        "unexpected": [key for key in tensors if key not in shapes],
        "of another shape or kind": [
            key for key, t in tensors.items() if key in shapes and (t.shape != shapes[key] or not t.is_floating_point())
        ],
    }
    found = [f"{len(keys)} {kind} (such as {one_line(min(keys))})" for kind, keys in problems.items() if keys]
    if found:
        widths = info.unet_config.get("block_out_channels")
        raise StudentFileError(
            f"Expected in {name} the tensors ({info.holds}) of a video UNet of widths {widths}, found {', '.join(found)}; "
            "it is damaged or of another architecture."
        )


def require_architecture(info: StudentInfo, image_unet: UNet2DConditionModel, name: str | Path) -> None:
    """StudentFileError unless the student's spatial layers are built as the base's."""
    with torch.device("meta"):
        base = unet_config(UNetMotionModel.from_unet2d(image_unet, load_weights=False))
    for key, mine in info.unet_config.items():
        # sample_size is a hint for pipelines; the motion modules are the student's own.
        of_the_base = key in base and key != "sample_size" and "motion" not in key and "temporal" not in key
        if of_the_base and _plain(mine) != _plain(base[key]):
            raise StudentFileError(
                f"Expected for {name} a base with {key} {mine}, found {base[key]}; "
                f"it is of another architecture, load the base {info.base_name}."
            )
    parameters = meta_unet(info, name).named_parameters()
    mine = {key: p.shape for key, p in parameters if _MOTION not in key}
    theirs = {key: p.shape for key, p in image_unet.named_parameters()}
    different = [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]
    if different:
        raise StudentFileError(
            f"Expected for {name} a base of its architecture, found {len(different)} layers unlike its own (such as "
            f"{min(different)}); load the base {info.base_name}."
        )


def _plain(value):
    """A setting that every block shares may be written once or once a block."""
    value = json.loads(json.dumps(value))
    return value[0] if isinstance(value, list) and value and all(v == value[0] for v in value) else value
