"""Stand-ins for bitsandbytes' layers: the same storages and the same allocations, no kernels.

A step can then be traced where bitsandbytes is not installed, and on fake tensors, of which its
parameters cannot be made. Two layers are imitated, and PEFT's LoRA layers around them:

    8 bit  int8 weights and a float32 scale for every output
    4 bit  two weights a byte, a scale for every block of 64; the scales quantised to uint8 in
           blocks of 256 ("double quantisation"), or left in float32

What the products are is left to chance: only sizes and lifetimes are followed, those of
bitsandbytes 0.50 as measured on a CPU and, where CUDA differs, as its source tells.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora import SVDLinear
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rsauto.adalora.layer import SvdLayer
from rsauto.adapters.head import head_module_names
from rsauto.adapters.lora import ADAPTER_NAME, lora_layers
from rsauto.quantisation import Bits, is_kept, saved_settings, unquantised_modules

BLOCK, SCALE_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one, in 4 bit."""

OUTLIER = 6.0
"""Inputs as large as this are outliers in 8 bit."""


def stand_in_for_linears(model: PreTrainedModel, bits: Bits, device_type: str) -> None:
    """Replaces the linear layers that loading would quantise, in place.

    `device_type` is where the step will run: "cpu" or "cuda".
    """
    saved = saved_settings(model.config) or {}
    kept = unquantised_modules(model, head_module_names(model), saved.get("llm_int8_skip_modules"))
    double = bool(saved.get("bnb_4bit_use_double_quant", True))
    compute = saved.get("bnb_4bit_compute_dtype")
    for name, module in list(model.named_modules()):
        if is_kept(name, kept) or not (type(module) is nn.Linear or isinstance(module, Conv1D)):
            continue
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
        shape = (weight.shape[0], weight.shape[1])
        dtype = weight.dtype
        bias = module.bias is not None
        model.set_submodule(
            name,
            Linear8bitLt(shape, dtype, bias, device_type)
            if bits == 8
            else Linear4bit(
                shape, dtype, bias, device_type, double, getattr(torch, compute or "", dtype)
            ),
        )


def follow_bitsandbytes(adapted: PeftModel) -> None:
    """Makes PEFT's layers on stand-ins add their adapters as its layers on bitsandbytes' do.

    Those of our own AdaLoRA do so in the same way on every base layer.
    """
    for layer in lora_layers(adapted):
        if isinstance(layer, SvdLayer):
            continue
        if isinstance(layer.get_base_layer(), _StandIn):
            layer.__class__ = _AdaLoraLayer if isinstance(layer, SVDLinear) else _LoraLayer


class _StandIn(nn.Linear):
    """A linear layer that PEFT adapts like any other, with storages of its own."""

    def __init__(
        self,
        weight: Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: bool,
        device_type: str,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        own_bias = nn.Parameter(torch.empty(shape[0], dtype=dtype)) if bias else None
        self.register_parameter("bias", own_bias)
        self.device_type = device_type

    @property
    def W_q(self) -> Tensor:
        """Where PEFT finds this name, it asks for `dequantize`, as DoRA does."""
        return self.weight

    def dequantize(self) -> Tensor:
        raise NotImplementedError


class Linear8bitLt(_StandIn):
    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, bias: bool, device_type: str
    ) -> None:
        super().__init__(torch.empty(shape, dtype=torch.int8), shape, dtype, bias, device_type)
        self.register_buffer("scales", torch.empty(shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        # A CPU trains with dequantised weights and evaluates with quantised activations.
        in_int8 = self.device_type == "cuda" or not self.training
        product: Tensor = _Product8bit.apply(x, self, in_int8)  # type: ignore[no-untyped-call]
        return product

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        scales = self.get_buffer("scales").unsqueeze(1).mul(1 / 127)
        return self.weight.to(dtype).mul_(scales)

    def dequantize(self) -> Tensor:
        return self.weight * self.get_buffer("scales").view(-1, 1) * (1 / 127)

    def int8_product(self, x: Tensor) -> Tensor:
        """Inputs quantised row by row, summed in int32, scaled back.

        Columns with outliers, which LLM.int8 multiplies apart, are few and left out.
        """
        half = x.to(torch.float16)
        outliers = half.abs() >= OUTLIER
        quantised = self._quantised_rows(half)
        del half, outliers
        sums = torch.empty(*x.shape[:-1], self.out_features, dtype=torch.int32)
        if self.device_type == "cuda":
            return torch.empty_like(sums, dtype=torch.float16).to(x.dtype)
        # Products of the scales, the sums in float32, and the product of both.
        scaled = [torch.empty_like(sums, dtype=torch.float32) for _ in range(3)]
        del quantised, scaled
        return torch.empty_like(sums, dtype=x.dtype)

    def _quantised_rows(self, half: Tensor) -> Tensor:
        if self.device_type == "cuda":
            return torch.empty_like(half, dtype=torch.int8)
        scales = torch.empty(*half.shape[:-1], 1)
        return (half * scales).round().to(torch.int8)


class _Product8bit(torch.autograd.Function):
    """Keeps its input as a plain attribute, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear8bitLt, in_int8: bool) -> Tensor:
        ctx.layer = layer
        ctx.x = x if any(ctx.needs_input_grad) else None
        if in_int8:
            return layer.int8_product(x)
        return nn.functional.linear(x, layer.dequantised(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.layer.dequantised(gradient.dtype)
        return torch.matmul(gradient, weight), None, None


class Linear4bit(_StandIn):
    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: bool,
        device_type: str,
        double: bool,
        compute_dtype: torch.dtype,
    ) -> None:
        packed = torch.empty(math.ceil(math.prod(shape) / 2), 1, dtype=torch.uint8)
        super().__init__(packed, shape, dtype, bias, device_type)
        num_blocks = math.ceil(math.prod(shape) / BLOCK)
        state = {"code": torch.empty(16)}
        if double:
            state["scales"] = torch.empty(num_blocks, dtype=torch.uint8)
            state["scales_of_scales"] = torch.empty(math.ceil(num_blocks / SCALE_BLOCK))
            state["code_of_scales"] = torch.empty(256)
            state["offset"] = torch.empty(())
        else:
            state["scales"] = torch.empty(num_blocks)
        for name, tensor in state.items():
            self.register_buffer(name, tensor)
        self.dtype, self._compute_dtype = dtype, compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        inner = x.to(self._compute_dtype)
        product: Tensor = _Product4bit.apply(inner, self)  # type: ignore[no-untyped-call]
        return product.to(x.dtype)

    def block_scales(self, in_place: bool) -> Tensor:
        scales = self.get_buffer("scales")
        if scales.dtype == torch.float32:
            return scales
        dequantised = torch.empty_like(scales, dtype=torch.float32)
        offset = self.get_buffer("offset")
        return dequantised.add_(offset) if in_place else dequantised + offset

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.out_features, self.in_features, dtype=dtype)

    def dequantize(self) -> Tensor:
        scales = self.block_scales(in_place=True)
        weight = self.dequantised(self.dtype)
        del scales
        return weight


class _Product4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        # On CUDA a small product may do without: how small depends on the card.
        scales = layer.block_scales(in_place=False)
        product = nn.functional.linear(x, layer.dequantised(x.dtype), layer.bias)
        del scales
        return product

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        scales = ctx.layer.block_scales(in_place=True)
        weight = ctx.layer.dequantised(ctx.layer.dtype)
        del scales
        return torch.matmul(gradient, weight.to(gradient.dtype)), None


def _casts(base: nn.Module) -> bool:
    """Whether PEFT casts around an adapter: not under CUDA's autocast, but under the CPU's."""
    assert isinstance(base, _StandIn)
    return base.device_type == "cpu" or not torch.is_autocast_enabled("cpu")


class _LoraLayer(LoraLinear):
    """PEFT's Linear8bitLt and Linear4bit cast the adapter's output before they add it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if isinstance(self.base_layer, Linear4bit):
            result = result.clone()
        dtype, casts = result.dtype, _casts(self.base_layer)
        down, up = self.lora_A[ADAPTER_NAME], self.lora_B[ADAPTER_NAME]
        if casts:
            x = x.to(down.get_parameter("weight").dtype)
        if ADAPTER_NAME in self.lora_variant:
            variant = self.lora_variant[ADAPTER_NAME]
            result = variant.forward(self, active_adapter=ADAPTER_NAME, x=x, result=result)
            return result.to(dtype) if casts else result
        delta: Tensor = up(down(self.lora_dropout[ADAPTER_NAME](x))) * self.scaling[ADAPTER_NAME]
        if casts:
            delta = delta.to(dtype)
        return result + delta


class _AdaLoraLayer(SVDLinear):
    """The same of AdaLoRA, whose 4 bit layer adds in place."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        in_place, casts = isinstance(self.base_layer, Linear4bit), _casts(self.base_layer)
        if in_place:
            result = result.clone()
        factors: Any = (self.lora_A, self.lora_B, self.lora_E, self.ranknum)
        down, up, values, rank = (factor[ADAPTER_NAME] for factor in factors)
        if casts:
            x = x.to(down.dtype if in_place else torch.float32)
        delta: Tensor = self.lora_dropout[ADAPTER_NAME](x) @ (down * values).T @ up.T
        if casts:
            delta = delta.to(result.dtype)
        delta = delta * self.scaling[ADAPTER_NAME] / (rank + 1e-5)
        return result.add_(delta) if in_place else result + delta
