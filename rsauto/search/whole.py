"""What a trial has beside what was chosen for it: the study's training, AdaLoRA's allocation."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from rsauto.config import StudyConfig
from rsauto.records import ADALORA_METHODS, AllocationSpec, TrialSpec
from rsauto.scaling import initial_rank
from rsauto.training.schedule import steps_of_share


def with_allocation(
    spec: TrialSpec, config: StudyConfig, steps: int, lambda_lr_ratio: float
) -> TrialSpec:
    """What only AdaLoRA has; other methods are left as they are."""
    if spec.method not in ADALORA_METHODS:
        return spec
    chosen = config.adalora
    allocation = AllocationSpec(
        tinit=steps_of_share(chosen.warmup_share, steps),
        tfinal=steps_of_share(chosen.final_share, steps),
        delta_t=chosen.interval,
        beta1=chosen.beta1,
        beta2=chosen.beta2,
        orth_reg_weight=chosen.orth_reg_weight,
        orth_reg_form=chosen.orth_reg_form,
        score=chosen.score,
        recovery=chosen.recovery,
        scale_rank=chosen.scale_rank,
        init_std=chosen.init_std,
    )
    return replace(
        spec,
        init_rank=initial_rank(spec.rank, chosen.init_ratio),
        target_rank=spec.rank,
        lambda_lr_ratio=lambda_lr_ratio,
        allocation=allocation,
    )


def with_training(
    spec: TrialSpec,
    config: StudyConfig,
    steps: int,
    max_length: int,
    quant_bits: Literal[4, 8] | None,
) -> TrialSpec:
    """Everything that is the same in every trial."""
    training = config.training
    return replace(
        spec,
        head_learning_rate=(training.head_learning_rate if config.data.task == "SEQ_CLS" else None),
        adapter_dtype=config.model.adapter_dtype,
        quant_bits=quant_bits,
        optimizer=training.optimizer,
        schedule=training.schedule,
        warmup_share=training.warmup_share,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        batch_size=training.batch_size,
        max_length=max_length,
        steps=steps,
        num_evals=min(training.num_evals, steps),
        logging_steps=training.logging_steps,
        activation_moments=training.activation_moments,
        seed=training.seed,
    )
