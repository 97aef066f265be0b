"""What to try next: a pure function of the settled trials and the seed.

The sampler is made anew for every question and sees a study in memory that holds just what it may
learn from, in the space of today. So a continued study asks exactly what an undisturbed one would
have asked, repeats no point, and may have its ranks widened.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import optuna
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from rsauto.config import StudyConfig
from rsauto.records import TrialRecord, TrialSpec
from rsauto.search.ledger import DIVERGENCE, MEMORY
from rsauto.search.space import Space

NUM_DRAWS = 16
"""Draws of an already tried point before any untried one will do."""


class Attempt:
    """A settled or running trial as the sampler sees it."""

    def __init__(self, spec: TrialSpec, record: TrialRecord | None, value: float | None) -> None:
        self.spec = spec
        self.record = record
        self.value = value


def propose(space: Space, attempts: Sequence[Attempt], config: StudyConfig) -> TrialSpec | None:
    """The next search trial, or None when every point has been tried.

    Rank, layers and method decide the memory: what was refused once is not proposed again.
    """
    tried = {attempt.spec.configuration() for attempt in attempts}
    refused = {
        (a.spec.rank, a.spec.target_modules, a.spec.method)
        for a in attempts
        if a.record is not None and a.record.outcome == "infeasible"
    }

    def is_new(spec: TrialSpec) -> bool:
        return spec.configuration() not in tried and (
            (spec.rank, spec.target_modules, spec.method) not in refused
        )

    if config.search.strategy == "grid":
        return next(filter(is_new, space.grid()), None)
    known = [t for a in attempts if (t := _as_trial(space, a)) is not None]
    seeds = [_seed(config.training.seed, len(attempts), k) for k in range(NUM_DRAWS)]
    draws = (_draw(space, known, config, _sampler(config, seed)) for seed in seeds)
    found = next(filter(is_new, draws), None)
    if found is not None:
        return found
    # The sampler insists on what was tried or refused: any other point will do, by chance.
    untried = list(filter(is_new, space.points()))
    if untried:
        return random.Random(seeds[0]).choice(untried)
    draws = (_draw(space, [], config, RandomSampler(seed=seed)) for seed in seeds)
    return next(filter(is_new, draws), None)


def _draw(
    space: Space, known: Sequence[FrozenTrial], config: StudyConfig, sampler: BaseSampler
) -> TrialSpec:
    """What ``sampler`` chooses after the known trials."""
    study = optuna.create_study(
        direction="minimize" if config.search.minimize else "maximize", sampler=sampler
    )
    study.add_trials(known)
    return space.spec(study.ask(fixed_distributions=space.distributions()).params)


def _sampler(config: StudyConfig, seed: int) -> BaseSampler:
    startup = min(10, max(4, config.search.trials // 4))
    if config.search.strategy == "random":
        return RandomSampler(seed=seed)
    if config.search.strategy == "gp":
        return GPSampler(seed=seed, n_startup_trials=startup)
    return TPESampler(seed=seed, n_startup_trials=startup)


def _seed(study_seed: int, num_attempts: int, redraw: int) -> int:
    """A seed of its own for every question; 32 bits, as NumPy wants it."""
    return (study_seed * 1_000_003 + num_attempts * 10_007 + redraw * 101) % 2**32


def _as_trial(space: Space, attempt: Attempt) -> FrozenTrial | None:
    """The attempt as an Optuna trial of today's space, None where it teaches nothing about it."""
    params = space.params(attempt.spec)
    if params is None:
        return None
    distributions = space.distributions()
    record = attempt.record
    if record is None:
        return create_trial(state=TrialState.RUNNING, params=params, distributions=distributions)
    if record.outcome == "failed" or attempt.value is None:
        return None
    pruned = record.outcome == "pruned"
    violated = record.outcome in ("infeasible", "oom")
    return create_trial(
        state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
        value=attempt.value,
        params=params,
        distributions=distributions,
        intermediate_values={record.curve[-1].step: attempt.value} if pruned else {},
        constraints={
            MEMORY: 1.0 if violated else 0.0,
            DIVERGENCE: 1.0 if record.outcome == "diverged" else 0.0,
        },
    )
