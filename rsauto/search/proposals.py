"""Which trial comes next: the order of a study, and the strategy where it is the strategy's turn.

First the search, then the defaults that its answer is compared with, AdaLoRA's rank pattern tried
with rsLoRA, and the finalists' other seeds. A function of the settled trials and the seed alone, so
that a study continued after an interruption goes on as if there had been none.
"""

from __future__ import annotations

from collections.abc import Sequence

from rsauto.config import StudyConfig
from rsauto.records import Role, TrialSpec
from rsauto.search.agenda import (
    num_begun,
    num_searched,
    num_still_reserved,
    opening_trial,
    reference_trial,
    refit_trial,
    seed_trials,
)
from rsauto.search.history import History, Known
from rsauto.search.limits import leaves_no_room
from rsauto.search.objective import Objective
from rsauto.search.outlook import outlook
from rsauto.search.sampler import Attempt, propose
from rsauto.search.space import Space
from rsauto.search.transfer import narrowed, transfer_trial

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

    None when there is none, or when it builds on trials that are still running and has to wait.
    """
    if num_begun(history) >= config.search.trials:
        return None
    if may_search(config, space, history, objective):
        found = _search_trial(config, space, history, objective, lookahead, running)
        if found is not None:
            return found
        if history.num_unsettled:
            return None  # what comes next builds on all results
    return _last_trial(config, space, history, objective)


def may_search(config: StudyConfig, space: Space, history: History, objective: Objective) -> bool:
    """Whether trials and limits leave room for more than what is reserved for the end."""
    left = config.search.trials - num_begun(history)
    reserved = num_still_reserved(space, history, objective.lower_is_better)
    return left > reserved and not no_room_for(config, space, history, objective)


def no_room_for(config: StudyConfig, space: Space, history: History, objective: Objective) -> bool:
    """Whether search.max_tokens leaves room for the last trials alone."""
    if config.search.max_tokens is None:
        return False
    reserved = num_still_reserved(space, history, objective.lower_is_better)
    return leaves_no_room(config, history, reserved)


def _search_trial(
    config: StudyConfig,
    space: Space,
    history: History,
    objective: Objective,
    lookahead: int,
    running: Sequence[int],
) -> TrialSpec | None:
    if config.search.strategy == "transfer":
        turn = transfer_trial(space, history, objective.lower_is_better, num_searched(config))
        if isinstance(turn, TrialSpec):
            return turn
        if turn == "wait" and running:
            return None
    position = len(history.trials)
    if history.must_wait(position, lookahead, running):
        return None
    known = history.known_to(position, lookahead)
    first = opening_trial(space, known.settled, known.pending)
    if first is not None:
        return first
    return _sampled(config, space, known, objective)


def _sampled(
    config: StudyConfig, space: Space, known: Known, objective: Objective
) -> TrialSpec | None:
    """The strategy's choice: it learns from settled trials, and keeps away from pending ones.

    None where no further trial is likely to improve on the best.
    """
    if config.search.strategy == "transfer":
        space = narrowed(space, known.settled, objective.lower_is_better)
    expected = outlook(config, space, known, objective)
    if expected is not None and not expected.is_worthwhile:
        return None
    if expected is not None and config.search.strategy == "transfer":
        return expected.best
    if expected is not None and config.search.strategy == "cost":
        return expected.best_for_its_time
    # Chance and the grid do not ask how good a trial was.
    learns = config.search.strategy not in ("random", "grid")
    told = objective.told if learns else lambda record: None
    attempts = [Attempt(spec, record, told(record)) for spec, record in known.settled]
    attempts += [Attempt(spec, None, None) for spec in known.pending]
    return propose(space, attempts, config)


def _last_trial(
    config: StudyConfig, space: Space, history: History, objective: Objective
) -> TrialSpec | None:
    """The defaults, AdaLoRA's pattern with rsLoRA, and the finalists' other seeds.

    The defaults need no result of the search; the others wait until nothing runs.
    """
    lower = objective.lower_is_better
    if any(t.record is None and t.spec.role in REFERENCES for t in history.trials):
        return None
    reference = reference_trial(space, history.settled, lower)
    if reference is not None:
        return reference
    if any(t.record is None and t.spec.role in ("search", "refit") for t in history.trials):
        return None
    refit = refit_trial(space, history.settled, lower)
    if refit is not None:
        return refit
    begun = {(t.spec.configuration(), t.spec.seed) for t in history.trials}
    seeds = seed_trials(space, history.settled, lower, config.search.within)
    return next((s for s in seeds if (s.configuration(), s.seed) not in begun), None)


def why_no_more(config: StudyConfig, space: Space, history: History, objective: Objective) -> str:
    """Why there is nothing left to propose, though there are trials left."""
    if no_room_for(config, space, history, objective):
        return f"search.max_tokens, {config.search.max_tokens:,}, leaves no room for more"
    if config.search.strategy == "transfer":
        space = narrowed(space, history.settled, objective.lower_is_better)
    found = outlook(config, space, Known(history.settled, ()), objective)
    if found is None or found.is_worthwhile:
        return "every point of the search space has been tried"
    return (
        f"a further trial is expected to improve the best by {found.improvement:.2%}, "
        f"less than search.min_improvement, {config.search.min_improvement:.2%}"
    )
