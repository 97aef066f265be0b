"""Which order of the low-rank product takes fewer operations for a trial, from shapes alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from rsauto.adapters.lora import lora_layers
from rsauto.adapters.low_rank import cheaper_order
from rsauto.memory.kinds import StepKind
from rsauto.memory.trace import build_model
from rsauto.records import ProductOrder

NUM_DRAWN = 64
"""Batches that the mean number of tokens is taken of."""


def planned_order(kind: StepKind, rank: int, num_tokens: int) -> ProductOrder:
    """The order for micro-batches of ``num_tokens``; "factors" where the other is not exact enough.

    W + gamma B A is formed in the base's dtype, so it takes a base and adapters in float32; and one
    rank for all layers.
    """
    mergeable = kind.dtype == kind.adapter_dtype == "float32" and kind.autocast is None
    plain = kind.method in ("lora", "rslora") and kind.lora_dropout == 0 and not kind.rank_pattern
    if not (mergeable and plain and kind.quant_bits is None):
        return "factors"
    return cheaper_order(adapted_shapes(replace(kind, method="lora")), num_tokens, rank)


def mean_tokens(lengths: Sequence[int], batch_size: int, micro_batch_size: int) -> int:
    """Of a micro-batch with its padding, over random batches of rows of ``lengths`` tokens.

    Batches are cut as in training, longest rows first, and drawn with the same numbers each time.
    """
    generator = random.Random(0)
    total = 0
    for _ in range(NUM_DRAWN):
        rows = (lengths[int(generator.random() * len(lengths))] for _ in range(batch_size))
        total += sum(sorted(rows, reverse=True)[::micro_batch_size]) * micro_batch_size
    return round(total * micro_batch_size / (NUM_DRAWN * batch_size))


@cache
def adapted_shapes(kind: StepKind) -> tuple[tuple[int, int], ...]:
    """(d_in, d_out) of every adapted layer."""
    with torch.device("meta"):
        model = build_model(kind, rank=1)
    layers: Iterator[Any] = lora_layers(model)
    return tuple((layer.in_features, layer.out_features) for layer in layers)
