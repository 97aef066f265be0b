"""Learning-rate schedules as a multiplier of the peak rate."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def rate_multiplier(schedule: Schedule, step: int, num_steps: int, num_warmup: int) -> float:
    """Multiplier in (0, 1] for optimizer step ``step``, counted from 0.

    Warm-up rises linearly and its last step is the first at the full rate. Then: constant stays
    at 1; linear falls to 0 one step after the last; cosine is half a cosine to the same point
    (transformers.get_linear_schedule_with_warmup and its siblings, moved so that no step is
    wasted at rate zero).
    """
    if step < num_warmup:
        return (step + 1) / num_warmup
    if schedule == "constant":
        return 1.0
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_steps(num_steps: int, share: float) -> int:
    """Steps of warm-up, the share of all steps rounded up."""
    return math.ceil(num_steps * share)


def evaluation_steps(num_steps: int, num_evals: int) -> tuple[int, ...]:
    """Steps (from 1) after which to evaluate: evenly spread, the last one included."""
    count = min(num_evals, num_steps)
    return tuple(sorted({round(num_steps * k / count) for k in range(1, count + 1)}))


def steps_of_share(share: float, num_steps: int) -> int:
    """A share of a run in whole steps, rounded down but for what floats lose (0.29 of 100)."""
    return int(share * num_steps + 1e-9)
