"""PEFT's LoRA layer with base weight and adapter as one operation of autograd.

Notation
    y = W x + bias + s B A x      W is (d_out x d_in), A (r x d_in), B (d_out x r), s is gamma_r

PEFT's layer makes B h, s B h and the sum beside W x, and its backward pass as many; where adapters
are wider than the base, it keeps a copy of x in their dtype. Here products are added to what is
there, and only h = s A x is kept, and x as it came. Both orders of `low_rank` are there:

    factors    forward    h = s A x,  y = W x + B h
               backward   dB = dy^T h,  dh = s dy B,  dA = dh^T x,  dx = dy W + dh A
    merged     forward    y = (W + s B A) x
               backward   dW = dy^T x,  dB = s dW A^T,  dA = s B^T dW,  dx = dy (W + s B A)
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from rsauto.records import ProductOrder

MERGEABLE = (torch.float32, torch.float64)
"""Dtypes whose W + s B A is close enough to W x + s B A x: half precision loses small updates."""


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    s: float,
    order: ProductOrder = "factors",
) -> Tensor:
    """W x + bias + s B A x, (..., d_out), in the dtype of x (..., d_in), ``weight`` and ``bias``.

    Gradients are those of x, ``a`` (r, d_in) and ``b`` (d_out, r), once. Where factors have another
    dtype, x is cast to it, and the sum is in the wider one and rounded once. "merged" then, and in
    half precision, computes as "factors" does.
    """
    same = x.dtype == a.dtype == b.dtype
    function = _Merged if order == "merged" and same and x.dtype in MERGEABLE else _Factors
    y: Tensor = function.apply(x, weight, bias, a, b, s)  # type: ignore[no-untyped-call]
    return y


class _Factors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float
    ) -> Tensor:
        rows = _rows(x)
        y = F.linear(rows, weight, bias)
        h = (rows.to(a.dtype) @ a.T).mul_(s)
        ctx.save_for_backward(x, weight, a, b, h)
        ctx.s = s
        return _like(_plus_product(y, h, b.T), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, h = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        grad = _rows(grad_y)
        cast = grad.to(h.dtype)
        grad_b = cast.T @ h if needs_b else None
        grad_h = (cast @ b).mul_(ctx.s)
        del cast
        grad_a = grad_h.T @ _rows(x).to(h.dtype) if needs_a else None
        grad_x = _like(_plus_product(grad @ weight, grad_h, a), x) if needs_x else None
        return grad_x, None, None, grad_a, grad_b, None


class _Merged(torch.autograd.Function):
    """All of one dtype. The sum of the weights is made again in backward, not kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.s = s
        return _like(F.linear(_rows(x), torch.addmm(weight, b, a, alpha=s), bias), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        grad = _rows(grad_y)
        grad_x = None
        if needs_x:
            grad_x = _like(grad @ torch.addmm(weight, b, a, alpha=ctx.s), x)
        grad_weight = grad.T @ _rows(x)
        grad_b = (grad_weight @ a.T).mul_(ctx.s) if needs_b else None
        grad_a = (b.T @ grad_weight).mul_(ctx.s) if needs_a else None
        return grad_x, None, None, grad_a, grad_b, None


def _rows(x: Tensor) -> Tensor:
    """(T, d), whatever is in front of the last dimension."""
    return x.reshape(-1, x.shape[-1])


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """Rows in the leading dimensions of x. Not a view to autograd: a model may add to it in
    place, which is forbidden for views that were made inside of a function."""
    shaped: Tensor = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[-1]])
    return shaped


def _plus_product(y: Tensor, h: Tensor, factor: Tensor) -> Tensor:
    """y + h ``factor`` in the dtype of y, summed in the wider dtype; may reuse y."""
    wide = y.to(torch.promote_types(y.dtype, h.dtype))
    if wide.dtype == h.dtype:
        # Not addmm_, which torch's FLOP counter does not know.
        return torch.addmm(wide, h, factor, out=wide).to(y.dtype)
    return wide.add_(h @ factor).to(y.dtype)


class FusedLoraLinear(LoraLinear):
    """PEFT's layer in all but its forward pass, which is one operation where that is the same.

    It is where one plain adapter without dropout is on a plain nn.Linear or Conv1D; everything
    else goes PEFT's way.
    """

    product_order: ProductOrder = "factors"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs or _is_transformed() else self._only_adapter()
        if adapter is None or not self._is_plain(adapter, x):
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        base: Any = self.base_layer
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        a: Any = self.lora_A[adapter]
        b: Any = self.lora_B[adapter]
        s = float(self.scaling[adapter])
        return adapted_linear(x, weight, base.bias, a.weight, b.weight, s, self.product_order)

    def _only_adapter(self) -> str | None:
        """The adapter that is active, alone and not merged."""
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        return active[0] if len(active) == 1 else None

    def _is_plain(self, adapter: str, x: Tensor) -> bool:
        """Whether nothing but W x + bias + s B A x is asked for, and W is frozen."""
        base: Any = self.base_layer
        a: Any = self.lora_A[adapter]
        b: Any = self.lora_B[adapter]
        if adapter in self.lora_variant or self.lora_bias[adapter]:
            return False
        if not (_is_plain_linear(base) and _is_plain_linear(a) and _is_plain_linear(b)):
            return False
        weight, bias = base.weight, base.bias
        return (
            getattr(self.lora_dropout[adapter], "p", 0.0) == 0.0
            and x.ndim > 1
            and x.dtype == weight.dtype
            and (x.dtype == a.weight.dtype or self.cast_input_dtype_enabled)
            and x.device == weight.device == a.weight.device == b.weight.device
            and not weight.requires_grad
            and not (bias is not None and bias.requires_grad)
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _get_name(self) -> str:
        return LoraLinear.__name__  # in PEFT's repr


def fuse(model: nn.Module, order: ProductOrder) -> None:
    """Makes PEFT's own linear layers fused ones. Its layers of quantised bases stay.

    By changing their class: how PEFT builds, names and saves them is then not touched.
    """
    for layer in model.modules():
        if type(layer) is LoraLinear:
            layer.__class__ = FusedLoraLinear
            layer.product_order = order  # type: ignore[assignment]


def _is_transformed() -> bool:
    """Whether functorch, forward-mode differentiation or hooks on every module want to look in."""
    hooks = torch.nn.modules.module
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
    )


_FORWARDS = (nn.Linear.forward, Conv1D.forward)


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether calling it is its product and nothing else: no hooks, nobody's own forward."""
    return (
        type(module).forward in _FORWARDS
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )
