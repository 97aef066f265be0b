"""What a study optimises, and what Optuna is told of a trial that gave no result."""

from __future__ import annotations

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

    @classmethod
    def of(cls, search: SearchConfig, baseline: Evaluation) -> Objective:
        return cls(search.objective, search.minimize, _value(search.objective, baseline))

    def value(self, evaluation: Evaluation | EvalPoint) -> float:
        """The objective in its own direction."""
        return _value(self.name, evaluation)

    def lower_is_better(self, record: TrialRecord) -> float | None:
        """The objective of a complete trial, its sign such that lower is better."""
        if record.outcome != "complete":
            return None
        value = self.value(record.curve[-1])
        return value if self.minimize else -value

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
