"""Limits of a study beside its trials: tokens, wall time, device hours."""

from __future__ import annotations

from rsauto.config import StudyConfig
from rsauto.search.history import History, Settled


def num_tokens(settled: Settled) -> int:
    """Tokens that the study has trained on, padding not counted."""
    return sum(record.tokens or 0 for _, record in settled)


def leaves_no_room(config: StudyConfig, history: History, num_reserved: int) -> bool:
    """Whether max_tokens leaves no more than ``num_reserved`` trials need.

    A trial is taken to need what a complete trial had on average; those that run are taken to
    run to their end.
    """
    limit = config.search.max_tokens
    if limit is None:
        return False
    whole = [r.tokens for _, r in history.settled if r.outcome == "complete" and r.tokens]
    if not whole:
        return False
    needed = (num_reserved + history.num_unsettled + 1) * sum(whole) / len(whole)
    return num_tokens(history.settled) + needed > limit


def limit_reached(
    config: StudyConfig, settled: Settled, seconds: float, device_seconds: float
) -> str | None:
    """Which limit ends the study, in words; None while none does.

    ``seconds`` of this run, ``device_seconds`` of all runs and workers together.
    """
    search = config.search
    if search.max_tokens is not None and num_tokens(settled) >= search.max_tokens:
        return f"the limit of {search.max_tokens:,} trained tokens was reached"
    if search.max_seconds is not None and seconds > search.max_seconds:
        return f"the time limit of {search.max_seconds:g} seconds was reached"
    if search.max_gpu_hours is not None and device_seconds > 3600 * search.max_gpu_hours:
        return f"the limit of {search.max_gpu_hours:g} device hours was reached"
    return None
