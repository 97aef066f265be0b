"""Giving pruned triplets back: tensors, gradients and optimizer moments get smaller in place.

Parameters stay the same objects, so that optimizers and whoever else holds them need not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rsauto.adalora.importance import RANK_DIM, Factor
from rsauto.adalora.layer import SvdLayer, replace_data

_ROWS, _COLUMNS = "exp_avg_sq_row", "exp_avg_sq_col"
"""Adafactor's second moments: one number a row, and one a column."""


@torch.no_grad()
def compact(layer: SvdLayer, adapter_name: str, keep: Tensor, optimizer: Optimizer) -> None:
    """Keeps the triplets of ``keep``, (r,) boolean, and frees everything of the others.

    A module that keeps none stays, with tensors of no elements and nothing to compute.
    """
    for name, parameter in layer.factors(adapter_name).items():
        index = keep.to(parameter.device).nonzero().flatten()
        dim = RANK_DIM[name]
        state = optimizer.state.get(parameter, {})
        # Nothing may hold the old tensors longer than it takes to copy one of them.
        for key in state:
            state[key] = _kept(key, state[key], parameter, dim, index)
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:  # with nothing left it takes no part in a step
            gradient = gradient.index_select(dim, index) if len(index) else None
        replace_data(parameter, parameter.data.index_select(dim, index))
        parameter.grad = gradient
        del gradient
    importance = layer.triplets[adapter_name].importance
    index = keep.nonzero().flatten()
    if importance is not None:
        importance.keep(index)
    layer.activate(adapter_name, torch.ones_like(keep[keep]), len(index))


def require_compactable(
    factors: Iterator[tuple[Factor, nn.Parameter]], optimizer: Any, has_buckets: bool = True
) -> None:
    """Raises ValueError where tensors could not be made smaller, before any of them is.

    ``has_buckets`` says that processes that train together, if there are any, sum gradients as
    DistributedDataParallel does.
    """
    if optimizer is None:
        raise ValueError(
            "recovery: none frees the optimizer's moments as well. Call "
            "update_and_allocate(step, optimizer), or choose recovery: paper."
        )
    if has_buckets and torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            raise ValueError(
                "recovery: none cannot make tensors smaller that several processes train "
                "together: their gradients lie in buckets of fixed size. Choose recovery: paper."
            )
    for name, parameter in factors:
        for key, value in optimizer.state.get(parameter, {}).items():
            if not _is_known(key, value, parameter):
                raise ValueError(
                    f"recovery: none cannot make the state {key!r} of {type(optimizer).__name__} "
                    f"smaller, which is {tuple(value.shape)} for a factor {name} of "
                    f"{tuple(parameter.shape)}. Choose recovery: paper, or AdamW, SGD or Adafactor."
                )


def require_owner(factors: Iterator[tuple[Factor, nn.Parameter]], optimizer: Any) -> None:
    """Raises ValueError where a factor that is trained is not one of the optimizer's."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in factors:
        if parameter.requires_grad and id(parameter) not in owned:
            raise ValueError(
                f"recovery: none: a factor {name} is not trained by the {type(optimizer).__name__} "
                "that was given, so its moments could not be made smaller. Train the adapter with "
                "one optimizer, or choose recovery: paper."
            )


def _is_known(key: str, value: Any, parameter: nn.Parameter) -> bool:
    if not isinstance(value, Tensor) or value.ndim == 0 or key in (_ROWS, _COLUMNS):
        return True
    # The whole shape, or means over some of its dimensions.
    fits = [size in (1, whole) for size, whole in zip(value.shape, parameter.shape, strict=False)]
    return value.is_floating_point() and value.ndim == parameter.ndim and all(fits)


def _kept(key: str, value: Any, parameter: nn.Parameter, dim: int, index: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if key in (_ROWS, _COLUMNS):
        has_triplets = (key == _ROWS) == (dim == 0)
        return value.index_select(0, index) if has_triplets else value
    if value.shape[dim] != parameter.shape[dim]:
        return value  # a mean over the triplets
    return value.index_select(dim, index)
