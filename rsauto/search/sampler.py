"""What to try next: a pure function of the settled trials and the seed.

The sampler is made anew for every question and sees a study in memory that holds just what it may
learn from, in the space of today. So a continued study asks exactly what an undisturbed one would
have asked, repeats no point, and may have its ranks widened.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from rsauto.config import StudyConfig
from rsauto.records import TrialRecord, TrialSpec
from rsauto.search.attempts import point
from rsauto.search.ledger import DIVERGENCE, MEMORY
from rsauto.search.space import Space

NUM_DRAWS = 16
"""Draws of an already tried point before any untried one will do."""


class Attempt(NamedTuple):
    """A settled or running trial as the sampler sees it."""

    spec: TrialSpec
    record: TrialRecord | None
    value: float | None


def propose(space: Space, attempts: Sequence[Attempt], config: StudyConfig) -> TrialSpec | None:
    """The next search trial, or None when every point has been tried.

    Rank, layers and method decide the memory: what was refused once is not proposed again.
    """
    refused = {
        (a.spec.rank, a.spec.target_modules, a.spec.method)
        for a in attempts
        if a.record is not None and a.record.outcome == "infeasible"
    }

    def may_fit(spec: TrialSpec) -> bool:
        return (spec.rank, spec.target_modules, spec.method) not in refused

    if config.search.strategy == "grid":
        same = point if config.search.repeat == "all" else TrialSpec.configuration
        return next(filter(may_fit, _untried(space.grid(), attempts, same)), None)
    seeds = [_seed(config.training.seed, len(attempts), k) for k in range(NUM_DRAWS)]
    draws = _draws(space, attempts, config, seeds)
    found = next((spec for spec in draws if may_fit(spec) and is_new(spec, attempts)), None)
    if found is not None:
        return found
    # The sampler insists on what was tried or refused: any other point will do, by chance.
    left = list(filter(may_fit, _untried(space.points(), attempts)))
    if left:
        return random.Random(seeds[0]).choice(left)
    draws = (_draw(space, [], config, RandomSampler(seed=seed)) for seed in seeds)
    return next((spec for spec in draws if may_fit(spec) and is_new(spec, attempts)), None)


def is_new(spec: TrialSpec, attempts: Sequence[Attempt]) -> bool:
    """Whether no attempt has this configuration.

    Most draws are new, and most differ in the learning rate already: a set of all configurations
    would take longer to make than this takes to look.
    """
    rate, configuration = spec.learning_rate, spec.configuration()
    return not any(
        a.spec.learning_rate == rate and a.spec.configuration() == configuration for a in attempts
    )


def _untried(
    points: Iterable[TrialSpec],
    attempts: Sequence[Attempt],
    same: Callable[[TrialSpec], object] = TrialSpec.configuration,
) -> Iterator[TrialSpec]:
    """Points of which no attempt is ``same``."""
    tried = {same(attempt.spec) for attempt in attempts}
    return (spec for spec in points if same(spec) not in tried)


def _draws(
    space: Space, attempts: Sequence[Attempt], config: StudyConfig, seeds: Sequence[int]
) -> Iterator[TrialSpec]:
    """What the strategy chooses, with one seed after another."""
    known: list[FrozenTrial] = []
    if config.search.strategy != "random":  # to which it is all the same
        distributions = space.distributions()
        found = (_as_trial(space, attempt, distributions) for attempt in attempts)
        known = [trial for trial in found if trial is not None]
    for seed in seeds:
        yield _draw(space, known, config, _sampler(config, seed))


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


def _as_trial(
    space: Space, attempt: Attempt, distributions: dict[str, BaseDistribution]
) -> FrozenTrial | None:
    """The attempt as an Optuna trial of today's space, None where it teaches nothing about it."""
    params = space.params(attempt.spec)
    if params is None:
        return None
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
