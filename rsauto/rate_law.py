"""How the best learning rate moves with rank, as trials show it: eta*(r) = eta*(r_0) (r / r_0)^s.

Notation
    r        rank;            rho = log2(r / r_0)
    eta      learning rate;   x = log2(eta)
    m        log2 of the best learning rate at r_0
    s        the exponent of the law, whose prior is `scaling.learning_rate_exponent`

Near its minimum over x the logarithm of the loss is taken to be a parabola of one width at all
ranks, whose place moves with rank: ln L = f(rho) + c (x - m - s rho)^2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsauto.intervals import t_quantile
from rsauto.records import Method, TrialRecord

WINDOW_OCTAVES = 1.5
"""How far from the best learning rate of its rank a trial may lie and still be on the parabola."""


@dataclass(frozen=True, slots=True)
class RatePoint:
    """A trial at full length."""

    rank: int
    rate: float
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RateLaw:
    """An exponent with its 95 % interval."""

    exponent: float
    half_width: float
    num_trials: int
    """Trials, or single sweeps, that it was fitted to."""

    @property
    def low(self) -> float:
        return self.exponent - self.half_width

    @property
    def high(self) -> float:
        return self.exponent + self.half_width

    def contradicts(self, prior: float) -> bool:
        """Whether the interval leaves out ``prior``."""
        return not self.low <= prior <= self.high


def vertex(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Where the parabola through three points with x_0 < x_1 < x_2 is least; None where the middle
    one is not the lowest. It lies between the middles of the two intervals."""
    (x0, x1, x2), (y0, y1, y2) = x, y
    if not (y1 <= y0 and y1 <= y2) or y0 == y1 == y2:
        return None
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    return (x0 + x1) / 2 - left / (2 * curvature)


def best_rate(points: Sequence[tuple[float, float]]) -> float | None:
    """The learning rate of least loss from (rate, loss) pairs of one rank, by `vertex` in ln loss.

    None where there are fewer than three, or the lowest is at an end: the best may lie beyond.
    """
    sweep = sorted((rate, loss) for rate, loss in points if 0 < loss < math.inf)
    if len(sweep) < 3:
        return None
    lowest = min(range(len(sweep)), key=lambda n: sweep[n][1])
    if lowest in (0, len(sweep) - 1):
        return None
    near = sweep[lowest - 1 : lowest + 2]
    found = vertex([math.log2(rate) for rate, _ in near], [math.log(loss) for _, loss in near])
    return None if found is None else 2.0**found


@dataclass(frozen=True, kw_only=True, slots=True)
class Surface:
    """ln L as a response surface of second order over x and rho (Box and Wilson 1951), both from
    their means: coefficients of 1, rho, rho^2, x, x^2, x rho."""

    coefficients: Any
    covariance: Any
    """Of the coefficients, (6, 6)."""
    freedom: int
    mean_x: float
    mean_rho: float
    num_trials: int

    @property
    def law(self) -> RateLaw:
        """s = -b_xrho / (2 b_xx), with the interval of the delta method and Student's t."""
        b_xx, b_xrho = self._curvature, float(self.coefficients[5])
        gradient = np.array([0, 0, 0, 0, b_xrho / (2 * b_xx**2), -1 / (2 * b_xx)])
        return RateLaw(
            exponent=-b_xrho / (2 * b_xx),
            half_width=self._half_width(gradient),
            num_trials=self.num_trials,
        )

    def best(self, rank: float) -> tuple[float, float]:
        """x of the best learning rate at a rank, -(b_x + b_xrho rho) / (2 b_xx), and the half width
        of its 95 % interval."""
        rho = math.log2(rank) - self.mean_rho
        b_xx = self._curvature
        slope = float(self.coefficients[3]) + float(self.coefficients[5]) * rho
        gradient = np.array([0, 0, 0, -1, slope / b_xx, -rho]) / (2 * b_xx)
        return self.mean_x - slope / (2 * b_xx), self._half_width(gradient)

    @property
    def _curvature(self) -> float:
        return float(self.coefficients[4])

    def _half_width(self, gradient: Any) -> float:
        variance = float(gradient @ self.covariance @ gradient)
        return t_quantile(self.freedom) * math.sqrt(max(0.0, variance))


def whole_search_trials(records: Iterable[TrialRecord], method: Method) -> list[RatePoint]:
    """The search trials of a method that ran at full length, which alone a law is fitted to.

    The law holds at one alpha, one lr_ratio and one choice of layers: those that most of them have.
    """
    whole = [
        record
        for record in records
        if record.role == "search" and record.method == method and record.outcome == "complete"
    ]
    alike = Counter((r.alpha, r.lr_ratio, r.target_modules) for r in whole).most_common(1)
    return [
        RatePoint(record.rank, record.learning_rate, record.eval_loss)
        for record in whole
        if (record.alpha, record.lr_ratio, record.target_modules) == alike[0][0]
        and record.eval_loss is not None
    ]


def fit_trials(points: Sequence[RatePoint]) -> RateLaw | None:
    """The exponent from the trials of one study, with whatever rates it happened to try.

    None where `fit_surface` is.
    """
    surface = fit_surface(points)
    return None if surface is None else surface.law


def fit_surface(points: Sequence[RatePoint]) -> Surface | None:
    """The least-squares surface through the trials near the best of their ranks.

    None where there are too few trials, they say nothing of x at two ranks, or the surface has no
    minimum over x.
    """
    near = _near_the_best([p for p in points if 0 < p.loss < math.inf])
    ranks = {point.rank for point in near}
    freedom = len(near) - 6
    if freedom < 2 or len(ranks) < 3:
        return None
    x = np.log2([point.rate for point in near])
    rho = np.log2([point.rank for point in near])
    mean_x, mean_rho = float(x.mean()), float(rho.mean())
    x, rho = x - mean_x, rho - mean_rho
    design = np.stack([np.ones_like(x), rho, rho**2, x, x**2, x * rho], axis=1)
    if np.linalg.cond(design) > 1e6:
        return None
    values = np.log([point.loss for point in near])
    found, *_ = np.linalg.lstsq(design, values, rcond=None)
    residual = values - design @ found
    if float(found[4]) <= 0:
        return None
    return Surface(
        coefficients=found,
        covariance=np.linalg.inv(design.T @ design) * float(residual @ residual) / freedom,
        freedom=freedom,
        mean_x=mean_x,
        mean_rho=mean_rho,
        num_trials=len(near),
    )


def fit_sweeps(best: Sequence[tuple[int, float]]) -> RateLaw | None:
    """The exponent from (rank, best rate) pairs, a line through their logarithms.

    Ordinary least squares with the usual interval of a slope. None with fewer than three pairs, or
    one rank.
    """
    if len(best) < 3 or len({rank for rank, _ in best}) < 2:
        return None
    rho = np.log2([float(rank) for rank, _ in best])
    x = np.log2([rate for _, rate in best])
    rho = rho - rho.mean()
    spread = float(rho @ rho)
    slope = float(rho @ x) / spread
    residual = x - x.mean() - slope * rho
    freedom = len(best) - 2
    deviation = math.sqrt(float(residual @ residual) / freedom / spread)
    return RateLaw(exponent=slope, half_width=t_quantile(freedom) * deviation, num_trials=len(best))


def _near_the_best(points: Sequence[RatePoint]) -> list[RatePoint]:
    """Those within WINDOW_OCTAVES of the best of their rank."""
    best: dict[int, RatePoint] = {}
    for point in points:
        if point.rank not in best or point.loss < best[point.rank].loss:
            best[point.rank] = point
    return [p for p in points if abs(math.log2(p.rate / best[p.rank].rate)) <= WINDOW_OCTAVES]
