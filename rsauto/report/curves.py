"""How the loss fell and how large the gradients were, by rank and scaling rule.

These are figures 2 and 3 of the rsLoRA paper (arXiv:2312.03732) for the study's own model and data:
with alpha/r the curves of larger ranks collapse and their gradients shrink, with alpha/sqrt(r) they
should do neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rsauto.records import TrialRecord
from rsauto.report.kinds import kind_looks, kind_of, refit_text
from rsauto.report.panel import Layer, Panel, rank_looks
from rsauto.report.table import is_refit
from rsauto.report.verdict import Verdict
from rsauto.units import rate_text, value_text

_Kind = tuple[int, str, bool]
"""Rank, kind, and whether it is a refit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Quantity:
    """Something that is recorded at every evaluation."""

    key: str
    field: str
    tab: str
    label: str
    caption: str


_QUANTITIES = (
    _Quantity(
        key="curves",
        field="eval_loss",
        tab="Loss",
        label="eval loss",
        caption="Validation loss at every evaluation.",
    ),
    _Quantity(
        key="grad_norms",
        field="grad_norm",
        tab="Gradient norm",
        label="mean gradient norm",
        caption="Mean Frobenius norm over the trained tensors, before clipping. A scaling rule "
        "that suits every rank keeps it from shrinking as rank grows; the trials also differ in "
        "learning rate, and part of what is seen is due to that.",
    ),
)

_LOOKS = (
    "Strong lines are the best full-length trial of each rank and kind, or the one that came "
    "furthest where none finished; the others are faint, dotted if they were stopped, and a point "
    "where that was at the first evaluation. Colour and symbol tell the rank, the dash the kind "
    "(solid rsLoRA, dashed LoRA, dotted AdaLoRA, others as in the legend)."
)


def curve_panels(records: Sequence[TrialRecord], verdict: Verdict) -> tuple[Panel, ...]:
    """Validation loss and gradient norm over the steps, as far as they were recorded."""
    found = (_panel(records, verdict, quantity) for quantity in _QUANTITIES)
    return tuple(panel for panel in found if panel is not None)


def _panel(records: Sequence[TrialRecord], verdict: Verdict, quantity: _Quantity) -> Panel | None:
    """The trials of a kind that are not its best are one line with gaps: plotly would take seconds
    for a thousand lines."""
    kinds: dict[_Kind, list[TrialRecord]] = {}
    for record in sorted(records, key=lambda r: (r.rank, r.method, r.number)):
        if _curve(record, quantity):
            kind = (record.rank, kind_of(record), is_refit(record))
            kinds.setdefault(kind, []).append(record)
    if not kinds:
        return None
    best = {kind: _best(group, verdict) for kind, group in kinds.items()}
    looks = rank_looks(rank for rank, _, _ in kinds)
    faint = []
    for kind, group in kinds.items():
        alike: dict[tuple[bool, bool], list[TrialRecord]] = {}
        for record in group:
            if record is not best[kind]:
                is_point = len(_curve(record, quantity)) == 1
                alike.setdefault((not _is_whole(record), is_point), []).append(record)
        for (_, is_point), rest in sorted(alike.items()):
            colour, symbol = looks[kind[0]]
            line = _faint(_name(kind), rest, quantity, colour)
            if is_point:  # a line of one point is not drawn
                line = replace(line, dash=None, symbol=symbol, size=5.0)
            faint.append(replace(line, opacity=0.4 if len(records) <= 100 else 0.15))
    of_kinds = kind_looks((record.method, kind_of(record)) for record in records)
    strong = [_strong(kind, record, quantity) for kind, record in best.items()]
    shown = [
        replace(
            layer, colour=looks[kind[0]][0], symbol=looks[kind[0]][1], dash=of_kinds[kind[1]][2]
        )
        for kind, layer in zip(kinds, strong, strict=True)
    ]
    return Panel(
        key=quantity.key,
        group="curves",
        tab=quantity.tab,
        title=f"{quantity.tab} by rank and scaling rule",
        finding=_ends(best, quantity),
        caption=f"{quantity.caption} {_LOOKS}",
        x_label="step",
        y_label=quantity.label,
        layers=(*faint, *shown),
        y_range=_y_range(shown),
    )


def _curve(record: TrialRecord, quantity: _Quantity) -> list[tuple[float, float]]:
    found = ((float(p.step), float(getattr(p, quantity.field))) for p in record.curve)
    return [(step, value) for step, value in found if math.isfinite(value)]


def _is_whole(record: TrialRecord) -> bool:
    return record.outcome == "complete" and (record.fidelity or 1.0) > 1 - 1e-6


def _best(group: Iterable[TrialRecord], verdict: Verdict) -> TrialRecord:
    """By the objective among those that finished, else by the steps done."""

    def order(record: TrialRecord) -> tuple[float, float]:
        if not _is_whole(record):
            return (math.inf, -record.curve[-1].step)
        value = getattr(record, verdict.objective, record.metrics.get(verdict.objective))
        if value is None:
            return (math.inf, -math.inf)
        return (value if verdict.minimize else -value, 0.0)

    return min(group, key=order)


def _name(kind: _Kind) -> str:
    rank, name, refit = kind
    return f"{refit_text(name, refit)} {rank}"


def _strong(kind: _Kind, record: TrialRecord, quantity: _Quantity) -> Layer:
    points = _curve(record, quantity)
    setting = f"trial {record.number}, {_name(kind)}, {record.outcome}"
    rate = f"alpha {record.alpha}, learning rate {rate_text(record.learning_rate)}"
    return Layer(
        name=_name(kind),
        x=tuple(step for step, _ in points),
        y=tuple(value for _, value in points),
        colour="",
        size=7.0,
        hover=tuple(
            f"{setting}\n{rate}\nstep {step:.0f}: {quantity.label} {value_text(value)}"
            for step, value in points
        ),
    )


def _faint(name: str, rest: Sequence[TrialRecord], quantity: _Quantity, colour: str) -> Layer:
    """All in one line, broken between two trials."""
    x: list[float] = []
    y: list[float] = []
    hover: list[str] = []
    for record in rest:
        for step, value in [*_curve(record, quantity), (math.nan, math.nan)]:
            x.append(step)
            y.append(value)
            hover.append(f"trial {record.number}, {name}, {record.outcome}")
    return Layer(
        name=name,
        x=tuple(x[:-1]),
        y=tuple(y[:-1]),
        colour=colour,
        width=1.0,
        dash="solid" if _is_whole(rest[0]) else "dot",
        hover=tuple(hover[:-1]),
        in_legend=False,
    )


def _y_range(strong: Sequence[Layer]) -> tuple[float, float]:
    """That of the best trials: a hopeless one would flatten them."""
    values = [value for layer in strong for value in layer.y]
    low, high = min(values), max(values)
    pad = 0.06 * (high - low or abs(high) or 1.0)
    return low - pad, high + pad


def _ends(best: Mapping[_Kind, TrialRecord], quantity: _Quantity) -> str:
    """'At the end of the best trial of each: rsLoRA 8 2.063, rsLoRA 16 1.974.'"""
    ends = [
        f"{_name(kind)} {value_text(_curve(record, quantity)[-1][1])}"
        for kind, record in best.items()
    ]
    return f"At the end of the best trial of each: {', '.join(ends[:24])}."
