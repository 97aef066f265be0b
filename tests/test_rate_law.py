"""The law of the learning rate against closed forms, SciPy, and exponents that were planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import linregress, t

from rsauto.intervals import t_quantile
from rsauto.rate_law import (
    WINDOW_OCTAVES,
    RateLaw,
    RatePoint,
    best_rate,
    fit_sweeps,
    fit_trials,
    vertex,
)

RANKS = (2, 4, 8, 16, 32, 64, 128)


@given(
    place=st.floats(-20, 5),
    curvature=st.floats(1e-3, 10),
    floor=st.floats(-5, 5),
    offsets=st.tuples(st.floats(0.1, 3), st.floats(-0.04, 0.04), st.floats(0.1, 3)),
)
def test_the_vertex_is_that_of_the_parabola(
    place: float, curvature: float, floor: float, offsets: tuple[float, float, float]
) -> None:
    left, middle, right = offsets
    x = [place - left, place + middle, place + right]
    y = [floor + curvature * (one - place) ** 2 for one in x]
    assume(y[1] < min(y[0], y[2]))
    found = vertex(x, y)
    assert found == pytest.approx(place, abs=1e-5)


@given(y=st.tuples(*[st.floats(-3, 3)] * 3), x1=st.floats(0.1, 2), x2=st.floats(0.1, 2))
def test_a_vertex_lies_between_the_middles_of_the_intervals(
    y: tuple[float, float, float], x1: float, x2: float
) -> None:
    found = vertex([0.0, x1, x1 + x2], y)
    if found is None:
        assert y[1] > min(y) or len(set(y)) == 1
    else:
        assert y[1] == min(y)
        assert x1 / 2 - 1e-9 <= found <= x1 + x2 / 2 + 1e-9


def test_the_best_rate_of_a_sweep_is_that_of_its_parabola() -> None:
    best = 3.1e-4
    sweep = [(r, math.exp(0.7 + 0.02 * math.log2(r / best) ** 2)) for r in (1e-3, 1e-4, 4e-4, 2e-4)]
    assert best_rate(sweep) == pytest.approx(best, rel=1e-9)
    diverged = [(3e-3, math.inf), (5e-3, math.nan)]
    assert best_rate([*sweep, *diverged]) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(
    "losses", [(1.0, 0.9, 0.8), (0.8, 0.9, 1.0), (1.0, 0.9), (1.0, math.inf, 0.9), (1.0, 1.0, 1.0)]
)
def test_no_best_rate_where_it_may_lie_beyond_the_sweep(losses: tuple[float, ...]) -> None:
    assert best_rate(list(zip((1e-4, 2e-4, 4e-4), losses, strict=False))) is None


def surface(
    exponent: float, noise: float, generator: np.random.Generator, ranks: tuple[int, ...] = RANKS
) -> list[RatePoint]:
    """Trials on a parabola of one width whose place moves with rank, three octaves wide."""
    return [
        RatePoint(
            rank,
            2.0 ** (-11 + exponent * math.log2(rank / 8) + x),
            math.exp(
                0.5 + 0.03 * (math.log2(rank) - 5) ** 2 + 0.05 * x**2 + noise * generator.normal()
            ),
        )
        for rank in ranks
        for x in (-0.6, 0.0, 0.6)
    ]


@pytest.mark.parametrize("exponent", [-0.5, -0.25, 0.0, 1.0])
def test_a_planted_exponent_is_found(exponent: float) -> None:
    law = fit_trials(surface(exponent, 0.0, np.random.default_rng(0)))
    assert law is not None
    assert law.exponent == pytest.approx(exponent, abs=1e-6)
    assert law.half_width < 1e-6
    assert law.num_trials == 3 * len(RANKS)
    assert law.contradicts(exponent + 0.1) and not law.contradicts(law.exponent)


def test_trials_far_from_the_best_of_their_rank_are_left_aside() -> None:
    """Far out the loss is no parabola any more: such a trial must not move the exponent."""
    near = surface(-0.25, 0.0, np.random.default_rng(0))
    far = [RatePoint(rank, 2.0 ** (-11 + 2 * WINDOW_OCTAVES), 9.0) for rank in RANKS]
    law = fit_trials([*near, *far, RatePoint(4, 1e-3, math.inf)])
    assert law is not None and law.num_trials == len(near)
    assert law.exponent == pytest.approx(-0.25, abs=1e-6)


def test_the_interval_covers_the_planted_exponent_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    laws = [fit_trials(surface(-0.25, 1e-3, generator)) for _ in range(300)]
    found = [law for law in laws if law is not None]
    assert len(found) == 300
    covered = sum(not law.contradicts(-0.25) for law in found)
    assert 0.90 <= covered / 300 <= 0.99


def test_no_law_from_too_few_trials_few_ranks_or_without_a_minimum() -> None:
    points = surface(-0.25, 1e-3, np.random.default_rng(1))
    assert fit_trials(points) is not None
    assert fit_trials([]) is None
    assert fit_trials(points[:7]) is None
    assert fit_trials(points[:6]) is None  # two ranks
    assert fit_trials(surface(-0.25, 1e-3, np.random.default_rng(1), ranks=(8,))) is None
    assert fit_trials([p for p in points if abs(p.rate / 2**-11 - 1) < 9][1::3]) is None  # one rate
    hill = [RatePoint(p.rank, p.rate, 1 / p.loss) for p in points]
    assert fit_trials(hill) is None


def test_the_exponent_of_sweeps_is_the_slope_of_a_regression() -> None:
    generator = np.random.default_rng(3)
    for count in (3, 5, 12):
        best = [
            (2 ** (1 + n % 8), 1e-3 * 2 ** (-0.25 * n + 0.2 * float(generator.normal())))
            for n in range(count)
        ]
        law = fit_sweeps(best)
        expected = linregress([math.log2(r) for r, _ in best], [math.log2(x) for _, x in best])
        assert law is not None and law.num_trials == count
        assert law.exponent == pytest.approx(expected.slope, rel=1e-9)
        half = t.ppf(0.975, count - 2) * expected.stderr
        assert law.half_width == pytest.approx(half, rel=1e-3)
    assert fit_sweeps(best[:2]) is None
    assert fit_sweeps([(8, 1e-3), (8, 2e-3), (8, 3e-3)]) is None


def test_quantiles_are_those_of_student() -> None:
    for freedom in (1, 2, 7, 30, 31, 40, 100, 1000):
        assert t_quantile(freedom) == pytest.approx(t.ppf(0.975, freedom), abs=1e-3)
    with pytest.raises(ValueError, match="degrees_of_freedom"):
        t_quantile(0)


def test_a_law_contradicts_what_its_interval_leaves_out() -> None:
    law = RateLaw(exponent=-0.25, half_width=0.1, num_trials=9)
    assert (law.low, law.high) == (-0.35, -0.15)
    assert not law.contradicts(-0.35) and law.contradicts(-0.36) and law.contradicts(0.0)
