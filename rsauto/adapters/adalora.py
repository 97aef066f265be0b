"""AdaLoRA and AdaLoRA on rsLoRA, as a trial asks for them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from rsauto.adalora.allocator import RankAllocator
from rsauto.adalora.config import RsAdaLoraConfig
from rsauto.adalora.model import RsAdaLoraModel
from rsauto.adapters.head import hold_heads_in_float32
from rsauto.adapters.lora import shared_options, target_module_names, wrap
from rsauto.records import TrialSpec


def add_adalora(model: nn.Module, spec: TrialSpec, **options: Any) -> PeftModel:
    """Wraps ``model`` with the spec's AdaLoRA; the base weights are frozen and shared.

    P and Q are drawn from torch's global generator: seed it first. ``options`` are further fields
    of `RsAdaLoraConfig`.
    """
    chosen = spec.allocation
    assert chosen is not None and spec.init_rank is not None and spec.target_rank is not None
    settings = asdict(chosen)  # named as the configuration has them, but for PEFT's deltaT
    config = RsAdaLoraConfig(
        init_r=spec.init_rank,
        target_r=spec.target_rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.scaling_rule == "rslora",
        total_step=spec.steps,
        deltaT=settings.pop("delta_t"),
        **settings,
        target_modules=target_module_names(model, spec.target_modules),
        **shared_options(model),
        **{"lora_dropout": 0.0, **options},
    )
    adapted = wrap(model, config)
    hold_heads_in_float32(adapted)
    if spec.adapter_dtype == "bfloat16":
        for _, factor in allocator_of(adapted).factors():
            # Only now: the numbers drawn are then those of float32, rounded.
            factor.data = factor.data.to(torch.bfloat16)
    return adapted


def allocator_of(adapted: PeftModel) -> RankAllocator:
    """The rank allocator of an adapter that `add_adalora` put on."""
    assert isinstance(adapted.base_model, RsAdaLoraModel)
    return adapted.base_model.allocator()
