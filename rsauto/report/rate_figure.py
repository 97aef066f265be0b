"""The figure of learning rates against ranks, with the prior law and the fitted one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rsauto.rate_law import RatePoint
from rsauto.records import TrialRecord
from rsauto.report.kinds import kind_looks, kind_of
from rsauto.report.panel import GREY, Layer, Panel, rate_ticks
from rsauto.report.rates import RateFinding, rate_findings
from rsauto.units import rate_text, value_text

_ROOM = 1.6
"""By what factor the axis goes beyond the lowest and the highest rate tried."""

_NUM_POINTS = 33
"""Of the edges of a band."""


def rates_panel(records: Sequence[TrialRecord]) -> Panel | None:
    """Search trials at full length by rank and learning rate; None where none has a law."""
    findings = [finding for finding in rate_findings(records) if finding.trials]
    if not findings:
        return None
    points = [point for finding in findings for point in finding.trials]
    ranks = sorted({point.rank for point in points})
    rates = [point.rate for point in points]
    low, high = min(rates) / _ROOM, max(rates) * _ROOM
    looks = kind_looks((record.method, kind_of(record)) for record in records)
    layers = [layer for f in findings for layer in _layers(f, looks[f.kind][0], (low, high))]
    return Panel(
        key="rate_law",
        title="Best learning rate against rank",
        finding=" ".join(finding.sentence for finding in findings),
        caption="Search trials at full length; the large ones have the lowest eval loss of their "
        "rank. Dashed is the prior law through their middle, solid the law fitted to the trials "
        "with the 95 % interval of the best rate at each rank, where they are enough to tell it.",
        x_label="rank",
        y_label="learning rate",
        layers=tuple(layers),
        x_is_log=True,
        x_ticks=tuple((float(rank), str(rank)) for rank in ranks),
        y_is_log=True,
        y_ticks=rate_ticks(min(rates), max(rates)),
        y_range=(low, high),
    )


def _layers(finding: RateFinding, colour: str, limits: tuple[float, float]) -> list[Layer]:
    name = finding.kind
    best = _best_of_ranks(finding.trials)
    rest = [point for point in finding.trials if point not in best]
    return [
        *_laws(finding, name, colour, limits),
        *([_trials(rest, f"{name}, other trials", colour, 6.0, 0.45)] if rest else []),
        _trials(best, f"{name}, best of a rank", colour, 11.0, 1.0),
    ]


def _trials(
    points: Sequence[RatePoint], name: str, colour: str, size: float, opacity: float
) -> Layer:
    return Layer(
        name=name,
        x=tuple(float(point.rank) for point in points),
        y=tuple(point.rate for point in points),
        colour=colour,
        symbol="circle",
        size=size,
        opacity=opacity,
        hover=tuple(
            f"rank {p.rank}, learning rate {rate_text(p.rate)}\neval loss {value_text(p.loss)}"
            for p in points
        ),
    )


def _laws(finding: RateFinding, name: str, colour: str, limits: tuple[float, float]) -> list[Layer]:
    """Band, fitted law and prior over the ranks tried; nothing over a single rank."""
    low, high = (end([math.log2(p.rank) for p in finding.trials]) for end in (min, max))
    if low == high:
        return []
    ranks = [2 ** (low + (high - low) * i / (_NUM_POINTS - 1)) for i in range(_NUM_POINTS)]
    centre, rate = _centre(finding)
    prior = Layer(
        name=f"{name}, prior law",
        x=tuple(ranks),
        y=tuple(rate * (rank / centre) ** finding.prior for rank in ranks),
        colour=GREY,
        dash="dash",
    )
    if finding.surface is None or finding.is_vague:
        return [prior]
    middle = [finding.surface.best(rank) for rank in ranks]
    band = Layer(
        name=f"{name}, 95 % interval",
        x=tuple(ranks),
        y=tuple(_drawn(x - half, limits) for x, half in middle),
        y_high=tuple(_drawn(x + half, limits) for x, half in middle),
        colour=colour,
        opacity=0.18,
    )
    line = Layer(
        name=f"{name}, fitted law",
        x=tuple(ranks),
        y=tuple(_drawn(x, limits) for x, _ in middle),
        colour=colour,
        dash="solid",
    )
    return [band, prior, line]


def _centre(finding: RateFinding) -> tuple[float, float]:
    """The rank and rate through which the prior is drawn: where the fitted law is at the trials'
    mean rank, else the geometric means over ranks of their best."""
    if finding.surface is not None and not finding.is_vague:
        rank = 2.0**finding.surface.mean_rho
        return rank, 2.0 ** finding.surface.best(rank)[0]
    best = _best_of_ranks(finding.trials)
    ranks, rates = ([math.log2(v) for v in values] for values in zip(
        *((p.rank, p.rate) for p in best), strict=True))  # fmt: skip
    return 2 ** (sum(ranks) / len(ranks)), 2 ** (sum(rates) / len(rates))


def _best_of_ranks(points: Sequence[RatePoint]) -> list[RatePoint]:
    ranks = sorted({point.rank for point in points})
    return [min((p for p in points if p.rank == r), key=lambda p: p.loss) for r in ranks]


def _drawn(x: float, limits: tuple[float, float]) -> float:
    """The rate 2^x, no further than the ends of the axis: an interval may span many decades."""
    low, high = (math.log2(limit) for limit in limits)
    return float(2.0 ** min(max(x, low), high))
