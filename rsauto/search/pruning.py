"""Whether to give up a trial, from the curves of others that it may know."""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.trial import TrialState, create_trial

from rsauto.config import StudyConfig
from rsauto.records import EvalPoint, TrialSpec
from rsauto.search.agenda import may_prune
from rsauto.search.history import Settled
from rsauto.search.ledger import build_pruner
from rsauto.search.objective import Objective


def gives_up(
    config: StudyConfig,
    objective: Objective,
    trial: optuna.Trial,
    spec: TrialSpec,
    curve: Sequence[EvalPoint],
    known: Settled,
) -> bool:
    """Whether the pruner ends a trial after the last point of its curve.

    The median is taken over ``known`` alone, so that it does not matter who else runs. Successive
    halving is asynchronous by nature: it looks at whatever has been reported by now.
    """
    if not may_prune(spec, curve[-1].step, known):
        return False
    if config.search.pruner == "halving":
        return trial.should_prune()
    study = optuna.create_study(
        direction="minimize" if config.search.minimize else "maximize",
        pruner=build_pruner(config.search),
    )
    for _, record in known:
        if record.outcome not in ("pruned", "failed"):
            values = {point.step: objective.value(point) for point in record.curve}
            told = objective.told(record)
            state = TrialState.COMPLETE
            study.add_trial(create_trial(state=state, value=told, intermediate_values=values))
    own = study.ask()
    for point in curve:
        own.report(objective.value(point), point.step)
    return own.should_prune()
