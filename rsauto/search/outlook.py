"""Whether to search on: what the next trial is expected to bring, and for how much time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rsauto.config import StudyConfig
from rsauto.records import TrialSpec
from rsauto.search.history import Known
from rsauto.search.objective import Objective
from rsauto.search.space import Space
from rsauto.search.surface import candidates, cost_of_ranks
from rsauto.strategies import SHORT_SEARCHES

MOST_TRIALS = 100
"""Of which anything is learnt, the best ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What the search may still find."""

    improvement: float
    """Largest that is expected of one more trial, as a share of the best objective."""
    is_worthwhile: bool
    """Whether that is as much as search.min_improvement."""
    best: TrialSpec
    """The trial with the most improvement expected."""
    best_for_its_time: TrialSpec
    """The trial with the most improvement expected for its time."""


def outlook(
    config: StudyConfig, space: Space, known: Known, objective: Objective
) -> Outlook | None:
    """The outlook after the known trials; None while they are too few to tell."""
    if config.search.strategy not in SHORT_SEARCHES:
        return None
    complete = [
        (spec, record, value)
        for spec, record in known.settled
        if spec.role == "search" and (value := objective.lower_is_better(record)) is not None
    ]
    if not complete:
        return None
    # The best ones decide what is left to gain, and a Gaussian process of more would take long.
    complete = sorted(complete, key=lambda entry: (entry[2], entry[1].number))[:MOST_TRIALS]
    trials = [(spec, value) for spec, _, value in complete]
    found = candidates(space, trials, known.pending, seed=config.training.seed)
    if not found:
        return None
    best = min(value for _, value in trials)
    improvement = found[0].improvement
    share = improvement / abs(best) if best else (math.inf if improvement else 0.0)
    base, slope = cost_of_ranks(
        [(r.rank, r.flops) for _, r, _ in complete if r.flops] or [(1, 1.0)]
    )
    chosen = max(found, key=lambda one: one.improvement / (base + slope * one.spec.rank))
    return Outlook(
        improvement=share,
        is_worthwhile=share >= config.search.min_improvement,
        best=found[0].spec,
        best_for_its_time=chosen.spec,
    )
