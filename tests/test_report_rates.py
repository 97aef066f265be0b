"""The law of the learning rate as the report tells it, on trials that follow a known one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report_records import allocated, record, refit, with_loss, write_study

from rsauto.intervals import t_quantile
from rsauto.rate_law import RatePoint, fit_surface, fit_trials
from rsauto.records import TrialRecord
from rsauto.report.page import write_report
from rsauto.report.rate_figure import rates_panel
from rsauto.report.rates import RateFinding, rate_findings

RANKS = (4, 8, 16, 32, 64)
FACTORS = (0.5, 1.0, 2.0)


def follow(
    exponent: float, wobble: float = 0.0, ranks: tuple[int, ...] = RANKS, **changes: Any
) -> list[TrialRecord]:
    """ln L = -0.1 rho + 0.05 (x - m - s rho)^2, plus what no surface of second order follows.

    That is as large as ``wobble`` at most, and leaves the fitted exponent where it is.
    """
    points = [(rank, factor) for rank in ranks for factor in FACTORS]
    rates = [2e-3 * (rank / 8) ** exponent * factor for rank, factor in points]
    x, rho = np.log2(rates), np.log2([float(rank) for rank, _ in points])
    design = np.stack([np.ones_like(x), rho, rho**2, x, x**2, x * rho], axis=1)
    bumps = np.array([(1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0)[n % 7] for n in range(len(x))])
    bumps -= design @ np.linalg.lstsq(design, bumps, rcond=None)[0]
    bumps *= wobble / np.abs(bumps).max()
    found = []
    for number, (rank, factor) in enumerate(points):
        log_loss = -0.1 * math.log2(rank / 8) + 0.05 * math.log2(factor) ** 2 + bumps[number]
        trial = record(number, rank, rates[number], **changes)
        found.append(with_loss(trial, math.exp(log_loss)))
    return found


def only(records: list[TrialRecord]) -> RateFinding:
    (found,) = rate_findings(records)
    return found


def test_trials_that_follow_the_prior_agree() -> None:
    found = only(follow(-0.25, wobble=0.002))
    assert found.law is not None and found.prior == -0.25 and found.says == "agree"
    assert found.law.exponent == pytest.approx(-0.25) and found.law.num_trials == 15
    assert found.sentence == (
        f"Learning rate moves with rank as r^-0.25 (95 % {found.law.low:.2f} to "
        f"{found.law.high:.2f}, 15 trials); the prior for rsLoRA under AdamW is r^-0.25: "
        "they agree."
    )


def test_trials_that_contradict_the_prior_say_so() -> None:
    found = only(follow(0.3))
    assert found.law is not None and found.law.exponent == pytest.approx(0.3, abs=1e-9)
    assert found.says == "contradict"
    assert found.sentence.endswith("is r^-0.25: they contradict each other.")


def test_too_few_trials_are_said_to_be_too_few() -> None:
    few = only(follow(-0.25)[:5])
    assert (few.says, few.law, len(few.trials)) == ("too few", None, 5)
    assert few.sentence == (
        "The prior for rsLoRA under AdamW is r^-0.25; 5 search trials at full length are too few "
        "to tell whether the rate moves so."
    )
    assert "1 search trial at full length is too few" in only(follow(-0.25)[:1]).sentence


def test_an_interval_that_both_rules_are_in_tells_nothing() -> None:
    found = only(follow(-0.25, wobble=0.02, ranks=(4, 8, 16)))
    assert found.law is not None and found.law.half_width > 0.25
    assert found.law.low < -0.25 < found.law.high and found.says == "too wide"
    assert "the interval is too wide to tell" in found.sentence


@pytest.mark.parametrize(
    ("changes", "prior"),
    [
        ({"method": "lora"}, 0.0),
        ({"method": "lora", "optimizer": "sgd"}, 1.0),
        ({"optimizer": "sgd"}, 0.0),
        ({"scaling_exponent": -0.25}, -0.375),
    ],
)
def test_the_prior_is_that_of_rule_and_optimizer(changes: dict[str, Any], prior: float) -> None:
    assert only(follow(prior, wobble=0.001, **changes)).prior == prior


def test_lora_under_adamw_has_a_rate_that_does_not_move() -> None:
    sentence = only(follow(0.0, wobble=0.002, method="lora")).sentence
    assert "the prior for LoRA under AdamW is r^0: they agree." in sentence


def test_adalora_adafactor_and_mixed_searches_have_no_law() -> None:
    assert rate_findings([]) == ()
    assert rate_findings([with_loss(allocated(0), 1.0)]) == ()
    assert rate_findings(follow(-0.25, optimizer="adafactor")) == ()
    assert rate_findings([*follow(-0.25), record(99, 8, 1e-3, optimizer="sgd")]) == ()


def test_only_search_trials_at_full_length_count() -> None:
    search = follow(-0.25, wobble=0.002)
    best = with_loss(record(90, 8, 1e-4), 1e-3)
    others = [
        replace(best, number=90, outcome="pruned", fidelity=0.25),
        replace(best, number=91, role="default_tuned"),
        replace(best, number=92, role="seed", seed=1),
        with_loss(refit(93), 1e-3),
        replace(best, number=94, outcome="diverged"),
        replace(best, number=95, outcome="complete", eval_loss=None),
    ]
    assert only([*search, *others]).trials == only(search).trials
    assert only([*search, *others]).law == only(search).law


def test_the_surface_is_least_where_the_law_says() -> None:
    points = [RatePoint(r.rank, r.learning_rate, r.eval_loss or 0) for r in follow(-0.4)]
    surface = fit_surface(points)
    assert surface is not None and fit_trials(points) == surface.law
    for rank in RANKS:
        x, half = surface.best(rank)
        assert 2**x == pytest.approx(2e-3 * (rank / 8) ** -0.4) and half < 1e-5


@pytest.mark.parametrize("along", [*np.eye(6), np.arange(1.0, 7.0)], ids=[*"012345", "all"])
def test_the_interval_of_the_best_rate_is_that_of_the_delta_method(along: Any) -> None:
    """With coefficients uncertain along one line, the half width is t times the slope in it."""
    points = [
        RatePoint(r.rank, r.learning_rate, r.eval_loss or 0) for r in follow(-0.25, wobble=0.01)
    ]
    surface = fit_surface(points)
    assert surface is not None
    surface = replace(surface, covariance=np.outer(along, along))
    moved = [
        replace(surface, coefficients=surface.coefficients + step * along) for step in (1e-6, -1e-6)
    ]
    t = t_quantile(surface.freedom)
    slope = (moved[0].best(64)[0] - moved[1].best(64)[0]) / 2e-6
    assert surface.best(64)[1] == pytest.approx(t * abs(slope), rel=1e-4, abs=1e-6)
    slope = (moved[0].law.exponent - moved[1].law.exponent) / 2e-6
    assert surface.law.half_width == pytest.approx(t * abs(slope), rel=1e-4, abs=1e-6)


def test_the_figure_has_trials_both_laws_and_the_band() -> None:
    panel = rates_panel(follow(-0.4, wobble=0.003))
    assert panel is not None and panel.x_is_log and panel.y_is_log
    band, prior, law, rest, best = panel.layers
    assert [layer.name for layer in panel.layers] == [
        "rsLoRA, 95 % interval", "rsLoRA, prior law", "rsLoRA, fitted law",
        "rsLoRA, other trials", "rsLoRA, best of a rank",
    ]  # fmt: skip
    assert (len(rest.x), len(best.x)) == (10, 5)
    assert (prior.dash, law.dash) == ("dash", "solid")
    octaves = math.log2(RANKS[-1] / RANKS[0])
    assert math.log2(prior.y[-1] / prior.y[0]) / octaves == pytest.approx(-0.25)
    assert math.log2(law.y[-1] / law.y[0]) / octaves == pytest.approx(-0.4)
    assert all(low < y < high for low, y, high in zip(band.y, law.y, band.y_high, strict=True))
    assert panel.y_range is not None
    low, high = panel.y_range
    assert low < min(rest.y) and max(rest.y) < high


def test_without_a_fit_the_figure_shows_the_prior_through_the_bests() -> None:
    panel = rates_panel(follow(-0.25)[:6])
    assert panel is not None
    prior = panel.layers[0]
    assert prior.name == "rsLoRA, prior law" and len(panel.layers) == 3
    assert (prior.y[0], prior.y[-1]) == pytest.approx((2e-3 * 2**0.25, 2e-3))
    one_rank = rates_panel(follow(-0.25)[:3])
    assert one_rank is not None and [layer.symbol for layer in one_rank.layers] == ["circle"] * 2
    assert rates_panel([with_loss(allocated(0), 1.0)]) is None


@pytest.mark.parametrize("exponent", [-0.25, 0.3])
def test_the_report_says_it_everywhere(tmp_path: Path, exponent: float) -> None:
    records = follow(exponent, wobble=0.002)
    write_report(write_study(tmp_path, records))
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert only(records).sentence.split("; ")[1] in text
    assert (tmp_path / "figures" / "rate_law.svg").exists()
