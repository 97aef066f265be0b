"""The optimizers that a step is traced with: rsauto's own, and others that people train with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from rsauto.adapters.optimizers import build_optimizer, parameter_groups
from rsauto.memory.kinds import PlannedOptimizer

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
"""Of no account to memory, but decay must not be 0: it costs plain SGD a temporary."""

BLOCK = 256
"""Elements of a state that share a scale in 8 bit."""

SMALLEST_8BIT = 4096
"""Elements from which on a parameter's states are kept in 8 bit."""


def planned_optimizer(model: nn.Module, name: PlannedOptimizer, device_type: str) -> Optimizer:
    """`name` over the trainable parameters of `model`, which may be fake or real.

    `device_type` is where the step will run, "cpu" or "cuda".
    """
    if name == "adamw" or name == "adafactor" or name == "sgd":
        own = build_optimizer(
            model, name=name, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )
        if name == "sgd" and device_type == "cuda":
            for group in own.param_groups:
                group["foreach"] = True  # torch's default on CUDA, not on the stand-in CPU
        return own
    groups = parameter_groups(
        model, learning_rate=LEARNING_RATE, lr_ratio=1.0, weight_decay=WEIGHT_DECAY
    )
    if name == "adamw_8bit":
        return AdamW8bit(groups)
    return AdamW(groups, foreach=name == "adamw_foreach")


class AdamW8bit(Optimizer):
    """Has the states of bitsandbytes' AdamW8bit (0.50) and updates nothing.

    Two of them to a parameter, in 8 bit: a byte an element, a float32 scale for every block, and
    two codebooks that all parameters share. Small parameters have float32 states instead. On CUDA
    the update itself allocates nothing.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self._codes: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = self._states(parameter)

    def _states(self, parameter: Tensor) -> dict[str, Tensor]:
        in_8bit = parameter.numel() >= SMALLEST_8BIT
        dtype = torch.uint8 if in_8bit else torch.float32
        states = {name: torch.zeros_like(parameter, dtype=dtype) for name in ("state1", "state2")}
        if not in_8bit:
            return states
        if not self._codes:
            self._codes = {name: torch.empty(256) for name in ("qmap1", "qmap2")}
        num_blocks = math.ceil(parameter.numel() / BLOCK)
        scales = {
            name: parameter.new_zeros(num_blocks, dtype=torch.float32)
            for name in ("absmax1", "absmax2")
        }
        return {**states, **self._codes, **scales}
