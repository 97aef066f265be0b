"""What studies of papers need: every point on every seed, other powers of r, logs and moments."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from tiny_study import study_values

from rsauto.config import StudyConfig
from rsauto.errors import InputError
from rsauto.records import TrialRecord, TrialSpec
from rsauto.report.table import load_study
from rsauto.search.agenda import num_reserved, seed_trials
from rsauto.search.driver import study_events
from rsauto.search.sampler import Attempt, propose
from rsauto.search.space import Space
from rsauto.study_file import validate

GRID: dict[str, Any] = {
    "strategy": "grid",
    "trials": 16,
    "method": ["lora", "rslora"],
    "rank": [2, 8],
    "alpha": 16,
    "learning_rate": [1e-3, 1e-2],
    "seeds": 2,
    "repeat": "all",
    "baseline": False,
}


def config_of(**search: Any) -> StudyConfig:
    return validate({"training": {"steps": 10, "seed": 3}, "search": {**GRID, **search}})


def all_proposed(config: StudyConfig) -> list[TrialSpec]:
    space = Space(config, config.search.ranks, steps=10, max_length=512)
    attempts: list[Attempt] = []
    while (spec := propose(space, attempts, config)) is not None:
        attempts.append(Attempt(spec, None, None))
    return [attempt.spec for attempt in attempts]


def test_every_point_of_the_grid_is_proposed_on_every_seed_once_seeds_last() -> None:
    specs = all_proposed(config_of())
    found = [(s.seed, s.rank, s.method, s.learning_rate) for s in specs]
    assert found == list(product((3, 4), (2, 8), ("lora", "rslora"), (1e-3, 1e-2)))
    assert {s.role for s in specs} == {"search"}


def test_no_trial_is_kept_back_for_defaults_or_finalists() -> None:
    assert num_reserved(config_of(trials=40)) == 0
    assert num_reserved(config_of(trials=40, baseline=True, repeat="finalists")) > 0


def test_a_tuned_grid_repeats_each_rank_and_rule_at_its_own_best_rate(record_of: Any) -> None:
    config = config_of(repeat="tuned", seeds=3, trials=16, baseline=False)
    assert num_reserved(config) == 2 * 2 * 2  # the other seeds of each method and rank
    space = Space(config, config.search.ranks, steps=10, max_length=512)
    best = {("lora", 2): 1e-2, ("lora", 8): 1e-3, ("rslora", 2): 1e-3, ("rslora", 8): 1e-2}
    settled = []
    for number, spec in enumerate(space.grid()):
        loss = 1.0 if spec.learning_rate == best[spec.method, spec.rank] else 2.0
        settled.append((spec, record_of(spec, number, eval_loss=loss)))
    seeds = seed_trials(space, settled, lambda record: record.eval_loss, within=0.01)
    found = [(s.seed, s.method, s.rank, s.learning_rate) for s in seeds]
    assert sorted(found) == sorted(
        (seed, *point, rate) for seed in (4, 5) for point, rate in best.items()
    )
    assert [s.seed for s in seeds] == [4] * 4 + [5] * 4  # breadth first


def test_powers_of_r_are_points_of_the_grid() -> None:
    config = config_of(
        method="rslora", scaling_exponent=[-0.25, -2], init_exponent=[0, -0.5], seeds=1
    )
    specs = all_proposed(config)
    assert len(specs) == len(set(specs)) == 16
    for spec in specs:
        assert spec.scaling_exponent in (-0.25, -2)
        assert spec.init_scale in (None, spec.rank**-0.5)
    space = Space(config, config.search.ranks, steps=10, max_length=512)
    for spec in specs:  # the sampler's numbers and the trial are two forms of the same
        params = space.params(spec)
        assert params is not None
        assert space.spec(params) == spec
    assert set(space.points()) == set(specs)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strategy": "tpe"}, "repeat all is for strategy grid"),
        ({"method": "adalora", "init_exponent": -0.5}, "init_exponent is for the methods lora"),
        (
            {"strategy": "tpe", "repeat": "finalists", "scaling_exponent": -1,
             "learning_rate": {"low": 1e-4, "high": 1e-2}},
            "scaling_exponent needs learning_rate as a list",
        ),
        ({"scaling_exponent": [-1, -1]}, "scaling_exponent lists a value twice"),
        (
            {"strategy": "transfer", "repeat": "finalists", "scaling_exponent": -1},
            "scaling_exponent is for the strategies grid, random, tpe and gp",
        ),
        ({"trials": 15}, "search.trials is 15, and the grid with its seeds needs 16"),
        ({"trials": 11, "repeat": "tuned"}, "needs 12"),
        ({"scaling_exponent": 9}, "less than or equal to 4"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        config_of(**changes)


def test_moments_of_adalora_are_refused() -> None:
    values = {"training": {"steps": 9, "activation_moments": True}, "search": {"method": "adalora"}}
    with pytest.raises(InputError, match="activation_moments is for the methods lora and rslora"):
        validate(values)


def run(folder: Path, **training: Any) -> tuple[TrialRecord, ...]:
    values = study_values(folder, **GRID)
    values["memory_budget"] = "64MiB"
    values["training"].update(training)
    values["packing"] = {"lookahead": 8}
    for _ in study_events(validate(values), folder / "out", report=False):
        pass
    return tuple(load_study(folder / "out").records)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrialRecord, ...]:
    return run(tmp_path_factory.mktemp("logged"), logging_steps=2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrialRecord, ...]:
    folder = tmp_path_factory.mktemp("measured")
    return run(folder, logging_steps=1, activation_moments=True)


def test_a_grid_study_has_each_point_on_each_seed_and_nothing_else(
    logged: tuple[TrialRecord, ...],
) -> None:
    assert [r.outcome for r in logged] == ["complete"] * 16
    points = {(r.seed, r.rank, r.method, r.learning_rate) for r in logged}
    assert points == set(product((0, 1), (2, 8), ("lora", "rslora"), (1e-3, 1e-2)))


def test_the_log_has_means_that_make_up_those_of_the_curve(
    logged: tuple[TrialRecord, ...], measured: tuple[TrialRecord, ...]
) -> None:
    """Six steps, an evaluation after every second: the same steps, in two accounts of them."""
    for record in (*logged, *measured):
        every = 6 // len(record.log)
        assert [point.step for point in record.log] == list(range(every, 7, every))
        for point in record.curve:
            own = [p for p in record.log if point.step - 2 < p.step <= point.step]
            assert math.isclose(fmean(p.train_loss for p in own), point.train_loss, rel_tol=1e-6)
            assert math.isclose(fmean(p.grad_norm for p in own), point.grad_norm, rel_tol=1e-6)


def test_moments_are_measured_at_every_evaluation_and_change_no_result(
    logged: tuple[TrialRecord, ...], measured: tuple[TrialRecord, ...]
) -> None:
    plain = {(r.seed, r.rank, r.method, r.learning_rate): r.eval_loss for r in logged}
    for record in measured:
        assert record.engine == "peft"
        assert [m.step for m in record.activation_moments] == [p.step for p in record.curve]
        assert all(m.forward_gain > 0 and m.backward_gain > 0 for m in record.activation_moments)
        known = plain[record.seed, record.rank, record.method, record.learning_rate]
        assert known is not None
        assert record.eval_loss is not None
        assert math.isclose(record.eval_loss, known, rel_tol=1e-5)  # one was packed


def test_records_with_log_and_moments_are_read_back(measured: tuple[TrialRecord, ...]) -> None:
    for record in measured:
        assert TrialRecord.from_json(record.to_json()) == record
