"""What a sampler's choice stands for, and back again."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from rsauto.config import StudyConfig
from rsauto.records import TrialSpec
from rsauto.search.space import STORED_DISTRIBUTIONS, Params, Space, stored_params
from rsauto.study_file import validate


def space_of(ranks: tuple[int, ...] | None = None, **search: Any) -> Space:
    training = search.pop("training", {"steps": 40})
    config: StudyConfig = validate({"search": search, "training": training})
    return Space(config, ranks or config.search.ranks, steps=40, max_length=512)


RANGES = space_of(
    method=["rslora", "lora"],
    rank={"low": 2, "high": 64},
    alpha={"low": 8, "high": 32},
    learning_rate={"low": 1e-5, "high": 1e-2},
    lr_ratio=[1, 4, 16],
    target_modules=["all-linear", "attention", ["q_proj", "v_proj"]],
)
LISTS = space_of(
    method=["rslora", "lora"],
    rank=[4, 12, 100],
    alpha=[7, 16],
    learning_rate=[1e-4, 3e-4],
    lr_ratio=[1, 4],
)


def point(draw: st.DrawFn, space: Space) -> Params:
    """Any choice a sampler could make."""
    chosen: Params = {}
    for name, dist in space.distributions().items():
        if isinstance(dist, CategoricalDistribution):
            chosen[name] = draw(st.sampled_from(dist.choices))
        elif isinstance(dist, IntDistribution):
            chosen[name] = draw(st.integers(dist.low, dist.high))
        else:
            assert isinstance(dist, FloatDistribution)
            chosen[name] = draw(st.floats(dist.low, dist.high))
    return chosen


def test_a_range_is_searched_as_a_power_and_a_list_as_a_choice() -> None:
    assert RANGES.distributions() == {
        "method": CategoricalDistribution(("rslora", "lora")),
        "log2_rank": IntDistribution(1, 6),
        "log2_alpha": IntDistribution(3, 5),
        "lr_ratio": CategoricalDistribution((1.0, 4.0, 16.0)),
        "target_modules": CategoricalDistribution((0, 1, 2)),
        "log2_lr_offset": FloatDistribution(-math.log2(1e3) / 2, math.log2(1e3) / 2),
    }
    assert LISTS.distributions() == {
        "method": CategoricalDistribution(("rslora", "lora")),
        "rank": CategoricalDistribution((4, 12, 100)),
        "alpha": CategoricalDistribution((7, 16)),
        "lr_ratio": CategoricalDistribution((1.0, 4.0)),
        "learning_rate": CategoricalDistribution((1e-4, 3e-4)),
    }


def test_a_setting_with_one_value_is_not_searched_but_used() -> None:
    space = space_of(rank=16, alpha={"low": 8, "high": 8}, learning_rate=2e-4, lr_ratio=4)
    assert space.distributions() == {}
    spec = space.spec({})
    assert (spec.rank, spec.alpha, spec.learning_rate, spec.lr_ratio) == (16, 8, 2e-4, 4.0)
    assert space.params(spec) == {}


def test_ranks_that_cannot_fit_are_not_offered() -> None:
    space = space_of((2, 4, 8), rank={"low": 2, "high": 64})
    assert space.distributions()["log2_rank"] == IntDistribution(1, 3)
    space = space_of((4, 12), rank=[4, 12, 100])
    assert space.distributions()["rank"] == CategoricalDistribution((4, 12))


@settings(deadline=None)
@given(st.data())
def test_every_choice_survives_the_way_to_a_trial_and_back(data: st.DataObject) -> None:
    for space in (RANGES, LISTS):
        params = data.draw(st.composite(point)(space))
        back = space.params(space.spec(params))
        assert back is not None
        assert back == pytest.approx(params, abs=1e-3)  # learning rates keep four digits


@settings(deadline=None)
@given(st.data())
def test_every_trial_is_the_same_trial_after_the_way_back(data: st.DataObject) -> None:
    for space in (RANGES, LISTS):
        spec = space.spec(data.draw(st.composite(point)(space)))
        params = space.params(spec)
        assert params is not None
        again = space.spec(params)
        assert again == spec
        assert float(f"{spec.learning_rate:.4g}") == spec.learning_rate


@pytest.mark.parametrize(
    ("method", "optimizer", "exponent"),
    [
        ("rslora", "adamw", -0.25),
        ("lora", "adamw", 0.0),
        ("rslora", "sgd", 0.0),
        ("lora", "sgd", 1.0),
        ("lora", "adafactor", 0.0),
    ],
)
def test_the_middle_of_a_learning_rate_range_follows_the_law(
    method: Any, optimizer: str, exponent: float
) -> None:
    space = space_of(
        method=[method],
        learning_rate={"low": 1e-4, "high": 1e-2},
        reference_rank=16,
        training={"steps": 40, "optimizer": optimizer},
    )
    for log2_rank in range(1, 9):
        expected = 1e-3 * (2**log2_rank / 16) ** exponent
        assert space.centre(method, 2**log2_rank) == pytest.approx(expected)
        spec = space.spec({"log2_rank": log2_rank, "log2_lr_offset": 1.5})
        assert spec.learning_rate == pytest.approx(expected * 2**1.5, rel=1e-3)


def test_the_middle_is_taken_for_the_method_of_the_trial() -> None:
    at_64 = {"log2_rank": 6, "log2_lr_offset": 0.0}
    rslora = RANGES.spec({**at_64, "method": "rslora"})
    lora = RANGES.spec({**at_64, "method": "lora"})
    assert rslora.learning_rate / lora.learning_rate == pytest.approx((64 / 8) ** -0.25, rel=1e-3)


def test_a_list_of_learning_rates_is_taken_as_it_is_at_every_rank() -> None:
    for rank in (4, 100):
        assert LISTS.spec({"rank": rank, "learning_rate": 3e-4}).learning_rate == 3e-4


def inside() -> TrialSpec:
    return RANGES.spec({"log2_rank": 3, "log2_alpha": 4, "lr_ratio": 4.0, "log2_lr_offset": 0.5})


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 1},
        {"rank": 128},
        {"rank": 12},
        {"alpha": 64},
        {"alpha": 12},
        {"lr_ratio": 2.0},
        {"learning_rate": 1.0},
        {"learning_rate": 1e-7},
        {"target_modules": ("k_proj",)},
        {"method": "adalora"},
    ],
)
def test_a_trial_outside_the_space_stands_for_no_choice(changes: dict[str, Any]) -> None:
    assert RANGES.params(inside()) is not None
    assert RANGES.params(replace(inside(), **changes)) is None


def test_a_trial_of_a_method_that_is_not_searched_is_outside() -> None:
    space = space_of(method="rslora")
    assert space.params(space.default()) is None


def test_the_default_is_inside_a_space_that_has_its_values() -> None:
    space = space_of(method="lora", learning_rate={"low": 1e-5, "high": 1e-3})
    params = space.params(space.default())
    assert params == {"log2_rank": 3, "log2_alpha": 3, "log2_lr_offset": pytest.approx(-1.0)}


def test_the_default_is_what_peft_and_the_trainer_do_by_default() -> None:
    from peft import LoraConfig
    from transformers import TrainingArguments

    spec = RANGES.default()
    assert (spec.rank, spec.alpha) == (LoraConfig().r, LoraConfig().lora_alpha)
    assert spec.scaling_rule == "lora" and LoraConfig().use_rslora is False
    assert spec.learning_rate == TrainingArguments(output_dir="unused").learning_rate
    assert RANGES.default_tuned(3e-4).learning_rate == 3e-4


def test_the_grid_is_every_combination_once_with_low_ranks_first() -> None:
    space = space_of(
        strategy="grid",
        method=["rslora", "lora"],
        rank=[100, 4],
        alpha=[7, 16],
        learning_rate=[1e-4, 3e-4],
        lr_ratio=[1, 4],
        target_modules=["all-linear", ["q_proj"]],
    )
    specs = list(space.grid())
    found = [
        (s.rank, s.method, s.alpha, s.lr_ratio, s.target_modules, s.learning_rate) for s in specs
    ]
    assert [s.rank for s in specs] == sorted(s.rank for s in specs)
    expected = itertools.product(
        (4, 100), ("rslora", "lora"), (7, 16), (1.0, 4.0), ("all-linear", ("q_proj",)),
        (1e-4, 3e-4),
    )  # fmt: skip
    assert sorted(map(repr, found)) == sorted(map(repr, expected))
    assert len({s.configuration() for s in specs}) == 64


def test_a_range_of_ranks_is_a_grid_of_its_powers() -> None:
    space = space_of((2, 4, 8), strategy="grid", learning_rate=[1e-4], alpha=8)
    assert [spec.rank for spec in space.grid()] == [2, 4, 8]


def test_training_settings_are_those_of_the_study() -> None:
    training = {
        "steps": 40, "optimizer": "sgd", "schedule": "cosine", "warmup_share": 0.2,
        "weight_decay": 0.3, "max_grad_norm": 2.0, "batch_size": 6, "num_evals": 5, "seed": 7,
    }  # fmt: skip
    space = space_of(training=training)
    for spec in (space.spec({}), space.default(), space.default_tuned(1e-3)):
        assert {name: getattr(spec, name) for name in training} == training
        assert spec.micro_batch_size is None


def test_no_more_evaluations_than_steps_are_asked_for() -> None:
    config = validate({"training": {"epochs": 1, "num_evals": 5}})
    assert Space(config, (8,), steps=3, max_length=512).default().num_evals == 3


@settings(deadline=None)
@given(st.data())
def test_every_trial_can_be_stored_in_an_optuna_study(data: st.DataObject) -> None:
    spec = RANGES.spec(data.draw(st.composite(point)(RANGES)))
    trial = optuna.trial.create_trial(
        value=0.0, params=stored_params(spec), distributions=STORED_DISTRIBUTIONS
    )
    assert trial.params["rank"] == spec.rank
    assert trial.params["learning_rate"] == spec.learning_rate
