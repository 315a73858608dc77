"""LoRA (arXiv 2106.09685), W + alpha / rank B A: layers among our tensors, and files with kohya-ss' names.

Ours are peft's names, `<module>.lora_A.weight` (rank, in, ...) and `<module>.lora_B.weight` (out, rank, ...); kohya's ComfyUI and
diffusers both read.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .containers import read_tensors, write_tensors
from .recognise import require
from .sentences import FileFormatError, one_line
from .weights import require_weights

Layer = tuple[Tensor, Tensor, float]  # down (rank, in, ...), up (out, rank, ...), alpha

_LARGEST_RANK = 1280  # SD1.5's widest layers have no more
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def lora_shapes(weights: Mapping[str, torch.Size], keys: Iterable[str], rank: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of both LoRA tensors of each layer with a weight matrix that a key speaks of."""
    shapes = {}
    for module in {key.rpartition(".lora_")[0] for key in keys}:
        weight = weights.get(f"{module}.weight", ())
        if len(weight) >= 2:
            shapes[module + _DOWN] = (rank, *weight[1:])
            shapes[module + _UP] = (weight[0], rank, *(1 for _ in weight[2:]))
    return shapes


def lora_product(down: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """scale B A, float32, in the shape of the weight that it is added to."""
    product = up.float().flatten(1) @ down.float().flatten(1)  # B of a convolution is 1 x 1, so its product is a matrix's
    return scale * product.reshape(len(up), *down.shape[1:])


def lora_products(tensors: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """`lora_product` of each layer under `<module>.weight`."""
    return {f"{module}.weight": lora_product(down, up, scale) for module, down, up in lora_pairs(tensors)}


def lora_pairs(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module, A, B) of each layer among a student's or a style's tensors: `<module>.lora_A.weight`, `<module>.lora_B.weight`."""
    for key, down in tensors.items():
        if key.endswith(_DOWN):
            module = key.removesuffix(_DOWN)
            yield module, down, tensors[module + _UP]


def lora_layers(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Layer]:
    """Those of `lora_pairs` by module, with their alpha."""
    return {module: (down, up, alpha) for module, down, up in lora_pairs(tensors)}


def lora_keys(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """LoRA layers by module of diffusers' UNet -> tensors under kohya's names; W + alpha / rank * up down in both."""
    named = {}
    for module, (down, up, alpha) in layers.items():
        name = "lora_unet_" + module.replace(".", "_")
        named |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(float(alpha))}
    return named


def export_lora_file(
    path: Path, layers: Mapping[str, Layer], metadata: Mapping[str, str], dtype: torch.dtype = torch.float16
) -> None:
    """Writes LoRA layers of an SD1.5 UNet, `lora_layers` of a student, as a LoRA file for ComfyUI and diffusers.

    FileFormatError for no layers, and where nothing can be written.
    """
    if not layers:
        raise FileFormatError(f"Expected LoRA layers for {path}, found none; export a student that was trained with LoRA.")
    write_tensors(
        path,
        {key: tensor if key.endswith(".alpha") else tensor.to(dtype) for key, tensor in lora_keys(layers).items()},
        metadata,
    )


def load_lora_file(path: Path, weights: Mapping[str, torch.Size]) -> dict[str, Layer]:
    """The LoRA layers in a file with kohya's names, by module of diffusers' UNet; the inverse of `export_lora_file`.

    `weights` are the shapes of the UNet's parameters by name. FileFormatError for a file that is something else or has layers of another
    network, as those of a text encoder or of another width are.
    """
    path = Path(path)
    require(path, ("lora",), "a LoRA for SD1.5")
    tensors = read_tensors(path)
    alphas = {key: tensors.pop(key) for key in [*tensors] if key.endswith(".alpha")}  # a number each, whole in some files
    require_weights(tensors, path, "a LoRA's weights", "choose another")
    modules = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    down, names = ".lora_down.weight", {"lora_unet_" + module.replace(".", "_"): module for module in modules}
    layers, unlike = {}, []
    for key in [key for key in tensors if key.endswith(down)]:
        name = key.removesuffix(down)
        up = tensors.get(f"{name}.lora_up.weight")
        if name not in names or up is None:
            continue
        first, last = tensors.pop(key), tensors.pop(f"{name}.lora_up.weight")
        rank = len(first) if first.ndim else 0
        alpha = alphas.get(f"{name}.alpha", torch.tensor(float(rank)))  # without one, the rank
        module = names[name]
        fitting = lora_shapes(weights, [module + _DOWN], rank)
        found = {module + _DOWN: tuple(first.shape), module + _UP: tuple(last.shape)}
        if found != fitting or rank > _LARGEST_RANK or alpha.numel() != 1 or not math.isfinite(alpha.float().item()):
            unlike.append(name)
        else:
            layers[module] = first, last, alpha.item()
    if unlike:
        raise FileFormatError(
            f"Expected LoRA of this UNet's layers in {path}, found {len(unlike)} of other widths, ranks or alphas (such as "
            f"{one_line(min(unlike))}); choose another."
        )
    if tensors or not layers:
        found = f"{len(tensors)} others (such as {one_line(min(tensors))})" if tensors else "none"
        raise FileFormatError(
            f"Expected LoRA layers of SD1.5's UNet with kohya's names in {path}, found {found}; choose another."
        )
    return layers
