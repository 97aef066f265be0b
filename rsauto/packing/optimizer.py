"""One optimizer step of every trial of a stack, each at its own rate, in place on the buffers.

The arithmetic is that of torch's fused kernels, which optimizers of a trial alone call as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from rsauto.adapters.optimizers import GroupName
from rsauto.packing.stack import Group, Stack

PackedOptimizer = Literal["adamw", "sgd"]

STATES: Mapping[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
"""What an optimizer keeps of every number."""

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
"""Of AdamW: torch's defaults, as of a trial alone."""


@torch.no_grad()
def step(
    stack: Stack,
    name: PackedOptimizer,
    *,
    rates: Sequence[Mapping[GroupName, float]],
    weight_decay: Sequence[float],
    counts: Tensor,
) -> None:
    """Steps row k of every group with ``rates[k]``.

    ``counts``, (K,) float32 and on the device, are the steps of every trial, this one included.
    """
    groups = {group: Rows(stack.groups[group], name) for group in stack.groups}
    for row, count in enumerate(counts.unbind()):
        by_rate: dict[tuple[float, torch.dtype], list[Rows]] = {}
        for group, rows in groups.items():
            by_rate.setdefault((rates[row][group], rows.dtype), []).append(rows)
        for (rate, _), same in by_rate.items():
            if name == "adamw":
                _adamw(same, row, rate, weight_decay[row], count)
            else:
                _sgd(same, row, rate, weight_decay[row])


class Rows:
    """What a step changes of a group, cut into trials.

    Groups of one dtype are stepped together: a head is in float32 beside factors in bfloat16.
    """

    def __init__(self, group: Group, name: PackedOptimizer) -> None:
        self.dtype = group.values.dtype
        self.values = group.values.unbind()
        self.gradients = group.gradients.unbind()
        self.states = [group.buffers[state].unbind() for state in STATES[name]]


def _adamw(groups: Sequence[Rows], row: int, rate: float, decay: float, count: Tensor) -> None:
    torch._fused_adamw_(
        [g.values[row] for g in groups],
        [g.gradients[row] for g in groups],
        [g.states[0][row] for g in groups],
        [g.states[1][row] for g in groups],
        [],
        [count] * len(groups),
        lr=rate,
        beta1=BETA1,
        beta2=BETA2,
        weight_decay=decay,
        eps=EPSILON,
        amsgrad=False,
        maximize=False,
    )


def _sgd(groups: Sequence[Rows], row: int, rate: float, decay: float) -> None:
    torch._fused_sgd_(
        [g.values[row] for g in groups],
        [g.gradients[row] for g in groups],
        [],
        weight_decay=decay,
        momentum=0.0,
        lr=rate,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )
