"""Which trial comes next: the order of the agenda, and the sampler where it is the sampler's turn.

A function of the settled trials and the seed alone, so that a study continued after an interruption
goes on as if there had been none.
"""

from __future__ import annotations

from collections.abc import Sequence

from rsauto.config import StudyConfig
from rsauto.records import Role, TrialSpec
from rsauto.search.agenda import (
    num_begun,
    num_reserved,
    num_tuning,
    opening_trial,
    reference_trial,
    refit_trial,
    seed_trials,
)
from rsauto.search.history import History, Known
from rsauto.search.objective import Objective
from rsauto.search.sampler import Attempt, propose
from rsauto.search.space import Space

REFERENCES: tuple[Role, ...] = ("default", "default_tuned")
"""Trials that come one after another, each knowing how the one before it ended."""


def next_spec(
    config: StudyConfig,
    space: Space,
    history: History,
    objective: Objective,
    *,
    lookahead: int,
    running: Sequence[int],
) -> TrialSpec | None:
    """The next new trial, see `agenda`.

    None when there is none, or when it builds on one of the ``running`` numbers and has to wait.
    """
    position = len(history.trials)
    if history.must_wait(position, lookahead, running):
        return None
    lower = objective.lower_is_better
    reference = reference_trial(space, history.settled, lower)
    if reference is not None and not _is_running(history, REFERENCES):
        return reference
    known = history.known_to(position, lookahead)
    first = opening_trial(space, known.settled, known.pending)
    if first is not None:
        return first
    num_kept = num_reserved(config)
    if reference is not None:  # one of them runs elsewhere, and others may follow it
        begun = sum(trial.spec.role == "default_tuned" for trial in history.trials)
        num_kept += max(0, num_tuning(config.search) - begun)
    are_reserved = config.search.trials - num_begun(history) <= num_kept
    if are_reserved and running:
        return None  # the last ones build on the results of all others
    last = [] if running else _last_trials(config, space, history, objective)
    if last and are_reserved:
        return last[0]
    return _sampled(config, space, known, objective) or (last[0] if last else None)


def _is_running(history: History, roles: Sequence[Role]) -> bool:
    return any(trial.record is None and trial.spec.role in roles for trial in history.trials)


def _sampled(
    config: StudyConfig, space: Space, known: Known, objective: Objective
) -> TrialSpec | None:
    """The sampler's choice: it learns from settled trials, and keeps away from pending ones."""
    attempts = [Attempt(spec, record, objective.told(record)) for spec, record in known.settled]
    attempts += [Attempt(spec, None, None) for spec in known.pending]
    return propose(space, attempts, config)


def _last_trials(
    config: StudyConfig, space: Space, history: History, objective: Objective
) -> list[TrialSpec]:
    """AdaLoRA's pattern with rsLoRA, and the finalists' other seeds."""
    lower = objective.lower_is_better
    refit = refit_trial(space, history.settled, lower)
    seeds = seed_trials(space, history.settled, lower, config.search.within)
    return [refit, *seeds] if refit is not None else seeds
