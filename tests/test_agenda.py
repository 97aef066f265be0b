"""The order of a study on synthetic outcomes: search, defaults, tuned defaults, seeds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage

from rsauto.config import StudyConfig
from rsauto.records import TrialRecord, TrialSpec
from rsauto.search.agenda import (
    MAX_FINALISTS,
    MAX_TUNING_TRIALS,
    finalists,
    next_rate,
    num_reserved,
    num_settled,
    num_tuning,
    opening_trial,
    reference_trial,
    seed_trials,
)
from rsauto.search.books import Books
from rsauto.search.ledger import Ledger
from rsauto.search.objective import Objective
from rsauto.search.packs import Entrant
from rsauto.search.space import Space
from rsauto.search.work import Work
from rsauto.study_file import validate

Records = Callable[..., TrialRecord]
Outcome = Callable[[TrialSpec, int], str]


def space_of(**search: Any) -> Space:
    config: StudyConfig = validate({"training": {"steps": 10}, "search": search})
    return Space(config, config.search.ranks, steps=10, max_length=512)


def loss_of(record: TrialRecord) -> float | None:
    return record.eval_loss if record.outcome == "complete" else None


def bowl(spec: TrialSpec) -> float:
    """Best at rank 32 and a learning rate of 1e-3; seeds differ a little."""
    return (
        1.0
        + 0.1 * (math.log2(spec.rank) - 5) ** 2
        + math.log10(spec.learning_rate / 1e-3) ** 2
        + 1e-3 * spec.seed
    )


class SyntheticRun(Work):
    """The driver's own decisions, with outcomes made up instead of trained."""

    def __init__(self, space: Space, record_of: Records, outcome: Outcome) -> None:
        ledger = Ledger.open(InMemoryStorage(), space.config)
        setup = SimpleNamespace(
            config=space.config,
            space=space,
            memory_budget_bytes=2**30,
            smallest_prediction=lambda spec: spec.rank,
            planner=SimpleNamespace(needed_bytes=lambda rank: 2**20 * rank),
        )
        books = Books(setup, None, ledger, None)  # type: ignore[arg-type]
        books.objective = Objective("eval_loss", minimize=True, untouched=9.0)
        super().__init__(books, None)  # type: ignore[arg-type]
        self.record_of, self.outcome = record_of, outcome

    def run(self) -> list[tuple[TrialSpec, TrialRecord]]:
        while num_settled(self.ledger.settled()) < self.config.search.trials:
            begun = self._begin(self._propose)
            if begun is None:
                break
            assert begun.trial.number < 200, "the study does not end"
            self.end(begun)
        return self.ledger.settled()

    def end(self, begun: Entrant) -> None:
        number = begun.trial.number
        outcome = self.outcome(begun.spec, number)
        self.books.settle(
            begun.trial, self.record_of(begun.spec, number, bowl(begun.spec), outcome)
        )


def always_complete(spec: TrialSpec, number: int) -> str:
    return "complete"


def test_a_study_goes_from_the_search_over_the_default_and_its_tuning_to_seeds(
    record_of: Records,
) -> None:
    space = space_of(trials=30, min_improvement=0)
    settled = SyntheticRun(space, record_of, always_complete).run()
    roles = [spec.role for spec, _ in settled]
    assert [record.role for _, record in settled] == roles
    order = ["search", "default", "default_tuned", "seed"]
    assert list(dict.fromkeys(roles)) == order
    # What the defaults did not need is searched with, after them.
    tuned = max(n for n, role in enumerate(roles) if role == "default_tuned")
    assert roles[: tuned + 1] == sorted(roles[: tuned + 1], key=order.index)
    assert roles[tuned + 1 :] == sorted(roles[tuned + 1 :], key=order.index)
    counts = Counter(roles)
    assert counts["default"] == 1
    assert 3 <= counts["default_tuned"] <= MAX_TUNING_TRIALS
    # Every finalist on two more seeds.
    seeds = [(spec.configuration(), spec.seed) for spec, _ in settled if spec.role == "seed"]
    assert len(seeds) == len(set(seeds)) == 2 * MAX_FINALISTS
    assert {seed for _, seed in seeds} == {1, 2}
    assert len({configuration for configuration, _ in seeds}) == MAX_FINALISTS


@pytest.mark.parametrize("strategy", ["random", "tpe", "transfer", "cost"])
@pytest.mark.sample(2)
def test_a_study_ends_with_exactly_the_trials_asked_for(strategy: str, record_of: Records) -> None:
    def mixed(spec: TrialSpec, number: int) -> str:
        return ("complete", "pruned", "complete", "failed", "oom", "diverged")[number % 6]

    sizes = range(1, 41) if strategy == "random" else (1, 7, 24, 40)
    for trials in sizes:
        for outcome in (always_complete, mixed):
            space = space_of(trials=trials, strategy=strategy, min_improvement=0)
            settled = SyntheticRun(space, record_of, outcome).run()
            assert len(settled) == num_settled(settled) == trials


def test_refusals_by_the_planner_cost_no_trial(record_of: Records) -> None:
    def large_ranks_do_not_fit(spec: TrialSpec, number: int) -> str:
        return "infeasible" if spec.rank > 16 else "complete"

    space = space_of(trials=20, strategy="random")
    settled = SyntheticRun(space, record_of, large_ranks_do_not_fit).run()
    assert num_settled(settled) == 20 < len(settled)


def test_a_default_that_does_not_fit_is_told_once_and_not_for_ever(record_of: Records) -> None:
    def rank_8_does_not_fit(spec: TrialSpec, number: int) -> str:
        return "infeasible" if spec.rank == 8 else "complete"

    settled = SyntheticRun(
        space_of(trials=24, rank=[2, 4], min_improvement=0), record_of, rank_8_does_not_fit
    ).run()  # fmt: skip
    assert num_settled(settled) == 24
    assert sum(spec.role == "default" for spec, _ in settled) == 1


def test_a_finite_space_ends_with_its_last_point_and_its_seeds(record_of: Records) -> None:
    space = space_of(
        trials=90, rank=[4, 8], alpha=[16], learning_rate=[1e-3, 3e-3], min_improvement=0
    )
    settled = SyntheticRun(space, record_of, always_complete).run()
    roles = Counter(spec.role for spec, _ in settled)
    assert roles["search"] == 4
    assert roles["default_tuned"] == 6
    assert roles["seed"] >= 4


def test_a_resumed_study_goes_on_where_it_was(record_of: Records) -> None:
    whole = SyntheticRun(space_of(trials=26, strategy="random"), record_of, always_complete)
    expected = [spec for spec, _ in whole.run()]
    stopped = SyntheticRun(space_of(trials=26, strategy="random"), record_of, always_complete)
    stopped.outcome = stop_at(13)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    number = max(r.number for r in stopped.ledger.records())
    assert number == 12
    assert stopped.ledger.recover_orphans() == 1
    stopped.outcome = always_complete
    again = [(s.configuration(), s.seed, s.role) for s, _ in stopped.run()]
    assert again == [(s.configuration(), s.seed, s.role) for s in expected]


def stop_at(last: int) -> Outcome:
    def outcome(spec: TrialSpec, number: int) -> str:
        if number == last:
            raise KeyboardInterrupt
        return "complete"

    return outcome


# ------------------------------------------------------------ the default's own learning rate


def walk(optimum: float, low: float, high: float, limit: int) -> tuple[float, int]:
    """The best rate found on a loss that is a parabola in log rate, and how many were tried."""
    tried: dict[float, float | None] = {}
    while len(tried) < limit:
        rate = next_rate(tried, low, high)
        if rate is None:
            break
        assert rate not in tried
        tried[rate] = math.log(rate / optimum) ** 2
    return min(tried, key=lambda rate: tried[rate] or 0.0), len(tried)


@given(log10_optimum=st.floats(-8, 1))
def test_the_walk_ends_within_a_factor_of_root_two_of_the_optimum(log10_optimum: float) -> None:
    optimum = 10**log10_optimum
    found, num_tried = walk(optimum, 1e-5, 1e-2, limit=40)
    assert num_tried < 40
    assert abs(math.log2(found / optimum)) < 0.52


@given(octaves=st.floats(-4, 4))
def test_six_trials_find_an_optimum_within_a_factor_of_sixteen(octaves: float) -> None:
    optimum = math.sqrt(1e-5 * 1e-2) * 2**octaves
    found, _ = walk(optimum, 1e-5, 1e-2, limit=MAX_TUNING_TRIALS)
    assert abs(math.log2(found / optimum)) <= 1.01


def test_a_rate_that_diverged_is_walked_away_from() -> None:
    tried: dict[float, float | None] = {1e-3: None}
    for _ in range(8):
        rate = next_rate(tried, 1e-4, 1e-2)
        if rate is None:
            break
        tried[rate] = None if rate > 3e-4 else math.log(rate / 1e-4) ** 2
    best = min((v, r) for r, v in tried.items() if v is not None)[1]
    assert 0.7e-4 < best < 1.42e-4


def test_the_first_rate_is_the_geometric_middle() -> None:
    assert next_rate({}, 1e-5, 1e-3) == 1e-4


def test_listed_rates_only_say_where_the_default_begins(record_of: Records) -> None:
    """They are meant for the searched adapters; the default is tuned to its own best rate."""
    space = space_of(trials=40, learning_rate=[1e-2, 1e-4, 1e-3])
    settled: list[tuple[TrialSpec, TrialRecord]] = []
    while (spec := reference_trial(space, settled, loss_of)) is not None:
        loss = math.log(spec.learning_rate / 4e-3) ** 2
        settled.append((spec, record_of(spec, len(settled), loss)))
    rates = [spec.learning_rate for spec, _ in settled]
    assert rates[:2] == [5e-5, 1e-3]
    assert 4e-3 in rates


@pytest.mark.parametrize(
    ("trials", "tuning"), [(1, 0), (2, 0), (3, 1), (4, 1), (11, 2), (24, 6), (99, 6)]
)
def test_short_studies_tune_the_default_less(trials: int, tuning: int, record_of: Records) -> None:
    space = space_of(trials=trials)
    settled: list[tuple[TrialSpec, TrialRecord]] = []
    while (spec := reference_trial(space, settled, loss_of)) is not None:
        # A loss that falls for ever never lets the walk end by itself.
        loss = -math.log(spec.learning_rate)
        settled.append((spec, record_of(spec, len(settled), loss)))
    assert len(settled) == 1 + tuning


# ------------------------------------------------------------ finalists and their seeds


def settled_with(
    space: Space, record_of: Records, *losses: tuple[int, float, str]
) -> list[tuple[TrialSpec, TrialRecord]]:
    """A default and a tuned default at loss 2, then search trials as (rank, loss, outcome)."""
    specs = [space.default(), space.default_tuned(3e-4)]
    settled = [(s, record_of(s, number, 2.0 - 0.1 * number)) for number, s in enumerate(specs)]
    for rank, loss, outcome in losses:
        spec = space.spec({"log2_rank": int(math.log2(rank)), "log2_alpha": 4})
        settled.append((spec, record_of(spec, len(settled), loss, outcome)))
    return settled


def test_finalists_are_the_tuned_default_the_best_and_the_cheapest_close_to_it(
    record_of: Records,
) -> None:
    space = space_of(trials=30)
    settled = settled_with(
        space, record_of, (64, 1.0, "complete"), (16, 1.005, "complete"), (4, 1.009, "complete"),
        (2, 1.02, "complete"), (8, 0.5, "pruned"), (32, 0.4, "diverged"),
    )  # fmt: skip
    found = finalists(space, settled, loss_of, within=0.01)
    assert [(spec.role, spec.rank) for spec in found] == [
        ("default_tuned", 8), ("search", 64), ("search", 4),
    ]  # fmt: skip
    # Where the best is the cheapest as well, the next best takes the free place.
    found = finalists(space, settled, loss_of, within=0.0)
    assert [spec.rank for spec in found] == [8, 64, 16]


def test_as_many_trials_are_kept_back_as_the_seeds_will_need(record_of: Records) -> None:
    for trials, seeds in ((9, 3), (10, 3), (24, 3), (40, 5), (40, 1)):
        space = space_of(trials=trials, seeds=seeds)
        settled = settled_with(space, record_of, (64, 1.0, "complete"), (4, 1.1, "complete"))
        missing = seed_trials(space, settled, loss_of, within=0.01)
        defaults = 1 + num_tuning(space.config.search)
        assert defaults + len(missing) == num_reserved(space.config)


def test_the_search_opens_with_every_rank_once_in_the_middle(record_of: Records) -> None:
    space = space_of(
        trials=40, strategy="tpe", rank={"low": 2, "high": 32}, alpha={"low": 8, "high": 32}
    )
    settled = settled_with(space, record_of)
    opened = []
    while (spec := opening_trial(space, settled)) is not None:
        opened.append(spec)
        outcome = "failed" if spec.rank == 8 else "complete"
        settled.append((spec, record_of(spec, len(settled), 1.0, outcome)))
    assert sorted(spec.rank for spec in opened) == [2, 4, 8, 16, 32]
    for spec in opened:
        assert spec.role == "search" and spec.alpha == 16
        assert spec.learning_rate == pytest.approx(space.centre("rslora", spec.rank), rel=1e-3)


def test_a_short_or_a_random_study_has_no_opening_and_transfer_one_of_its_own(
    record_of: Records,
) -> None:
    for search in (
        {"trials": 10, "strategy": "tpe"},
        {"trials": 40, "strategy": "random"},
        {"trials": 40, "strategy": "transfer"},
    ):
        space = space_of(**search)
        assert opening_trial(space, settled_with(space, record_of)) is None


def test_a_negative_objective_has_neighbours_too(record_of: Records) -> None:
    space = space_of(trials=30, objective="exact_match")
    settled = settled_with(space, record_of, (64, -0.9, "complete"), (4, -0.895, "complete"))
    assert [s.rank for s in finalists(space, settled, loss_of, within=0.01)][1:] == [64, 4]


def test_seeds_are_run_seed_by_seed_and_none_twice(record_of: Records) -> None:
    space = space_of(trials=30, seeds=3)
    settled = settled_with(space, record_of, (64, 1.0, "complete"), (4, 1.001, "complete"))
    missing = seed_trials(space, settled, loss_of, within=0.01)
    assert [(s.role, s.rank, s.seed) for s in missing] == [
        ("seed", 8, 1), ("seed", 64, 1), ("seed", 4, 1),
        ("seed", 8, 2), ("seed", 64, 2), ("seed", 4, 2),
    ]  # fmt: skip
    first = (missing[0], record_of(missing[0], 9, None, "failed"))
    assert seed_trials(space, [*settled, first], loss_of, within=0.01) == missing[1:]


@pytest.mark.parametrize(
    ("trials", "seeds", "num_missing"), [(9, 3, 0), (10, 3, 2), (20, 3, 4), (99, 3, 4), (99, 1, 0)]
)
def test_short_studies_repeat_fewer_seeds(
    trials: int, seeds: int, num_missing: int, record_of: Records
) -> None:
    space = space_of(trials=trials, seeds=seeds)
    settled = settled_with(space, record_of, (64, 1.0, "complete"))
    assert len(seed_trials(space, settled, loss_of, within=0.01)) == num_missing
