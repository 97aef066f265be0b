"""How each fine-tuning method changes a traced step: the place where a new method is added.

A method says how a base model is adapted, and what it does after every optimizer step. It is traced
with the very code that trains it, so nothing about its memory is written down twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rsauto.adapters.adalora import add_adalora, allocator_of
from rsauto.adapters.head import head_module_names, hold_heads_in_float32, is_classifier
from rsauto.adapters.lora import add_adapter, has_conv1d, lora_layers, target_module_names, wrap
from rsauto.memory.kinds import StepKind
from rsauto.records import AllocationSpec, TrialSpec


def _nothing(_adapted: nn.Module) -> Iterator[Tensor]:
    return iter(())


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedMethod:
    """What a method adds to a step."""

    adapt: Callable[[PreTrainedModel, StepKind, int], PeftModel]
    """Adapts the base to a rank, leaving only what it trains trainable."""
    after_step: Callable[[nn.Module], None] | None = None
    """Runs after every optimizer step, such as the allocation of ranks."""
    kept: Callable[[nn.Module], Iterator[Tensor]] = _nothing
    """Tensors that `after_step` keeps from step to step; they count with the optimizer's states."""
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None
    """The loss of a batch, where it is not the cross-entropy of `rsauto.training.loss`."""


def _adapt_lora(model: PreTrainedModel, kind: StepKind, rank: int, **options: Any) -> PeftModel:
    spec = TrialSpec(
        role="search",
        method="rslora",
        rank=rank,
        alpha=rank,
        scaling_rule="rslora",
        target_modules=kind.target_modules,
        rank_pattern=kind.rank_pattern,
        product_order=kind.product_order,
        learning_rate=1e-4,
    )
    options["lora_dropout"] = kind.lora_dropout
    return add_adapter(model, spec, **options)


def _adapt_dora(model: PreTrainedModel, kind: StepKind, rank: int) -> PeftModel:
    return _adapt_lora(model, kind, rank, use_dora=True)


def _adapt_adalora(model: PreTrainedModel, kind: StepKind, rank: int) -> PeftModel:
    """At its initial rank, before the first pruning, which is when it needs most."""
    spec = TrialSpec(
        role="search",
        method="rsadalora",
        rank=1,
        alpha=rank,
        scaling_rule="rslora",
        target_modules=kind.target_modules,
        learning_rate=1e-4,
        init_rank=rank,
        target_rank=1,
        allocation=AllocationSpec(
            tinit=0,
            tfinal=0,
            delta_t=_NEVER,
            score=kind.score,
            orth_reg_weight=0.1 if kind.orth_reg else 0.0,
        ),
    )
    return add_adalora(model, spec, lora_dropout=kind.lora_dropout)


_NEVER = 2**30
"""Steps between allocations, which depend on values."""


def _gather(adapted: nn.Module) -> None:
    """Which triplets stay depends on values; of that only the copies of a factor are followed.

    One at a time: of what is kept where pruned triplets are freed, and in float32 as a CPU asks
    whether gradients are finite.
    """
    assert isinstance(adapted, PeftModel)
    allocator = allocator_of(adapted)
    allocator.gather()
    for _, factor in allocator.factors():
        torch.empty_like(factor, dtype=torch.float32)


def _gathered(adapted: nn.Module) -> Iterator[Tensor]:
    assert isinstance(adapted, PeftModel)
    return allocator_of(adapted).tensors()


def _adapt_peft_adalora(model: PreTrainedModel, kind: StepKind, rank: int) -> PeftModel:
    config = AdaLoraConfig(
        init_r=rank,
        target_r=max(1, rank // 2),
        lora_alpha=rank,
        lora_dropout=kind.lora_dropout,
        target_modules=target_module_names(model, kind.target_modules),
        fan_in_fan_out=has_conv1d(model),
        task_type="SEQ_CLS" if is_classifier(model) else "CAUSAL_LM",
        modules_to_save=head_module_names(model) or None,
        # Traced before the first pruning, when all of the initial rank is there.
        tinit=1,
        tfinal=100,
        total_step=1000,
        deltaT=10,
    )
    adapted = wrap(model, config)
    hold_heads_in_float32(adapted)
    for name, parameter in adapted.named_parameters():
        if ".ranknum." in name:
            # PEFT 0.21 makes this constant trainable on a base that is not float32.
            parameter.requires_grad_(False)
    for layer in lora_layers(adapted):
        layer.get_base_layer().register_forward_hook(_strided_view)
    return adapted


def _strided_view(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
    """What AdaLoRA adds to in place, as autograd knows it afterwards when tensors are real.

    For fake ones it repeats the view instead, whose gradient takes less memory.
    """
    if out._base is None:
        return out
    return out._base.as_strided(out.size(), out.stride(), out.storage_offset())


def _loss_of_model(adapted: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """PEFT adds AdaLoRA's orthogonality to the loss that the model itself computes."""
    loss: Tensor = adapted(**batch).loss
    return loss


def _update_importance(adapted: nn.Module) -> None:
    # The base model of a PEFT model is typed as nn.Module.
    adapted.base_model.update_and_allocate(1)  # type: ignore[operator,union-attr]


def _importance(adapted: nn.Module) -> Iterator[Tensor]:
    allocator: Any = adapted.base_model.rankallocator  # type: ignore[union-attr]
    for table in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
        yield from table.values()


_LORA = TracedMethod(adapt=_adapt_lora)
_ADALORA = TracedMethod(adapt=_adapt_adalora, after_step=_gather, kept=_gathered)

METHODS: dict[str, TracedMethod] = {
    "lora": _LORA,
    "rslora": _LORA,
    "adalora": _ADALORA,
    "rsadalora": _ADALORA,
    "dora": TracedMethod(adapt=_adapt_dora),
    "peft_adalora": TracedMethod(
        adapt=_adapt_peft_adalora,
        after_step=_update_importance,
        kept=_importance,
        loss=_loss_of_model,
    ),
}


def adapt(model: PreTrainedModel, kind: StepKind, rank: int) -> PeftModel:
    """The model with the kind's adapter of ``rank``, its factors in the kind's dtype."""
    adapted = METHODS[kind.method].adapt(model, kind, rank)
    dtype = getattr(torch, kind.adapter_dtype)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and ".modules_to_save." not in name:
            parameter.data = parameter.data.to(dtype)
    return adapted
