"""Proposals: the same for the same past, never twice, and better than chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import optuna
import pytest

from rsauto.config import StudyConfig
from rsauto.records import EvalPoint, TrialRecord, TrialSpec
from rsauto.search import sampler
from rsauto.search.sampler import Attempt, propose
from rsauto.search.space import Space
from rsauto.study_file import validate

Loss = Callable[[TrialSpec], float]
Records = Callable[..., TrialRecord]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def study(seed: int = 0, **search: Any) -> tuple[StudyConfig, Space]:
    config = validate({"training": {"steps": 10, "seed": seed}, "search": search})
    return config, Space(config, config.search.ranks, steps=10, max_length=512)


RANGES = {
    "rank": {"low": 2, "high": 256},
    "alpha": {"low": 4, "high": 128},
    "learning_rate": {"low": 1e-5, "high": 1e-1},
}
LISTS = {"rank": [4, 8, 16], "alpha": [8, 16], "learning_rate": [1e-4, 3e-4, 1e-3, 3e-3]}


def bowl(spec: TrialSpec) -> float:
    """Best at rank 32, alpha 16 and a learning rate of 2e-3."""
    return (
        0.3 * (math.log2(spec.rank) - 5) ** 2
        + 0.1 * (math.log2(spec.alpha) - 4) ** 2
        + math.log10(spec.learning_rate / 2e-3) ** 2
    )


def carry_on(
    config: StudyConfig, space: Space, record_of: Records, loss: Loss, count: int
) -> list[Attempt]:
    attempts: list[Attempt] = []
    while len(attempts) < count:
        spec = propose(space, attempts, config)
        if spec is None:
            break
        value = loss(spec)
        attempts.append(Attempt(spec, record_of(spec, len(attempts), value), value))
    return attempts


@pytest.mark.parametrize("strategy", ["tpe", "random"])
def test_the_same_past_gives_the_same_proposal(strategy: str, record_of: Records) -> None:
    config, space = study(strategy=strategy, **RANGES)
    attempts = carry_on(config, space, record_of, bowl, 14)
    for known in (0, 5, 14):
        first, again = (propose(space, attempts[:known], config) for _ in range(2))
        assert first == again
    # A study continued from its records goes on as if it had not been interrupted.
    again = [
        Attempt(TrialSpec.from_json(a.spec.to_json()), a.record, a.value) for a in attempts[:9]
    ]
    assert propose(space, again, config) == attempts[9].spec


def test_another_seed_asks_for_other_trials(record_of: Records) -> None:
    found = []
    for seed in (0, 1):
        config, space = study(seed=seed, **RANGES)
        attempts = carry_on(config, space, record_of, bowl, 3)
        found.append([replace(a.spec, seed=0) for a in attempts])
    assert found[0] != found[1]


@pytest.mark.parametrize("strategy", ["tpe", "random", "grid"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_finite_space_is_tried_to_its_last_point_and_no_point_twice(
    strategy: str, seed: int, record_of: Records
) -> None:
    config, space = study(seed=seed, strategy=strategy, **LISTS)
    attempts = carry_on(config, space, record_of, bowl, 99)
    assert len(attempts) == len({a.spec.configuration() for a in attempts}) == 3 * 2 * 4
    assert propose(space, attempts, config) is None


def test_one_point_is_proposed_once(record_of: Records) -> None:
    config, space = study(rank=8, alpha=16, learning_rate={"low": 1e-3, "high": 1e-3})
    attempts = carry_on(config, space, record_of, bowl, 9)
    assert [a.spec.learning_rate for a in attempts] == [1e-3]


def test_a_trial_that_is_running_elsewhere_is_not_proposed(record_of: Records) -> None:
    config, space = study(strategy="random", **LISTS)
    first = propose(space, [], config)
    assert first is not None
    running = [Attempt(first, None, None)]
    for _ in range(23):
        spec = propose(space, running, config)
        assert spec is not None
        assert spec.configuration() not in {a.spec.configuration() for a in running}
        running.append(Attempt(spec, None, None))
    assert propose(space, running, config) is None


def test_another_seed_of_a_configuration_counts_as_the_same_point(record_of: Records) -> None:
    config, space = study(rank=8, alpha=16, learning_rate=[1e-3])
    spec = propose(space, [], config)
    assert spec is not None
    repeated = replace(spec, seed=7, role="seed", micro_batch_size=2)
    assert propose(space, [Attempt(repeated, record_of(repeated), 1.0)], config) is None


def test_tpe_learns_where_a_bowl_is_deep(record_of: Records) -> None:
    best: dict[str, list[float]] = {"tpe": [], "random": []}
    late: dict[str, list[float]] = {"tpe": [], "random": []}
    for strategy in best:
        for seed in range(4):
            config, space = study(seed=seed, strategy=strategy, **RANGES)
            values = [a.value for a in carry_on(config, space, record_of, bowl, 30)]
            best[strategy].append(min(v for v in values if v is not None))
            late[strategy] += [v for v in values[15:] if v is not None]
    mean = {name: sum(values) / len(values) for name, values in late.items()}
    assert mean["tpe"] < 0.6 * mean["random"], mean
    assert sum(best["tpe"]) < sum(best["random"]), best


def test_maximised_metrics_are_learnt_the_right_way_round(record_of: Records) -> None:
    values = []
    for seed in range(2):
        config, space = study(seed=seed, objective="exact_match", **RANGES)
        attempts = carry_on(config, space, record_of, lambda spec: -bowl(spec), 24)
        values += [a.value for a in attempts[12:] if a.value is not None]
    config, space = study(strategy="random", **RANGES)
    chance = [-bowl(a.spec) for a in carry_on(config, space, record_of, bowl, 24)]
    assert sum(values) / len(values) > 0.6 * sum(chance) / len(chance)


def test_pruned_trials_teach_by_the_objective_not_by_the_loss(record_of: Records) -> None:
    """Where the metric grows with rank but the loss does too, later trials have large ranks."""
    late = []
    for seed in range(3):
        config, space = study(seed=seed, objective="exact_match", **RANGES)
        attempts: list[Attempt] = []
        for number in range(24):
            spec = propose(space, attempts, config)
            assert spec is not None
            metric = math.log2(spec.rank)
            point = EvalPoint(step=5, train_loss=1.0, eval_loss=-metric, grad_norm=1.0)
            record = record_of(spec, number, metric, "pruned", curve=(point,))
            attempts.append(Attempt(spec, record, metric))
        late += [math.log2(a.spec.rank) for a in attempts[12:]]
    assert sum(late) / len(late) > 5.5  # the middle of ranks 2 to 256 is 4.5


@pytest.mark.parametrize("outcome", ["infeasible", "oom", "diverged"])
def test_trials_that_do_not_fit_shift_proposals_away(outcome: str, record_of: Records) -> None:
    """All trials have one value; only the constraint tells the ranks above 16 apart."""

    def share_of_large_ranks(failing: str) -> float:
        large = total = 0
        for seed in range(3):
            config, space = study(seed=seed, **RANGES)
            attempts: list[Attempt] = []
            for number in range(26):
                spec = propose(space, attempts, config)
                assert spec is not None
                bad = spec.rank > 16
                record = record_of(spec, number, 1.0, failing if bad else "complete")
                attempts.append(Attempt(spec, record, 1.0))
                large += bad and number >= 13
                total += number >= 13
        return large / total

    assert share_of_large_ranks(outcome) < 0.6 * share_of_large_ranks("complete")


def test_failed_trials_teach_nothing_but_are_not_repeated(record_of: Records) -> None:
    config, space = study(strategy="grid", **LISTS)
    first = propose(space, [], config)
    assert first is not None
    failed = Attempt(first, record_of(first, 0, None, "failed"), None)
    second = propose(space, [failed], config)
    assert second is not None and second.configuration() != first.configuration()


def test_ranks_can_be_widened_and_old_trials_still_teach(record_of: Records) -> None:
    narrow, space = study(**{**RANGES, "rank": {"low": 2, "high": 16}})
    attempts = carry_on(narrow, space, record_of, bowl, 12)
    wide, wide_space = study(**RANGES)
    more = list(attempts)
    for number in range(12, 26):
        spec = propose(wide_space, more, wide)
        assert spec is not None
        assert spec.configuration() not in {a.spec.configuration() for a in more}
        more.append(Attempt(spec, record_of(spec, number, bowl(spec)), bowl(spec)))
    assert max(a.spec.rank for a in attempts) <= 16 < max(a.spec.rank for a in more[12:])
    # From a range to a list as well; trials of other ranks than the list's are left aside.
    listed, list_space = study(**{**RANGES, "rank": [4, 12, 48]})
    spec = propose(list_space, more, listed)
    assert spec is not None and spec.rank in (4, 12, 48)


@pytest.mark.parametrize("strategy", ["random", "tpe"])
def test_a_proposal_is_the_samplers_own_with_all_that_is_known(
    strategy: str, record_of: Records
) -> None:
    """Beside Optuna itself, given every trial: what is left out for speed changes nothing."""
    config, space = study(strategy=strategy, seed=3, trials=40, **RANGES)
    outcomes = ("complete", "pruned", "failed", "oom", "diverged")
    attempts = carry_on(config, space, record_of, bowl, 30)
    attempts = [
        Attempt(a.spec, None, None) if n % 6 == 5 else
        a._replace(record=record_of(a.spec, n, a.value, outcomes[n % 6]))
        for n, a in enumerate(attempts)
    ]  # fmt: skip
    for known in (0, 7, 30):
        seed = sampler._seed(config.training.seed, known, 0)
        whole = optuna.create_study(sampler=sampler._sampler(config, seed))
        for attempt in attempts[:known]:
            trial = sampler._as_trial(space, attempt, space.distributions())
            if trial is not None:
                whole.add_trial(trial)
        expected = space.spec(whole.ask(fixed_distributions=space.distributions()).params)
        assert propose(space, attempts[:known], config) == expected
