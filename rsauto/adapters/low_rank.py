"""The low-rank product and its gradients, for one adapter or a stack of them, in either order.

Notation
    y = W x + s B A x      W is (d_out x d_in), A (r x d_in), B (d_out x r), s the factor gamma_r
    K, T                   adapters of a stack, and tokens of each

Tensors of a stack: x (K, T, d_in), y (K, T, d_out), A (K, r, d_in), B (K, d_out, r), s (K, 1, 1).
Nothing is kept but x and h = s A x: what PEFT's layers make beside them (the unscaled product, the
scaled one, their sum; x in the adapters' dtype, which they keep) is never needed again. Which order
takes fewer operations depends on sizes (RunLoRA, arXiv:2312.03415); these are the two of its orders
that are ever the cheapest by much:

    factors    s B (A x), and the gradients of A and B through h
    merged     (W + s B A) x, and the gradients of A and B through that of W
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rsauto.records import ProductOrder as ProductOrder


def num_operations(order: ProductOrder, tokens: int, d_in: int, d_out: int, rank: int) -> int:
    """Multiply-adds, counted as two, of one adapter's forward and backward beside those of W.

    factors    2 T r (d_in + d_out) forward; the same for h's gradient and that of x, and once
               more for the gradients of A and B
    merged     2 d_in d_out r for the sum, again in backward, and for each of A's and B's
               gradients; 2 T d_in d_out for that of W
    """
    if order == "factors":
        return 6 * tokens * rank * (d_in + d_out)
    return 8 * d_in * d_out * rank + 2 * tokens * d_in * d_out


def cheaper_order(shapes: Iterable[tuple[int, int]], tokens: int, rank: int) -> ProductOrder:
    """The order with fewer operations over layers of ``shapes``, (d_in, d_out) each."""
    pairs = list(shapes)
    cost = {
        order: sum(num_operations(order, tokens, d_in, d_out, rank) for d_in, d_out in pairs)
        for order in ("factors", "merged")
    }
    return "merged" if cost["merged"] < cost["factors"] else "factors"


def add_product(y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """Adds s B A x to ``y`` in place; returns h = s A x, (K, T, r)."""
    h = torch.bmm(x, a.mT).mul_(s)
    if y.dtype == h.dtype:
        y.baddbmm_(h, b.mT)
    else:
        y.add_(torch.bmm(h, b.mT))  # summed in the wider dtype, rounded once
    return h


def hidden_gradient(grad: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """Gradient of A x, (K, T, r), from that of y."""
    return torch.bmm(grad, b).mul_(s)
