"""Whether a trial goes on, from the curves of others that it may know.

Successive halving (Jamieson and Talwalkar, arXiv:1502.07943): at the k-th rung, from 0, the best
n / 2^(k + 1) of the n trials that began go on. A cohort waits at a rung for all of its trials, so
the decision is that of the algorithm; a trial that runs alone is compared with those that were
there before it, as in asynchronous halving (Li et al., arXiv:1810.05934).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.pruners import MedianPruner
from optuna.trial import TrialState, create_trial

from rsauto.config import StudyConfig
from rsauto.records import ADALORA_METHODS, EvalPoint, TrialRecord, TrialSpec
from rsauto.search.agenda import may_prune
from rsauto.search.history import Settled
from rsauto.search.objective import Objective
from rsauto.training.schedule import evaluation_steps

FIRST_RUNG = 1 / 8
"""Share of the steps before which no trial is compared."""

SLOW_OCTAVES = 2.0
"""How far below the leader's a learning rate may lie and still be a slow starter."""

HARM = 1.2
"""Times the untouched model's loss: from its second evaluation on a trial above it has diverged."""

PATIENCE = 2
"""Evaluations without improvement after which a trial that others have overtaken is given up."""


PROGRESS = 0.05
"""Share of the way from the untouched model to a perfect one (a loss of 0, a metric of 1) that the
leader of a rung must have gone. Before, trials differ by how little they have disturbed the model,
and low rates look best."""


@dataclass(frozen=True, slots=True)
class Rival:
    """A trial at a rung."""

    learning_rate: float
    value: float
    """Lower is better."""


def rungs(spec: TrialSpec) -> list[int]:
    """Steps at which trials are compared: evaluations, each at least twice as late as the last."""
    found: list[int] = []
    for step in evaluation_steps(spec.steps, spec.num_evals):
        first = spec.steps * FIRST_RUNG
        if step < spec.steps and step >= (2 * found[-1] if found else first):
            found.append(step)
    return found


def goes_on(own: Rival, others: Sequence[Rival], rung: int, num_rungs: int, num_begun: int) -> bool:
    """Whether a trial is among those that a rung, from 0, lets through.

    ``others`` are at the same rung, ``num_begun`` of all came to the first. Two go on until the
    last rung: early on, a learning rate that is too high looks best. For the same reason trials
    with a lower rate than the leader's, by SLOW_OCTAVES at most, pass the first rung.
    """
    least = 2 if rung + 1 < num_rungs else 1
    quota = max(least, math.ceil(num_begun / 2 ** (rung + 1)))
    if sum(other.value < own.value for other in others) < quota:
        return True
    leader = min([own, *others], key=lambda rival: rival.value)
    return rung == 0 and 0 < math.log2(leader.learning_rate / own.learning_rate) <= SLOW_OCTAVES


def is_telling(objective: Objective, rivals: Sequence[Rival]) -> bool:
    """Whether the trials at a rung can be compared: the best of them has learnt something."""
    untouched, perfect = objective.untouched, 0.0 if objective.minimize else 1.0
    best = min((rival.value for rival in rivals), default=math.inf)
    gain = untouched - best if objective.minimize else -best - untouched
    return gain > 0 and gain >= PROGRESS * abs(perfect - untouched)


def gives_up(
    config: StudyConfig,
    objective: Objective,
    spec: TrialSpec,
    curve: Sequence[EvalPoint],
    known: Settled,
) -> bool:
    """Whether a trial ends after the last point of its curve.

    Decided from ``known`` alone, so that it does not matter who else runs.
    """
    pruner = config.search.chosen_pruner
    if pruner == "none" or not _may_end(spec, curve[-1].step, known):
        return False
    mates = comparable(spec, known)
    if pruner == "median":
        return _is_below_median(config, objective, curve, mates)
    if is_stagnant(objective, curve, mates):
        return True
    steps = rungs(spec)
    if curve[-1].step not in steps:
        return False
    rung = steps.index(curve[-1].step)
    own = Rival(spec.learning_rate, objective.lower(curve[-1]))
    others = rivals(objective, mates, steps[rung])
    if not is_telling(objective, [own, *others]):
        return False
    num_begun = 1 + len(rivals(objective, mates, steps[0]))
    return not goes_on(own, others, rung, len(steps), num_begun)


def is_harmful(objective: Objective, curve: Sequence[EvalPoint]) -> bool:
    """Whether a trial has left the model worse than it was, and is no beginner any more."""
    return len(curve) > 1 and curve[-1].eval_loss > HARM * objective.untouched_loss


def is_stagnant(
    objective: Objective, curve: Sequence[EvalPoint], mates: Sequence[TrialRecord]
) -> bool:
    """Whether the last PATIENCE evaluations brought nothing, while another is ahead."""
    values = [objective.lower(point) for point in curve]
    if len(values) <= PATIENCE or min(values[-PATIENCE:]) < min(values[:-PATIENCE]):
        return False
    others = rivals(objective, mates, curve[-1].step)
    ahead = [other for other in others if other.value < values[-1]]
    return is_telling(objective, ahead)


def comparable(spec: TrialSpec, known: Settled) -> list[TrialRecord]:
    """Records that a trial is compared with: of its cohort, or else of all search trials.

    AdaLoRA's curves are those of more rank than is kept, so they are compared with their kind.
    """
    return [
        record
        for other, record in known
        if record.outcome not in ("failed", "infeasible")
        and other.role == "search"
        and (spec.cohort is None or cohort_of(other) == cohort_of(spec))
        and (other.method in ADALORA_METHODS) == (spec.method in ADALORA_METHODS)
    ]


def cohort_of(spec: TrialSpec) -> tuple[int, int] | None:
    """What tells one cohort from another. A summit begins anew where its rank did not fit."""
    return None if spec.cohort is None else (spec.cohort, spec.rank)


def rivals(objective: Objective, records: Sequence[TrialRecord], step: int) -> list[Rival]:
    """Those of the records that have come to ``step``."""
    return [
        Rival(record.learning_rate, objective.lower(point))
        for record in records
        for point in record.curve
        if point.step == step
    ]


def _may_end(spec: TrialSpec, step: int, known: Settled) -> bool:
    if spec.role == "search" and spec.cohort is not None:  # one of a cohort always goes on
        return step < spec.steps
    return may_prune(spec, step, known)


def _is_below_median(
    config: StudyConfig,
    objective: Objective,
    curve: Sequence[EvalPoint],
    mates: Sequence[TrialRecord],
) -> bool:
    """Optuna's median rule over trials that went on to their end."""
    study = optuna.create_study(
        direction="minimize" if config.search.minimize else "maximize",
        pruner=MedianPruner(n_startup_trials=5, n_warmup_steps=1),
    )
    for record in mates:
        if record.outcome != "pruned":
            values = {point.step: objective.value(point) for point in record.curve}
            told = objective.told(record)
            state = TrialState.COMPLETE
            study.add_trial(create_trial(state=state, value=told, intermediate_values=values))
    own = study.ask()
    for point in curve:
        own.report(objective.value(point), point.step)
    return own.should_prune()
