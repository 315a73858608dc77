"""Styles in a student's weights: what is added to them, and how much of it.

A transplant adds what another image model has otherwise than the student's base: base + strength (style - base) + what the student
learnt. A style file adds what training found for it. Both are changes by the names of the weights, so they add up.
"""

from collections.abc import Iterator, Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..errors import SentenceError


class StyleError(SentenceError, ValueError):
    """A style that does not fit; the message is one sentence."""


def require_same_family(style: UNet2DConditionModel, base: UNet2DConditionModel) -> None:
    """StyleError for an image model of other latents or texts than the base's."""
    ours, theirs = ({key: unet.config[key] for key in ("in_channels", "cross_attention_dim")} for unet in (base, style))
    if ours != theirs:
        raise StyleError(
            f"Expected a style of the student's family ({ours}), found another ({theirs}); choose a model made from the same base."
        )


class StyleChange(Mapping[str, Tensor]):
    """style - base of each weight, float32 on the CPU, by its name in the image UNet, which is also its name in a video UNet.

    Each is computed when it is asked for, and none is kept: beside networks of full size all of them would be 3 GB more.
    StyleError for a style of another architecture.
    """

    def __init__(self, base: UNet2DConditionModel, style: UNet2DConditionModel):
        self.base, self.style = (dict(unet.named_parameters()) for unet in (base, style))
        names = self.base.keys() | self.style.keys()
        different = [name for name in names if _shape(self.base, name) != _shape(self.style, name)]
        if different:
            raise StyleError(
                f"Expected a style of the architecture that the student's base has, found {len(different)} layers unlike its own (such as "
                f"{min(different)}); choose a model made from the same base."
            )

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        return self.style[name].float().cpu() - self.base[name].float().cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def style_change(base: UNet2DConditionModel, style: UNet2DConditionModel) -> dict[str, Tensor]:
    """A `StyleChange` as tensors, which need neither of the two UNets any more. StyleError as there."""
    return dict(StyleChange(base, style))


def _shape(weights: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None


@torch.no_grad()
def add_change(unet: nn.Module, change: Mapping[str, Tensor], strength: float) -> None:
    """Adds strength times the change to a UNet's weights in place; at 0 they stay as they are, to the bit.

    StyleError for a change of weights that the UNet does not have.
    """
    weights = dict(unet.named_parameters())
    wrong = [name for name, tensor in change.items() if _shape(weights, name) != tensor.shape]
    if wrong:
        raise StyleError(f"Expected a style for this UNet, found {len(wrong)} weights unlike its own (such as {min(wrong)}).")
    if strength != 0:
        for name, tensor in change.items():
            weights[name] += strength * tensor.to(weights[name])
