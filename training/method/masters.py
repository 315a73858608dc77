"""Float32 masters of the weights that networks compute with in bf16 (Micikevicius et al., arXiv 1710.03740).

Optimisers, averages and checkpoints know the masters only. The copies are made anew once an update, not cast at each use, and what a
backward pass leaves in them is added to the masters' gradients in float32.
"""

import torch
from torch import nn

Weights = dict[str, nn.Parameter]
_PIECE = 2**26  # numbers that are added together: the memory that it takes is four bytes of each


def masters_of(copies: Weights) -> Weights:
    """The masters of weights that become bf16, in place, by the same names."""
    masters = {name: nn.Parameter(weight.data) for name, weight in copies.items()}
    for weight in copies.values():
        weight.data = weight.data.bfloat16()
    return masters


@torch.no_grad()
def refresh(masters: Weights, copies: Weights | None) -> None:
    """Gives the copies the masters' values. Without copies, where networks compute with the weights themselves, nothing is done."""
    if copies is not None:
        torch._foreach_copy_(list(copies.values()), list(masters.values()))


@torch.no_grad()
def gather(masters: Weights, copies: Weights | None) -> None:
    """Adds the copies' gradients to the masters', and takes them from the copies. Without copies nothing is done."""
    if copies is None:
        return
    first: list[tuple] = []
    later: list[tuple] = []
    for master, copy in zip(masters.values(), copies.values(), strict=True):
        if copy.grad is None:
            continue
        if master.grad is None:
            master.grad = torch.empty_like(master)
            first.append((master.grad, copy.grad))
        else:
            later.append((master.grad, copy.grad))
        copy.grad = None
    if first:
        torch._foreach_copy_(*map(list, zip(*first, strict=True)))
    while later:
        size = count = 0
        while count < len(later) and size < _PIECE:
            size, count = size + later[count][0].numel(), count + 1
        sums, parts = map(list, zip(*later[:count], strict=True))
        wide = [torch.empty_like(total) for total in sums]
        torch._foreach_copy_(wide, parts)  # adding across formats would be a launch for each weight
        torch._foreach_add_(sums, wide)
        del later[:count]
