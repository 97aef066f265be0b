"""What a study optimises, and what Optuna is told of a trial that gave no result."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rsauto.config import SearchConfig
from rsauto.records import EvalPoint, TrialRecord
from rsauto.search.ledger import DIVERGENCE, MEMORY
from rsauto.training.evaluate import Evaluation


@dataclass(frozen=True)
class Objective:
    """The objective of a study, eval_loss or a metric."""

    name: str
    minimize: bool
    untouched: float
    """Of the base model without an adapter."""
    untouched_loss: float = math.inf
    """Its eval_loss."""

    @classmethod
    def of(cls, search: SearchConfig, baseline: Evaluation) -> Objective:
        untouched = _value(search.objective, baseline)
        return cls(search.objective, search.minimize, untouched, baseline.eval_loss)

    def value(self, evaluation: Evaluation | EvalPoint) -> float:
        """The objective in its own direction."""
        return _value(self.name, evaluation)

    def lower(self, point: EvalPoint) -> float:
        """The objective at a point of a curve, its sign such that lower is better."""
        value = self.value(point)
        return value if self.minimize else -value

    def lower_is_better(self, record: TrialRecord) -> float | None:
        """The objective of a complete trial, its sign such that lower is better."""
        if record.outcome != "complete":
            return None
        return self.lower(record.curve[-1])

    def told(self, record: TrialRecord) -> float | None:
        """The value an Optuna trial gets; None for a failed one, which says nothing.

        A trial without a result gets the untouched model's: finite, honest, and with a violated
        constraint beside it what every sampler learns from.
        """
        if record.outcome == "failed":
            return None
        if record.outcome in ("complete", "pruned"):
            return self.value(record.curve[-1])
        return self.untouched


def constraints(record: TrialRecord) -> dict[str, float]:
    """Named constraints, violated above zero: memory relative to the budget, and divergence."""
    budget = record.memory_budget_bytes
    assert budget is not None and record.predicted_peak_bytes is not None
    used = max(record.predicted_peak_bytes, record.measured_peak_bytes or 0)
    over = (used - budget) / budget
    if record.outcome in ("infeasible", "oom"):
        over = max(over, 0.01)
    return {MEMORY: over, DIVERGENCE: 1.0 if record.outcome == "diverged" else 0.0}


def _value(name: str, evaluation: Evaluation | EvalPoint) -> float:
    return evaluation.eval_loss if name == "eval_loss" else evaluation.metrics[name]
