"""The regulariser that keeps P and Q near orthogonal, in the training objective only.

AdaLoRA (arXiv:2303.10512, equation 4) adds to the loss, over all adapted modules,

    squared    weight * sum  (||P^T P - I||_F^2 + ||Q Q^T - I||_F^2)      as the paper writes it
    norm       weight * mean (||P^T P - I||_F,   ||Q Q^T - I||_F)         as its code and PEFT do

with I of the rank's size. Neither depends on the data, so its gradient is added to the factors
once, when the optimizer steps, from the closed form. No reported loss holds it, whatever the number
of micro-batches, and clipping (which comes before) sees the gradient of the data alone, as with
AdamW's decoupled weight decay. Loss scaling is undone by then.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

OrthForm = Literal["norm", "squared"]

Regularised = tuple[nn.Parameter, int]
"""A factor, and the dimension its triplets lie along."""


def orthogonality(factor: Tensor, rank_dim: int, form: OrthForm) -> Tensor:
    """||F F^T - I||_F of a factor whose triplets are its rows (or columns), or its square."""
    norm: Tensor = torch.linalg.matrix_norm(_deviation(factor, rank_dim))
    return norm if form == "norm" else norm.square()


def orthogonality_gradient(factor: Tensor, rank_dim: int, form: OrthForm) -> Tensor:
    """d `orthogonality` / d factor, in the factor's shape; zero where the factor is orthonormal.

    With M = F F^T - I:  2 M F / ||M||_F, and 4 M F of the square.
    """
    weights = _gradient_weights(factor, rank_dim, form)
    return weights @ factor if rank_dim == 0 else factor @ weights


def _gradient_weights(factor: Tensor, rank_dim: int, form: OrthForm) -> Tensor:
    """What a factor is multiplied by in its gradient, (r, r)."""
    deviation = _deviation(factor, rank_dim)
    if form == "squared":
        return deviation.mul_(4.0)
    # Where the norm is zero so is the gradient, whatever zeros are divided by.
    return deviation.mul_(2.0 / deviation.norm().clamp_min(1e-30))


def _deviation(factor: Tensor, rank_dim: int) -> Tensor:
    """F F^T - I, (r, r)."""
    gram = factor @ factor.T if rank_dim == 0 else factor.T @ factor
    gram.diagonal().sub_(1)
    return gram


@torch.no_grad()
def add_gradients(
    factors: Iterable[Regularised], *, share: float, form: OrthForm, loss_scale: Any = None
) -> None:
    """Adds ``share`` times the gradient of `orthogonality` to every factor's ``.grad``.

    Factors without a gradient took no part in the step and are left alone. ``loss_scale`` is what
    the gradients are still multiplied by, where the optimizer itself divides by it.
    """
    for factor, rank_dim in factors:
        if factor.grad is None or factor.numel() == 0:
            continue
        values = factor.float()
        weights = _gradient_weights(values, rank_dim, form)
        if loss_scale is not None:
            weights *= loss_scale
        pair = (weights, values) if rank_dim == 0 else (values, weights)
        if factor.grad.dtype == values.dtype:
            factor.grad.addmm_(*pair, alpha=share)
        else:
            factor.grad.add_((pair[0] @ pair[1]).to(factor.grad.dtype), alpha=share)
