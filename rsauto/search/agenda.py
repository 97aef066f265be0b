"""The fixed parts of a study: one trial of every rank and method where the strategy has none of its
own, the defaults, AdaLoRA's rank pattern tried with rsLoRA, the finalists' seeds.

Everything here is decided from the records alone, so a study continued after an interruption goes
on exactly where it was.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from rsauto.choices import RateRange
from rsauto.config import SearchConfig, StudyConfig
from rsauto.records import ADALORA_METHODS, SETTLED_OUTCOMES, Method, TrialRecord, TrialSpec
from rsauto.search.history import History, Settled
from rsauto.search.space import Space

Objective = Callable[[TrialRecord], float | None]
_Entry = tuple[float, TrialSpec, TrialRecord]

MAX_TUNING_TRIALS = 6
"""Trials spent on the default adapter's own learning rate, at most."""

MAX_FINALISTS = 3
"""Configurations compared over several seeds."""


def num_settled(settled: Settled) -> int:
    """Trials that count: refusals by the planner are free."""
    return sum(record.outcome in SETTLED_OUTCOMES for _, record in settled)


def num_begun(history: History) -> int:
    """Trials that count or will, those that run or wait included."""
    return history.num_begun


def reference_trial(space: Space, settled: Settled, objective: Objective) -> TrialSpec | None:
    """The next trial of the defaults, None when they are done.

    First PEFT's and Trainer's defaults as they are, then the same adapter at other learning rates.
    """
    if not space.config.search.baseline:
        return None
    default = next((record for _, record in settled if record.role == "default"), None)
    if default is None:
        return space.default()
    if default.outcome == "infeasible":
        return None
    search = space.config.search
    limit = num_tuning(search)
    tried = {
        spec.learning_rate: objective(record)
        for spec, record in settled
        if record.role == "default_tuned" and record.seed == space.config.training.seed
    }
    if len(tried) >= limit:
        return None
    chosen = search.learning_rate
    # A list is meant for the adapters that are searched; the default has its own best rate.
    band = (
        (chosen.low, chosen.high) if isinstance(chosen, RateRange) else (min(chosen), max(chosen))
    )
    rate = next_rate(tried, *band)
    return None if rate is None else space.default_tuned(rate)


def num_tuning(search: SearchConfig) -> int:
    """Trials for the default's own learning rate: a quarter of a study, one in a tiny one."""
    return min(MAX_TUNING_TRIALS, max(search.trials // 4, 1 if search.trials > 2 else 0))


def next_rate(tried: dict[float, float | None], low: float, high: float) -> float | None:
    """Brackets the best learning rate by factors of 4, then looks at factors of 2 beside it.

    ``tried`` maps a rate to its objective, lower is better, None where it failed or diverged. The
    start is the geometric middle of [low, high]; the walk may leave the range, for the range is
    meant for another adapter. Returns None when both neighbours of the best have been tried.
    """
    if not tried:
        return _rounded(math.sqrt(low * high))
    best = min(tried, key=lambda rate: _or_infinity(tried[rate]))
    for factor in (4.0, 0.25, 2.0, 0.5):
        rate = _rounded(best * factor)
        if not any(math.isclose(rate, other, rel_tol=1e-2) for other in tried):
            return rate
    return None


def opening_trial(
    space: Space, settled: Settled, pending: Sequence[TrialSpec] = ()
) -> TrialSpec | None:
    """The next trial of the opening: every rank with every method, in the middle of the space.

    So the report can say of every rank what it costs and buys, and the sampler starts from an even
    spread. Only the first method, or nothing, where it would take more than half of the search.
    """
    search = space.config.search
    most = num_searched(space.config) // 2
    methods = search.method
    if len(space.ranks) * len(methods) > most:
        methods = methods[:1]
    if search.strategy not in ("tpe", "gp", "cost") or len(space.ranks) > most:
        return None
    begun = [*(spec for spec, _ in settled), *pending]
    tried = {(spec.rank, spec.method) for spec in begun if spec.role == "search"}
    for rank, method in itertools.product(space.ranks, methods):
        if (rank, method) not in tried:
            return space.middle(rank, method)
    return None


def opening(space: Space) -> list[TrialSpec]:
    """All trials of the opening; where there is none, the middle of the space at every rank."""
    found: list[TrialSpec] = []
    while (spec := opening_trial(space, (), found)) is not None:
        found.append(spec)
    return found or [space.middle(rank) for rank in space.ranks]


def refit_trial(space: Space, settled: Settled, objective: Objective) -> TrialSpec | None:
    """rsLoRA with the rank pattern of the best AdaLoRA trial; None where it was done, or not asked.

    Whether the pattern is worth anything without the allocation that found it. It has the settings
    of the best rsLoRA trial, its learning rate moved to this rank by the law of that rule, or,
    where there is none, those of the middle of the space.
    """
    if not space.config.allocates() or not space.config.adalora.refit:
        return None
    found = _best(settled, objective, ADALORA_METHODS)
    if found is None:
        return None
    spec, record = found
    pattern = tuple((n, r) for n, r in (record.rank_pattern or {}).items() if r > 0)
    if not pattern or any(other.rank_pattern == pattern for other, _ in settled):
        return None
    uniform = _best(settled, objective, ("rslora",))
    like = space.middle(spec.rank, "rslora") if uniform is None else uniform[0]
    return replace(
        _again(like),
        role="refit",
        rank=spec.rank,
        target_modules=spec.target_modules,
        learning_rate=space.moved_rate(like, spec.rank),
        rank_pattern=pattern,
    )


def _best(
    settled: Settled, objective: Objective, methods: tuple[Method, ...]
) -> tuple[TrialSpec, TrialRecord] | None:
    """The best search trial of some methods."""
    complete = [
        (value, record.number, spec, record)
        for spec, record in settled
        if record.role == "search"
        and spec.method in methods
        and (value := objective(record)) is not None
    ]
    return min(complete, key=lambda entry: entry[:2])[2:] if complete else None


def may_prune(spec: TrialSpec, step: int, settled: Settled) -> bool:
    """Search trials before their end, but never the only trial of its rank that could finish.

    AdaLoRA trials only once their ranks are fixed: until then they train more than they keep, and
    their curves are not those of other methods.
    """
    if spec.allocation is not None and step < spec.steps - spec.allocation.tfinal:
        return False
    return (
        spec.role == "search"
        and step < spec.steps
        and any(
            (r.rank, r.method) == (spec.rank, spec.method)
            and r.role == "search"
            and r.outcome == "complete"
            for _, r in settled
        )
    )


def num_reserved(config: StudyConfig) -> int:
    """Trials kept back for the defaults, AdaLoRA's pattern and the finalists' other seeds."""
    return _num_references(config.search) + _num_finals(config)


def num_still_reserved(space: Space, history: History, objective: Objective) -> int:
    """Those of them that are still to come; what the defaults did not need is searched with."""
    begun = [trial.spec.role for trial in history.trials]
    finals = _num_finals(space.config) - sum(role in ("refit", "seed") for role in begun)
    defaults = sum(role in ("default", "default_tuned") for role in begun)
    if defaults and reference_trial(space, history.settled, objective) is None:
        return max(0, finals)
    return max(0, finals) + max(0, _num_references(space.config.search) - defaults)


def _num_references(search: SearchConfig) -> int:
    return 1 + num_tuning(search) if search.baseline else 0


def _num_finals(config: StudyConfig) -> int:
    refits = 1 if config.allocates() and config.adalora.refit else 0
    return refits + _most_finalists(config) * extra_seeds(config.search)


def _most_finalists(config: StudyConfig) -> int:
    """One for every combination of what is searched beside the learning rate, or a few in all."""
    if config.search.repeat != "tuned":
        return MAX_FINALISTS
    return config.num_combinations + config.search.baseline


def extra_seeds(search: SearchConfig) -> int:
    """Seeds on which each finalist is run again: short studies repeat fewer, one for ten trials.

    None where the search itself runs everything on every seed.
    """
    if search.repeat != "finalists":
        return 0 if search.repeat == "all" else search.seeds - 1
    return min(search.seeds - 1, search.trials // 10)


def num_searched(config: StudyConfig) -> int:
    """Trials that are left for the search."""
    return config.search.trials - num_reserved(config)


def seed_trials(
    space: Space, settled: Settled, objective: Objective, within: float
) -> list[TrialSpec]:
    """Trials still missing to compare the finalists over seeds, in the order they should run.

    Breadth first, so that an interrupted study has compared all of them on as many seeds as it
    could.
    """
    extra = extra_seeds(space.config.search)
    first = space.config.training.seed
    done = {(spec.configuration(), spec.seed) for spec, _ in settled}
    return [
        replace(_again(spec), role="seed", seed=first + k)
        for k in range(1, extra + 1)
        for spec in finalists(space, settled, objective, within)
        if (spec.configuration(), first + k) not in done
    ]


def finalists(
    space: Space, settled: Settled, objective: Objective, within: float
) -> list[TrialSpec]:
    """Configurations that are compared over seeds, by their result on the search's own seed.

    The tuned default, the best one, the cheapest that is close to the best, then the next best: at
    most MAX_FINALISTS. Or, with ``repeat: tuned``, each combination at its own best learning rate.
    """
    first = space.config.training.seed
    complete = [
        (value, spec, record)
        for spec, record in settled
        if record.outcome == "complete"
        and spec.seed == first
        and spec.rank in (*space.ranks, 8)
        and (value := objective(record)) is not None
    ]
    tuned = [entry for entry in complete if entry[2].role in ("default", "default_tuned")]
    searched = [entry for entry in complete if entry[2].role in ("search", "refit")]
    groups = [tuned, searched]
    if space.config.search.repeat == "tuned":
        groups = [tuned, *_by_all_but_rate(searched)]
    chosen = [min(group, key=lambda entry: entry[0]) for group in groups if group]
    if space.config.search.repeat == "tuned":
        return [spec for _, spec, _ in chosen]
    if searched:
        best = min(value for value, _, _ in searched)
        close = [entry for entry in searched if entry[0] <= best + within * abs(best)]
        chosen.append(min(close, key=lambda entry: (_cost(entry[2]), entry[0])))
    chosen += sorted(searched, key=lambda entry: entry[0])
    unique = {spec.configuration(): spec for _, spec, _ in chosen}
    return list(unique.values())[:MAX_FINALISTS]


def _by_all_but_rate(entries: Sequence[_Entry]) -> Iterable[list[_Entry]]:
    """The trials of each combination of settings, at all of its learning rates."""
    groups: dict[object, list[_Entry]] = defaultdict(list)
    for entry in entries:
        groups[replace(entry[1], learning_rate=0.0).configuration()].append(entry)
    return groups.values()


def _again(spec: TrialSpec) -> TrialSpec:
    """The settings of a trial, for one of its own: what only that run had is left out."""
    return replace(spec, cohort=None, cohort_size=None, micro_batch_size=None, retry_of=None)


def _cost(record: TrialRecord) -> float:
    return float(record.smallest_budget_bytes or record.predicted_peak_bytes or math.inf)


def _or_infinity(value: float | None) -> float:
    return math.inf if value is None else value


def _rounded(rate: float) -> float:
    return float(f"{rate:.4g}")
