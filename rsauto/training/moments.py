"""Moments of the adapted layers' activations and gradients.

What definition 3.1 and theorem 3.2 of the rsLoRA paper (arXiv:2312.03732) speak of, and what its
appendix B.7 shows. Measured between two steps; nothing that is trained is touched.

Notation
    x    input of an adapted layer, (tokens, d_in)
    y    its output W x + gamma_r B A x, (tokens, d_out)
    v    dL/dy, of the mean loss over the counted tokens
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rsauto.adapters.lora import ADAPTER_NAME, lora_layers
from rsauto.data import Example, collate, evaluation_batches
from rsauto.records import ActivationMoments
from rsauto.training.loss import count_targets, summed_cross_entropy, token_mean


@dataclass
class _Sums:
    """Of one layer over all its batches."""

    totals: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        self.totals[name] = self.totals.get(name, 0.0) + float(values.sum(dtype=torch.float64))
        self.counts[name] = self.counts.get(name, 0) + values.numel()

    def mean(self, name: str) -> float:
        return self.totals[name] / self.counts[name]

    def gain(self, through: str, of: str) -> float:
        """How much larger the root mean square of one is than that of another."""
        before = self.mean(of)
        return math.sqrt(self.mean(through) / before) if before else 0.0


def activation_moments(
    adapted: PeftModel,
    examples: Sequence[Example],
    *,
    step: int,
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
) -> ActivationMoments:
    """Runs ``examples`` forward and backward once; no gradient must be there, and none is left.

    ``adapted`` has LoRA layers, no AdaLoRA ones. It is run as it trains: in that mode gradient
    checkpointing is at work, and dropout is off in a study.
    """
    layers = [layer for layer in lora_layers(adapted) if isinstance(layer, nn.Module)]
    sums = [_Sums() for _ in layers]
    batches = [collate(rows, pad_token_id) for rows in evaluation_batches(examples, batch_size)]
    num_targets = sum(count_targets(batch.labels) for batch in batches)
    for batch in (batch.to(device) for batch in batches):
        tokens = batch.attention_mask.bool()
        with ExitStack() as hooks:
            for layer, own in zip(layers, sums, strict=True):
                hook = partial(_watch, sums=own, tokens=tokens)
                hooks.callback(layer.register_forward_hook(hook).remove)
            logits = adapted(**batch.inputs()).logits
            loss = summed_cross_entropy(logits, batch.labels)
            # Not `torch.autograd.grad`, which checkpointing of the older kind refuses.
            token_mean(loss, num_targets).backward()
    adapted.zero_grad(set_to_none=True)
    names = {"output_mean": "y", "output_second": "yy", "adapter_second": "adapter",
             "adapter_grad_second": "adapter_grad"}  # fmt: skip
    return ActivationMoments(
        step=step,
        forward_gain=fmean(own.gain("adapter", "xx") for own in sums),
        backward_gain=fmean(own.gain("adapter_grad", "vv") for own in sums),
        **{name: fmean(own.mean(short) for own in sums) for name, short in names.items()},
    )


def _watch(
    layer: LoraLayer, args: tuple[Any, ...], output: Tensor, *, sums: _Sums, tokens: Tensor
) -> None:
    """A hook after an adapted layer's forward pass: takes in x, y and, later, v."""
    a = layer.lora_A[ADAPTER_NAME].get_parameter("weight").detach().float()
    b = layer.lora_B[ADAPTER_NAME].get_parameter("weight").detach().float()
    gamma = layer.scaling[ADAPTER_NAME]

    def counted(values: Tensor) -> Tensor:
        values = values.detach().float()
        if values.shape[: tokens.dim()] == tokens.shape:
            return values[tokens]
        return values.reshape(-1, values.shape[-1])  # a layer that sees tokens in another order

    def backward(gradient: Tensor) -> None:
        v = counted(gradient)
        sums.add("vv", v.square())
        sums.add("adapter_grad", (v @ b @ a * gamma).square())

    x, y = counted(args[0]), counted(output)
    sums.add("xx", x.square())
    sums.add("y", y)
    sums.add("yy", y.square())
    sums.add("adapter", (x @ a.T @ b.T * gamma).square())
    if output.requires_grad:  # not in a checkpoint's first pass of the older kind
        output.register_hook(backward)
