"""What further trials are expected to bring: a Gaussian process over the study's own trials.

Notation
    z       a point of the search space, every setting scaled to [0, 1], choices one-hot
    mu, s   mean and deviation of the objective at z, lower is better
    f*      the least mean over the trials that were made, so that noise is not taken for a result
    EI(z)   expected improvement, (f* - mu) Phi(u) + s phi(u) with u = (f* - mu) / s (Mockus 1975;
            Jones, Schonlau and Welch 1998, equation 15)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from rsauto.records import TrialSpec
from rsauto.search.space import Space

LEAST_TRIALS = 8
"""Trials of full length before anything is expected of further ones."""

NUM_CANDIDATES = 512

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point that was not tried, and what it is expected to bring."""

    spec: TrialSpec
    improvement: float
    """Expected, in the objective's own unit."""


def candidates(
    space: Space,
    trials: Sequence[tuple[TrialSpec, float]],
    pending: Sequence[TrialSpec],
    seed: int,
) -> list[Candidate] | None:
    """Random points of the space with their expected improvement, best first.

    ``trials`` have the objective, lower is better, at full length. None where they are too few.
    Those that are ``pending`` are taken to give what is expected of them (the kriging believer of
    Ginsbourger, Le Riche and Carraro 2010), so that the next one keeps away from them.
    """
    distributions = space.distributions()
    known = [(p, value) for spec, value in trials if (p := space.params(spec)) is not None]
    if len(known) < LEAST_TRIALS or not distributions:
        return None
    at = np.array([_scaled(params, distributions) for params, _ in known])
    values = np.array([value for _, value in known])
    awaited = [p for spec in pending if (p := space.params(spec)) is not None]
    drawn = _drawn(distributions, np.random.default_rng([seed, len(trials), len(pending)]))
    outside = [value for spec, value in trials if space.params(spec) is None]
    gain = _expected_improvement(
        at,
        values,
        min(outside, default=math.inf),
        np.array([_scaled(p, distributions) for p in awaited]).reshape(-1, at.shape[1]),
        np.array([_scaled(p, distributions) for p in drawn]),
    )
    tried = {spec.configuration() for spec, _ in trials} | {s.configuration() for s in pending}
    found = [Candidate(space.spec(p), float(g)) for p, g in zip(drawn, gain, strict=True)]
    new = [one for one in found if one.spec.configuration() not in tried]
    return sorted(new, key=lambda one: -one.improvement)


def _expected_improvement(
    at: Numbers, values: Numbers, outside: float, awaited: Numbers, where: Numbers
) -> Numbers:
    """EI at ``where`` (m, d) after ``values`` (n,) seen ``at`` (n, d), and others ``awaited``.

    ``outside`` is the least value of trials that do not lie in the space.
    """
    from scipy.stats import norm
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern, WhiteKernel

    scale = float(values.std())
    if scale == 0.0:
        return np.zeros(len(where))
    kernel = 1.0 * Matern(np.ones(at.shape[1]), (0.1, 10.0), nu=2.5) + WhiteKernel(0.1, (1e-4, 1.0))
    process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a bound of a length is an answer too
        process.fit(at, values)
    if len(awaited):
        at = np.concatenate([at, awaited])
        values = np.concatenate([values, process.predict(awaited)])
        process = GaussianProcessRegressor(process.kernel_, optimizer=None, normalize_y=True)
        process.fit(at, values)
    noise = float(process.kernel_.k2.noise_level) * float(values.std()) ** 2
    best = min(float(process.predict(at).min()), outside)
    mean, deviation = process.predict(where, return_std=True)
    # Of the function itself: a repetition of the same point is no improvement.
    sigma = np.sqrt(np.maximum(deviation**2 - noise, 1e-18))
    u = (best - mean) / sigma
    found: Numbers = np.maximum((best - mean) * norm.cdf(u) + sigma * norm.pdf(u), 0.0)
    return found


def _drawn(
    distributions: Mapping[str, BaseDistribution], generator: np.random.Generator
) -> list[dict[str, Any]]:
    return [
        {name: _draw(dist, generator) for name, dist in distributions.items()}
        for _ in range(NUM_CANDIDATES)
    ]


def _draw(dist: BaseDistribution, generator: np.random.Generator) -> Any:
    if isinstance(dist, CategoricalDistribution):
        return dist.choices[int(generator.integers(len(dist.choices)))]
    if isinstance(dist, IntDistribution):
        return int(generator.integers(dist.low, dist.high + 1))
    assert isinstance(dist, FloatDistribution)
    return float(generator.uniform(dist.low, dist.high))


def _scaled(
    params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]
) -> list[float]:
    found: list[float] = []
    for name, dist in distributions.items():
        if isinstance(dist, CategoricalDistribution):
            found += [float(params[name] == choice) for choice in dist.choices]
        else:
            assert isinstance(dist, (IntDistribution, FloatDistribution))
            width = dist.high - dist.low
            found.append((params[name] - dist.low) / width if width else 0.0)
    return found


def cost_of_ranks(operations: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(a, b) of the line a + b r through (rank, operations of a whole trial).

    The time of a trial is taken to be that of its floating-point operations: it is known also of
    trials that shared a pack, and the same on every machine. Of one rank b is 0.
    """
    ranks = np.array([float(rank) for rank, _ in operations])
    flops = np.array([value for _, value in operations])
    if len(set(ranks)) < 2:
        return float(flops.mean()), 0.0
    slope = float(np.polyfit(ranks, flops, 1)[0])
    slope = slope if math.isfinite(slope) and slope > 0 else 0.0
    base = float(flops.mean() - slope * ranks.mean())
    if base < 0:  # few trials, bent by chance: no rank is free
        return 0.0, float(flops.mean() / ranks.mean())
    return base, slope
