"""Stand-ins for CUDA's attention kernels: the same storages and lifetimes, no arithmetic.

Tensors on the CPU stand in for CUDA's while a step is traced, and PyTorch then takes its CPU
kernels, which keep and allocate other things. What CUDA runs is chosen here as PyTorch 2.13 does:

    flash             float16 and bfloat16 without a mask
    memory efficient  a mask, float32, or heads that flash does not take
    math              the rest, such as float32 with fewer heads of k and v: plain operations

The sizes are those of PyTorch's sources (aten/src/ATen/native/transformers) and of flash-attn 2.
Scratch that depends on the card is that of one with 160 KiB of shared memory, such as an A100.
PyTorch may prefer cuDNN's kernels on compute capability 9 and 10: they keep the same tensors, and
their scratch is not published.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.integrations import sdpa_attention
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from rsauto.errors import InputError

HALF = (torch.float16, torch.bfloat16)

FLASH_ROWS = 128
"""Queries that a block of the flash kernel handles; its accumulators are rounded up to them."""


@contextmanager
def attention_of_cuda(flash: bool) -> Iterator[None]:
    """Within it, attention allocates on the CPU what it would on CUDA, and returns nothing of use.

    `flash` is for models that `use_flash` was called on: transformers' attention by the flash-attn
    package. Padded sequences are then taken to be full, which bounds their memory from above.
    Functions are replaced by name, because a function mode is not active where checkpointing
    recomputes; so backward has to run within it, too.
    """
    with ExitStack() as stack:
        for target, stand_in in _replaced(flash).items():
            stack.enter_context(mock.patch(target, stand_in))
        for name in ("_is_torch_xpu_available", "_is_torch_mps_available"):
            # Whether k and v are repeated depends on what this machine has, not on the tensors.
            if hasattr(sdpa_attention, name):
                stack.enter_context(mock.patch.object(sdpa_attention, name, False))
        if flash:
            masks = AttentionMaskInterface._global_mapping
            stack.enter_context(mock.patch.dict(masks, flash_attention_2=_flash_mask))
        yield


def use_flash(model: nn.Module) -> None:
    """Lets a model that was built for sdpa attend by flash-attn 2, which need not be installed.

    In place, on every configuration in it; call it once its layers are what they will be. Only
    within `attention_of_cuda(flash=True)` does the model then run. Raises InputError for an
    architecture that transformers does not run with flash-attn.
    """
    weights = (m.weight for m in model.modules() if isinstance(m, nn.Linear))
    is_quantised = not all(weight.is_floating_point() for weight in weights)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not _takes_flash(module):
            raise InputError(
                f"attn_implementation='flash_attention_2' cannot be followed for "
                f"{type(module).__name__}; use 'sdpa' or 'eager'"
            )
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation = "flash_attention_2"
            if is_quantised:  # as loading leaves it: queries are cast to the configuration's dtype
                config._is_quantized = True


def _takes_flash(model: PreTrainedModel) -> bool:
    """Some architectures choose their attention's class when they are built, so cannot switch."""
    defined_in = vars(sys.modules[type(model).__module__])
    has_classes = any(name.endswith("_ATTENTION_CLASSES") for name in defined_in)
    return bool(model._supports_flash_attn) and not has_classes


def _replaced(flash: bool) -> dict[str, Any]:
    replaced: dict[str, Any] = {"torch.nn.functional.scaled_dot_product_attention": _sdpa}
    if flash:
        name = "transformers.integrations.flash_attention._flash_attention_forward"
        replaced[name] = _flash_attention
    return replaced


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Shapes (batch, heads, length, dim); dropout changes what fused kernels read, not memory."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    if attn_mask is None and _suits_flash(query, key, value, is_causal, enable_gqa):
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        return _dense_flash(query, key, value).transpose(1, 2)
    if _suits_memory_efficient(query, key, value):
        return _memory_efficient(query, key, value, attn_mask)
    with torch.autocast("cpu", enabled=False):
        product: Tensor = torch._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    return product


def _suits_flash(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool
) -> bool:
    return (
        query.dtype in HALF
        and query.ndim == key.ndim == 4
        and query.shape[3] == key.shape[3] == value.shape[3] <= 256
        and (enable_gqa or query.shape[1] == key.shape[1])
        and (not is_causal or query.shape[2] == key.shape[2])
        and all(t.stride(-1) == 1 for t in (query, key, value))
    )


def _suits_memory_efficient(query: Tensor, key: Tensor, value: Tensor) -> bool:
    aligned = 16 // query.dtype.itemsize
    return (
        query.dtype in (*HALF, torch.float32)
        and query.ndim == key.ndim == 4
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and query.shape[3] == key.shape[3]
        and all(t.shape[3] % aligned == 0 and t.stride(-1) == 1 for t in (query, key, value))
    )


def _dense_flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Shapes (batch, length, heads, dim)."""
    batch, length = query.shape[:2]
    return _flash(query, key, value, rows=batch * _rounded(length, FLASH_ROWS))


def _flash(query: Tensor, key: Tensor, value: Tensor, *, rows: int) -> Tensor:
    """Shapes (..., heads, dim). Heads whose dim is no multiple of 8 are padded by a copy."""
    dim = query.shape[-1]
    if dim % 8:
        missing = (0, -dim % 8)
        query, key, value = (nn.functional.pad(t, missing) for t in (query, key, value))
    out: Tensor = _Flash.apply(query, key, value, rows)  # type: ignore[no-untyped-call]
    return out[..., :dim] if dim % 8 else out


class _Flash(torch.autograd.Function):
    """FlashAttention-2 on (..., heads, dim); `rows` of queries are those of its accumulators."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: int) -> Tensor:
        out = torch.empty_like(query)
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        seed = query.new_empty(2, dtype=torch.int64)
        offset = query.new_empty((), dtype=torch.int64)
        ctx.save_for_backward(query, key, value, out, logsumexp, seed, offset)
        ctx.rows = rows
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, *_ = ctx.saved_tensors
        heads, dim = query.shape[-2:]
        copies = gradient.contiguous(), out.contiguous()
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        padded_dim = _rounded(dim, 32 if dim <= 128 else 64)
        softmax_d = query.new_empty(heads * ctx.rows, dtype=torch.float32)
        sums = query.new_empty(ctx.rows, heads, padded_dim, dtype=torch.float32)
        if key.shape[-2] != heads:  # gradients of every head of q, summed to those of k and v
            expanded = [key.new_empty(*key.shape[:-2], heads, dim) for _ in range(2)]
            del expanded
        del copies, softmax_d, sums
        return *gradients, None


def _memory_efficient(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    needs_gradient = any(t.requires_grad for t in (query, key, value))
    out: Tensor = _MemoryEfficient.apply(  # type: ignore[no-untyped-call]
        query, key, value, _bias(mask, query), needs_gradient and torch.is_grad_enabled()
    )
    return out


def _bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A mask as what is added to scores, its rows in steps of 8 elements.

    Its heads are repeated by strides, so by no memory.
    """
    if mask is None:
        return None
    bias = torch.empty(mask.shape, dtype=query.dtype) if mask.dtype == torch.bool else mask
    if bias.stride(-1) != 1 or any(stride % 8 for stride in bias.stride()[:-1]):
        bias = nn.functional.pad(bias, (0, 8 - bias.shape[-1] % 8))
    return bias


class _MemoryEfficient(torch.autograd.Function):
    """The memory-efficient kernel on (batch, heads, length, dim)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        keeps_logsumexp: bool,
    ) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1])
        rows = _rounded(length, 32) if keeps_logsumexp else 0
        logsumexp = query.new_empty(batch, heads, rows, dtype=torch.float32)
        if query.dtype in HALF and value.shape[-1] > 128:
            sums = torch.empty_like(out, dtype=torch.float32)
            del sums
        out = out.transpose(1, 2)
        ctx.save_for_backward(query, key, value, bias, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, out, _ = ctx.saved_tensors
        gradient, out = (t.transpose(1, 2).contiguous() for t in (gradient, out))
        gradients = [t.new_empty(t.transpose(1, 2).shape) for t in (query, key, value)]
        if query.dtype in HALF:
            delta = query.new_empty(query.shape[:3], dtype=torch.float32)
        else:
            delta = (gradient * out).sum(-1).transpose(-2, -1).contiguous()
        workspace = query.new_empty(_workspace_bytes(query, key, value), dtype=torch.uint8)
        del delta, workspace
        return *(t.transpose(1, 2) for t in gradients), None, None


def _workspace_bytes(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Accumulators of the memory-efficient kernel's gradients, those of q with a lock a block.

    Those of k and v stay in registers for half precision up to 128 dims, and float32 needs none.
    """
    batch, heads, length, dim = query.shape
    widest = max(dim, value.shape[3])
    is_half = query.dtype in HALF
    block_rows = 64 if widest <= 64 else 128
    block_columns = 128 if is_half and 64 < widest <= 128 else 64
    num_blocks = math.ceil(length / block_rows) * math.ceil(dim / block_columns)
    nbytes = num_blocks * (16 + 4 * block_rows * block_columns)
    if is_half and widest > 128:
        splits = min(math.ceil(key.shape[2] / block_columns), 200 // (batch * heads))
        columns = _rounded(dim, block_rows) + _rounded(value.shape[3], block_rows)
        nbytes += 4 * max(splits, 1) * block_columns * columns
    return batch * heads * _rounded(nbytes, 16)


def _flash_attention(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    attention_mask: Tensor | None,
    *_: Any,
    target_dtype: torch.dtype | None = None,
    **__: Any,
) -> Tensor:
    """What transformers does around flash-attn 2, on (batch, length, heads, dim).

    With a mask of (batch, length), padding is removed first and put back last. Raises InputError
    for float32, which flash-attn refuses.
    """
    states = query_states, key_states, value_states
    if target_dtype is not None and query_states.dtype == torch.float32:
        query_states, key_states, value_states = (t.to(target_dtype) for t in states)
    if query_states.dtype not in HALF:
        raise InputError(
            "attn_implementation='flash_attention_2' needs dtype 'bfloat16' or 'float16', or "
            f"autocast to one, not {query_states.dtype}; set dtype or use 'sdpa'"
        )
    if attention_mask is None:
        return _dense_flash(query_states, key_states, value_states)
    return _packed_flash(query_states, key_states, value_states)


def _packed_flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Shapes (batch, length, heads, dim), every token kept."""
    batch, length = query.shape[:2]
    indices = torch.arange(batch * length)
    key, value, query = (t.flatten(0, 1)[indices] for t in (key, value, query))
    packed = _flash(query, key, value, rows=batch * (length + FLASH_ROWS))
    out = packed.new_zeros(packed.shape)
    out[indices] = packed
    return out.view(batch, length, *out.shape[1:])


def _flash_mask(*, attention_mask: Tensor | None = None, **arguments: Any) -> Tensor | None:
    """Keeps the mask of fake tensors, unless transformers was told to read those.

    Only a mask of nothing but ones is dropped, and a fake one would answer that it is.
    """
    is_tracing: Callable[..., bool] = vars(masking_utils)["is_tracing"]
    if attention_mask is None or is_tracing(attention_mask):
        return attention_mask
    mask: Tensor | None = flash_attention_mask(attention_mask=attention_mask, **arguments)
    return mask


def _rounded(size: int, step: int) -> int:
    return math.ceil(size / step) * step
