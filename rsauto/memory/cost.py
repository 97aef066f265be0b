"""What a study over a plan's ranks would take: tokens, operations, hours and money."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rsauto.errors import InputError

if TYPE_CHECKING:
    from rsauto.memory.kinds import Prediction
    from rsauto.memory.plan import Plan

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyCost:
    """Of a whole study, its trials spread evenly over the ranks that fit."""

    trials: int
    tokens: int
    """Trained on, were every sequence as long as the longest; evaluation comes on top."""
    flops: float
    """Of forward and backward over these tokens; attention's own products are left out."""
    seconds: float | None
    """At the stated rate."""
    price: float | None
    """At the stated price, in its own currency."""


def study_cost(
    plan: Plan,
    *,
    trials: int,
    steps: int,
    flops_per_second: float | None = None,
    price_per_hour: float | None = None,
) -> StudyCost:
    """What `trials` trials of `steps` optimizer steps take at most.

    Raises InputError for a price without a rate.
    """
    if price_per_hour is not None and flops_per_second is None:
        raise InputError("price_per_hour: give flops_per_second as well, such as 150T.")
    rows = [row for row in plan.ranks if row.fits is not False] or list(plan.ranks)
    tokens = trials * steps * plan.batch_size * plan.max_length
    checkpointed = plan.planner.kind.gradient_checkpointing
    per_token = [_flops_per_token(row.prediction, checkpointed) for row in rows]
    flops = tokens * sum(per_token) / len(rows)
    seconds = None if flops_per_second is None else flops / flops_per_second
    return StudyCost(
        trials=trials,
        tokens=tokens,
        flops=flops,
        seconds=seconds,
        price=None
        if seconds is None or price_per_hour is None
        else seconds / 3600 * price_per_hour,
    )


def _flops_per_token(prediction: Prediction, gradient_checkpointing: bool) -> float:
    """4 F + 6 T for F frozen and T trained weights; recomputing the forward pass adds 2 F + 2 T."""
    flops, trained = prediction.flops_per_token, prediction.num_trainable_params
    frozen = (flops - 6 * trained) / 4
    return flops + (2 * frozen + 2 * trained if gradient_checkpointing else 0.0)


def parse_rate(text: str) -> float:
    """Operations a second from '150T', '150 TFLOPS' or '1.5e14'. Raises InputError."""
    match = re.fullmatch(
        r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgtp]?)(?:flops?(?:/s)?)?\s*", text, re.IGNORECASE
    )
    try:
        rate = float(match[1]) * _PREFIXES[match[2].lower()] if match else 0.0
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1e21:
        raise InputError(
            f"flops_per_second: {text!r} is no rate. Give what the GPU reaches in training, such "
            "as 150T; about 40 % of the peak in its data sheet."
        )
    return rate
