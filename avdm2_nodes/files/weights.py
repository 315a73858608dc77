"""Whether tensors can be a network's weights: looked at before the network is made."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .sentences import FileFormatError


def require_weights(tensors: Mapping[str, Tensor], path: Path, what: str, remedy: str = "choose another file") -> None:
    """FileFormatError unless each tensor is floating numbers, at least one, all finite as float32."""
    for words, names in (("no floating numbers", _not_floating(tensors)), ("NaN or infinite numbers", not_finite(tensors))):
        if names:
            raise FileFormatError(
                f"Expected {what} in {path}, found {words} in {len(names)} of its tensors (such as {min(names)}); {remedy}."
            )


def _not_floating(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not tensor.is_floating_point() or not tensor.numel()]


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating tensors that hold a number which is none as float32."""
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not is_finite(tensor)]


def is_finite(tensor: Tensor) -> bool:
    """True where every number of a floating tensor is one as float32."""
    if not tensor.numel():
        return True
    ends = torch.stack(torch.aminmax(tensor.detach().to(torch.float32)))  # a NaN is both; neither isfinite nor this know float8
    return bool(torch.isfinite(ends).all())
