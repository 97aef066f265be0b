"""Optimizers over an adapter's parameters, with LoRA+'s separate learning rate for B.

A classifier's head is trained beside the adapter at a rate of its own, and so is AdaLoRA's lambda:
the factor that starts at zero, whose update moves Delta W by gamma_r eta a triplet whatever the
width, where an update of LoRA's B moves whole rows of it.

LoRA+ (arXiv:2402.12354): eta_B = lr_ratio * eta_A, with lr_ratio well above 1, because B starts at
zero. A ratio of 1 is the plain optimizer.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor

from rsauto.scaling import OptimizerName

GroupName = Literal["A", "B", "lambda", "head"]
GROUP_NAMES: tuple[GroupName, ...] = get_args(GroupName)


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    lr_ratio: float,
    weight_decay: float,
    head_learning_rate: float | None = None,
    lambda_lr_ratio: float | None = None,
) -> list[dict[str, Any]]:
    """Up to four groups, "A", "B", "lambda" and "head", that partition the trainable parameters.

    B's factors (AdaLoRA: P) learn at ``learning_rate * lr_ratio``, AdaLoRA's lambdas at
    ``learning_rate * lambda_lr_ratio`` (None: 1), a classifier's head at ``head_learning_rate``
    (None: at ``learning_rate``), everything else (A; AdaLoRA: Q) at ``learning_rate``; all are
    decayed alike. Raises AssertionError if a parameter were in no group or in two.
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    head = [p for n, p in trainable.items() if ".modules_to_save." in n]
    group_b = [p for n, p in trainable.items() if ".lora_B." in n]
    lambdas = [p for n, p in trainable.items() if ".lora_E." in n]
    in_others = {id(p) for p in (*head, *group_b, *lambdas)}
    group_a = [p for p in trainable.values() if id(p) not in in_others]
    ids = [id(p) for p in (*group_a, *group_b, *lambdas, *head)]
    assert len(ids) == len(set(ids)) == len(trainable), "groups must partition the parameters"
    groups = [
        {"name": "A", "params": group_a, "lr": learning_rate},
        {"name": "B", "params": group_b, "lr": learning_rate * lr_ratio},
        {"name": "lambda", "params": lambdas, "lr": learning_rate * (lambda_lr_ratio or 1.0)},
        {"name": "head", "params": head, "lr": head_learning_rate or learning_rate},
    ]
    return [{**group, "weight_decay": weight_decay} for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module,
    *,
    name: OptimizerName,
    learning_rate: float,
    lr_ratio: float = 1.0,
    weight_decay: float = 0.0,
    head_learning_rate: float | None = None,
    lambda_lr_ratio: float | None = None,
) -> Optimizer:
    """AdamW (fused), SGD (no momentum) or Adafactor (constant rate, no parameter scaling).

    Each group keeps its peak rate as "initial_lr", which schedules multiply.
    """
    groups = parameter_groups(
        model,
        learning_rate=learning_rate,
        lr_ratio=lr_ratio,
        weight_decay=weight_decay,
        head_learning_rate=head_learning_rate,
        lambda_lr_ratio=lambda_lr_ratio,
    )
    for group in groups:
        group["initial_lr"] = group["lr"]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate)
    return Adafactor(
        groups, lr=learning_rate, scale_parameter=False, relative_step=False, warmup_init=False
    )
