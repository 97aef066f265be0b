"""What a further trial is expected to bring, against an independent computation; what follows."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from landscape import Bowl, Landscape
from scipy.integrate import quad
from scipy.stats import norm
from test_agenda import Records
from test_transfer import space_of

from rsauto.records import TrialRecord, TrialSpec
from rsauto.search import surface
from rsauto.search.history import Known
from rsauto.search.objective import Objective
from rsauto.search.outlook import Outlook, outlook
from rsauto.search.space import Space

OBJECTIVE = Objective("eval_loss", minimize=True, untouched=9.0)


def sampled(space: Space, count: int, bowl: Bowl, seed: int = 0) -> list[tuple[TrialSpec, float]]:
    generator = np.random.default_rng(seed)
    specs = [space.spec(p) for p in surface._drawn(space.distributions(), generator)[:count]]
    return [(spec, bowl.loss(spec)) for spec in specs]


def test_the_expected_improvement_is_that_of_its_integral() -> None:
    """The posterior from the fitted kernel in plain linear algebra, the expectation by quad."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern, WhiteKernel

    generator = np.random.default_rng(0)
    at, where = generator.random((12, 2)), generator.random((6, 2))
    values = 2 + ((at - 0.5) ** 2).sum(1) + 0.01 * generator.normal(size=12)
    found = surface._expected_improvement(at, values, math.inf, np.empty((0, 2)), where)

    kernel = 1.0 * Matern(np.ones(2), (0.1, 10.0), nu=2.5) + WhiteKernel(0.1, (1e-4, 1.0))
    fitted = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0).fit(at, values)
    amplitude = fitted.kernel_.k1.k1.constant_value
    lengths = fitted.kernel_.k1.k2.length_scale
    noise = fitted.kernel_.k2.noise_level

    def covariance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        r = np.sqrt(5) * np.linalg.norm((a[:, None] - b[None]) / lengths, axis=2)
        return amplitude * (1 + r + r**2 / 3) * np.exp(-r)

    centre, scale = values.mean(), values.std()
    inverse = np.linalg.inv(covariance(at, at) + noise * np.eye(12))
    weights = inverse @ ((values - centre) / scale)
    best = (centre + scale * covariance(at, at) @ weights).min()
    across = covariance(where, at)
    means = centre + scale * across @ weights
    deviations = scale * np.sqrt(amplitude - np.einsum("ij,jk,ik->i", across, inverse, across))
    for improvement, mean, deviation in zip(found, means, deviations, strict=True):
        expected, _ = quad(
            lambda y, m=mean, s=deviation: (best - y) * norm.pdf(y, m, s),
            mean - 12 * deviation, best,
        )  # fmt: skip
        assert improvement == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_nothing_is_expected_before_there_are_enough_trials() -> None:
    space = space_of()
    trials = sampled(space, surface.LEAST_TRIALS, Bowl())
    assert surface.candidates(space, trials[:-1], (), 0) is None
    found = surface.candidates(space, trials, (), 0)
    assert found and found == surface.candidates(space, trials, (), 0)
    gains = [one.improvement for one in found]
    assert gains == sorted(gains, reverse=True) and gains[-1] >= 0
    tried = {spec.configuration() for spec, _ in trials}
    assert not tried & {one.spec.configuration() for one in found}


def seen_by(space: Space, record_of: Records, trials: list[tuple[TrialSpec, float]]) -> Known:
    settled: list[tuple[TrialSpec, TrialRecord]] = [
        (spec, record_of(spec, n, loss, flops=1e6 * (10 + spec.rank)))
        for n, (spec, loss) in enumerate(trials)
    ]
    return Known(settled, ())


def looked(space: Space, record_of: Records, trials: list[tuple[TrialSpec, float]]) -> Outlook:
    found = outlook(space.config, space, seen_by(space, record_of, trials), OBJECTIVE)
    assert found is not None
    return found


def test_an_explored_bowl_promises_nothing_and_an_open_slope_does(record_of: Records) -> None:
    bowl = Bowl(middle=math.log2(6e-4), best_rank=16)
    space = space_of(strategy="tpe")
    explored = looked(space, record_of, sampled(space, 60, bowl))
    assert not explored.is_worthwhile and explored.improvement < 0.002
    few = [t for t in sampled(space, 60, Bowl(best_rank=128, curvature=0.06)) if t[0].rank <= 8]
    slope = looked(space, record_of, few[:10])
    assert slope.is_worthwhile and slope.improvement > 2 * explored.improvement
    never = space_of(strategy="tpe", min_improvement=0)
    assert looked(never, record_of, sampled(never, 60, bowl)).is_worthwhile
    for strategy in ("random", "grid"):
        listed = space_of(strategy=strategy, learning_rate=[1e-4, 1e-3])
        known = seen_by(space, record_of, sampled(space, 60, bowl))
        assert outlook(listed.config, listed, known, OBJECTIVE) is None


def test_a_search_without_prospects_ends_and_the_defaults_and_seeds_still_run(
    record_of: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    bowl = Bowl(middle=math.log2(6e-4), best_rank=16)
    whole, early = (
        Landscape(space_of(trials=60, min_improvement=share), record_of, bowl)
        for share in (0.0, 0.01)
    )
    for run in (whole, early):
        run.run_packed(monkeypatch, 4)
    assert len(whole.ledger.settled()) == 60
    assert len(early.searched) < len(whole.searched)
    roles = [Counter(s.role for s, _ in run.ledger.settled()) for run in (early, whole)]
    assert roles[0]["default"] == 1
    for role in ("default_tuned", "seed"):
        assert roles[0][role] == roles[1][role] > 0


def test_of_two_equal_promises_the_cheaper_is_taken(record_of: Records) -> None:
    """The loss does not depend on rank at all, so neither does what is promised, nearly."""
    space = space_of(strategy="cost", rank=[4, 8, 64, 128], min_improvement=0)
    flat = Bowl(exponent=-0.25)
    trials = []
    for n, (spec, _) in enumerate(sampled(space, 16, flat)):
        offset = math.log2(spec.learning_rate / space.centre("rslora", spec.rank))
        trials.append((spec, 2.0 + 0.05 * (offset - 3) ** 2 + 1e-4 * (n % 3)))
    found = looked(space, record_of, trials)
    promised = surface.candidates(space, trials, (), seed=0)
    assert promised is not None
    # `seen_by` has trials cost 10 + r.
    best = max(promised, key=lambda one: one.improvement / (10 + one.spec.rank))
    assert found.best_for_its_time == best.spec
    assert best.spec.rank <= 8, "where less is promised, it is for far less"
    settled = [(s, record_of(s, n, loss, flops=1e6)) for n, (s, loss) in enumerate(trials)]
    same = outlook(space.config, space, Known(settled, ()), OBJECTIVE)
    assert same is not None
    assert same.best_for_its_time == promised[0].spec, "of one price the most promising"


def test_the_cost_of_ranks_is_a_line_that_does_not_fall() -> None:
    line = [(r, 7.0 + 0.5 * r) for r in (2, 8, 64)]
    assert surface.cost_of_ranks(line) == pytest.approx((7.0, 0.5))
    assert surface.cost_of_ranks([(8, 3.0), (8, 5.0)]) == (4.0, 0.0)
    assert surface.cost_of_ranks([(2, 9.0), (64, 5.0)]) == (7.0, 0.0)
    base, slope = surface.cost_of_ranks([(2, 1.0), (4, 1.0), (256, 400.0), (128, 100.0)])
    assert base + 2 * slope > 0, "a cost is never nothing"


def test_the_study_is_the_same_again(record_of: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for seed in (0, 1):
        run = Landscape(space_of(strategy="cost", trials=24), record_of, Bowl(), seed)
        run.run_packed(monkeypatch, 2, lookahead=2)
        runs.append(run.results())
    assert runs[0] == runs[1]
