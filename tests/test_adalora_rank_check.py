"""Rank coordinate check: early in training the adapters' output must not move with the rank."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rsauto.adapters.adalora import add_adalora
from rsauto.adapters.lora import add_adapter, lora_layers
from rsauto.adapters.optimizers import build_optimizer
from rsauto.records import AllocationSpec, Method, TrialSpec

RANKS = (4, 16, 64)


@cache
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


def size_after(method: Method, rank: int, steps: int) -> float:
    """Root mean square of gamma_r P diag(lambda) Q x (or gamma_r B A x) over the modules."""
    spec = TrialSpec(
        role="search",
        method=method,
        rank=rank,
        alpha=16,
        scaling_rule="rslora" if method.startswith("rs") else "lora",
        learning_rate=1e-3,
        steps=100,
    )
    torch.manual_seed(1)
    if method.endswith("adalora"):
        allocation = AllocationSpec(tinit=90, tfinal=0)
        spec = replace(spec, init_rank=rank, target_rank=rank, allocation=allocation)
        adapted = add_adalora(copy.deepcopy(base()), spec)
    else:
        adapted = add_adapter(copy.deepcopy(base()), spec)
    optimizer = build_optimizer(adapted, name="adamw", learning_rate=spec.learning_rate)
    ids = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(2))
    for _ in range(steps):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    inputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda layer, args, _: inputs.append(args[0] @ layer.get_delta_weight("default").T)
        )
        for layer in lora_layers(adapted)
    ]
    with torch.no_grad():
        adapted(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return float(torch.stack([out.square().mean() for out in inputs]).mean().sqrt())


def exponent(method: Method, steps: int) -> float:
    sizes = [size_after(method, rank, steps) for rank in RANKS]
    return float(np.polyfit(np.log(RANKS), np.log(sizes), 1)[0])


@pytest.mark.parametrize("steps", [1, 8])
def test_with_rsloras_factor_the_size_does_not_move_with_rank(steps: int) -> None:
    assert abs(exponent("rsadalora", steps)) < 0.15


@pytest.mark.parametrize("steps", [1, 8])
def test_with_alpha_over_r_it_falls_with_rank(steps: int) -> None:
    assert exponent("adalora", steps) < -0.35
