"""How much more than predicted memory must be kept free, learnt from the study's own trials."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rsauto.memory.planner import ALLOWANCE
from rsauto.records import TrialRecord


@dataclass(frozen=True, slots=True)
class Allowance:
    """A share added to every prediction, and the trial that asked for it."""

    share: float = ALLOWANCE
    reason: str | None = None
    """None for the one that every study starts with."""


def allowance_after(records: Iterable[TrialRecord], outside_bytes: int) -> Allowance:
    """The smallest that would have kept each of these trials within its memory.

    A trial that needed more than predicted asks for the excess. One that ran out of memory would
    not have been started with an allowance that fills the budget it ran under: whatever needs as
    much is not tried again under that budget. A pack that ran out says nothing about what one of
    its trials needs alone, which is what is predicted. `outside_bytes` is what CUDA keeps outside
    of the allocator.
    """
    largest = Allowance()
    for record in records:
        asked = _asked_by(record, outside_bytes)
        if asked is not None and asked.share > largest.share:
            largest = asked
    return largest


def _asked_by(record: TrialRecord, outside_bytes: int) -> Allowance | None:
    measured, predicted = record.measured_peak_bytes, record.predicted_peak_bytes
    reserved = record.predicted_reserved_bytes or predicted
    budget = record.memory_budget_bytes
    if record.outcome == "oom" and record.engine != "packed" and reserved and budget:
        share = _rounded_up((budget - outside_bytes) / reserved - 1)
        return Allowance(share, f"trial {record.number} ran out of memory")
    if record.outcome != "infeasible" and measured and predicted and measured > predicted:
        excess = measured / predicted - 1
        reason = f"trial {record.number} needed {excess:.1%} more than predicted"
        return Allowance(_rounded_up(excess), reason)
    return None


def _rounded_up(share: float) -> float:
    """To the next tenth of a per cent, so that what was measured lies below it."""
    return (int(share * 1000) + 1) / 1000
