"""What tells weights apart: a hash of them that is the same in every file and dtype they are kept in."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def weights_hash(module: nn.Module) -> str:
    """`tensors_hash` of a module's parameters; position encodings and other buffers are derived and do not count."""
    return tensors_hash(dict(module.named_parameters()))


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: names, shapes and values rounded to float16, in the order of the names.

    The same for every container and for float32 and float16 saves of the same weights.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0]):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        for chunk in tensor.detach().reshape(-1).split(2**22):
            digest.update(chunk.to(torch.float16).cpu().numpy().astype("<f2", copy=False))
    return digest.hexdigest()
