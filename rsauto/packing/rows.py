"""Whether a model's layers see a batch as its rows, one after the other, as packing needs them.

Most do. A layer of relative positions sees no rows at all, an expert the tokens that were sent to
it, and some architectures put tokens before rows; shapes alone do not always tell.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 0.05
"""Of the largest number that a layer sees: other rows beside it change how products are summed."""


class NotPackableError(ValueError):
    """A model does something that trials cannot share."""


def require_rows(base: nn.Module, names: Collection[str], inputs: Mapping[str, Tensor]) -> None:
    """Raises NotPackableError where a layer of ``names`` does not see the rows of a batch in order.

    ``inputs`` are those of the model for two rows: what a layer sees of the first must come first,
    and be what it sees of that row alone.
    """
    both = _seen(base, names, inputs)
    first = _seen(base, names, {name: tensor[:1] for name, tensor in inputs.items()})
    for name in names:
        if not both[name]:
            raise NotPackableError(
                f"{name}: this layer is adapted, but a forward pass may leave it out, so trials "
                "cannot share one. Train them one by one, or leave it out of target_modules."
            )
        if not _begins_with(both[name], first[name]):
            raise NotPackableError(
                f"{name}: what this layer is given is not one row of the batch after the other, so "
                "trials cannot share a batch. Train them one by one."
            )


def _begins_with(both: Sequence[Tensor], first: Sequence[Tensor]) -> bool:
    if len(both) != len(first):
        return False
    for pair, one in zip(both, first, strict=True):
        if not one.numel() or len(pair) != 2 * len(one) or pair.shape[1:] != one.shape[1:]:
            return False
        if (pair[: len(one)] - one).abs().max() > TOLERANCE * one.abs().max():
            return False
    return True


@torch.no_grad()
def _seen(
    base: nn.Module, names: Collection[str], inputs: Mapping[str, Tensor]
) -> dict[str, list[Tensor]]:
    """First arguments of the layers, of every call, in one forward pass."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def remember(name: str) -> Any:
        return lambda _layer, args: seen[name].append(args[0].detach().float())

    layers = [(name, base.get_submodule(name)) for name in names]
    hooks = [layer.register_forward_pre_hook(remember(name)) for name, layer in layers]
    was_training = base.training
    base.eval()
    try:
        base(**inputs)
    finally:
        base.train(was_training)
        for hook in hooks:
            hook.remove()
    return seen
