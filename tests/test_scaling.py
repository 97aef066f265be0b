"""gamma_r and the law of the learning rate, against closed forms worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsauto.scaling import (
    OptimizerName,
    ScalingRule,
    gamma_r,
    learning_rate_exponent,
    transferred_learning_rate,
)

RANKS = st.integers(1, 4096)
ALPHAS = st.floats(0.5, 1024)


@pytest.mark.parametrize(
    ("rule", "alpha", "rank", "expected"),
    [
        ("lora", 16, 8, 2.0),
        ("lora", 8, 8, 1.0),
        ("lora", 8, 64, 0.125),
        ("lora", 5, 1, 5.0),
        ("rslora", 16, 4, 8.0),
        ("rslora", 8, 64, 1.0),
        ("rslora", 16, 256, 1.0),
        ("rslora", 5, 1, 5.0),
    ],
)
def test_gamma_r_has_the_values_of_the_two_papers(
    rule: ScalingRule, alpha: float, rank: int, expected: float
) -> None:
    assert gamma_r(rule, alpha, rank) == pytest.approx(expected, rel=1e-15)


@given(alpha=ALPHAS, rank=RANKS)
def test_lora_at_alpha_is_rslora_at_alpha_over_root_r(alpha: float, rank: int) -> None:
    assert gamma_r("lora", alpha, rank) == pytest.approx(
        gamma_r("rslora", alpha / math.sqrt(rank), rank), rel=1e-12
    )


@given(alpha=ALPHAS, rank=RANKS)
def test_gamma_r_is_linear_in_alpha(alpha: float, rank: int) -> None:
    for rule in ("lora", "rslora"):
        assert gamma_r(rule, 3 * alpha, rank) == pytest.approx(3 * gamma_r(rule, alpha, rank))


@pytest.mark.parametrize(
    ("exponent", "expected"), [(-0.25, 4.0), (-2.0, 8 / 256), (0.0, 8.0), (-0.5, 2.0), (-1.0, 0.5)]
)
def test_a_free_exponent_takes_the_place_of_the_rule(exponent: float, expected: float) -> None:
    for rule in ("lora", "rslora"):
        assert gamma_r(rule, 8, 16, exponent) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("rank", [0, -4])
def test_a_rank_below_one_is_refused_with_its_value(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank must be at least 1, but got rank={rank}\."):
        gamma_r("lora", 8, rank)


def test_an_unknown_rule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"one of \['lora', 'rslora'\], got 'rs-lora'"):
        gamma_r("rs-lora", 8, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "optimizer", "expected"),
    [
        ("rslora", "adamw", -0.25),
        ("lora", "adamw", 0.0),
        ("rslora", "sgd", 0.0),
        ("lora", "sgd", 1.0),
        ("rslora", "adafactor", 0.0),
        ("lora", "adafactor", 0.0),
    ],
)
def test_the_best_learning_rate_moves_with_rank_as_the_design_says(
    rule: ScalingRule, optimizer: OptimizerName, expected: float
) -> None:
    assert learning_rate_exponent(rule, optimizer) == expected


def test_a_constant_multiplier_has_its_own_exponents() -> None:
    assert learning_rate_exponent("lora", "adamw", 0.0) == -0.5
    assert learning_rate_exponent("lora", "sgd", 0.0) == -1.0


@given(rank=RANKS)
def test_under_sgd_the_law_keeps_gamma_squared_r_eta(rank: int) -> None:
    for rule in ("lora", "rslora"):
        law = learning_rate_exponent(rule, "sgd")
        rate = transferred_learning_rate(1e-2, 8, rank, law)
        kept = gamma_r(rule, 8, rank) ** 2 * rank * rate
        assert kept == pytest.approx(gamma_r(rule, 8, 8) ** 2 * 8 * 1e-2, rel=1e-9)


def test_a_rate_is_transferred_by_the_power_of_the_ratio_of_ranks() -> None:
    assert transferred_learning_rate(4e-3, 8, 8 * 16, -0.25) == pytest.approx(2e-3)
    assert transferred_learning_rate(1e-3, 8, 2, 1.0) == pytest.approx(2.5e-4)
    assert transferred_learning_rate(3e-4, 8, 8, -0.25) == 3e-4
