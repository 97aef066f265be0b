"""Where in the plane of rank and learning rate the good trials are, and where trials failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pandas as pd

from rsauto.report.kinds import Look, kind_looks
from rsauto.report.noise import full_runs
from rsauto.report.panel import BLUE, GREY, SKY, Layer, Panel, rate_ticks
from rsauto.report.trial_layers import UNFINISHED, Axes, Scale
from rsauto.report.verdict import Verdict
from rsauto.units import objective_text, percent_text, rate_text

_BANDS: tuple[tuple[float, str, float], ...] = (
    (0.01, BLUE, 17.0),
    (0.03, SKY, 14.0),
    (0.10, "#F6C667", 11.0),
    (0.30, "#E07B39", 9.0),
    (float("inf"), "#A63603", 7.0),
)
"""How much worse than the best at most, as a share of it; colour; size. From blue to brown, which
no colour vision confuses, and from large to small for those who see or print in grey."""


def rate_map(trials: pd.DataFrame, verdict: Verdict) -> Panel | None:
    """Trials by rank and learning rate, coloured by how far they are from the best."""
    done = full_runs(trials, verdict.objective)
    if done["rank"].nunique() < 2 or done["learning_rate"].nunique() < 2:
        return None
    axes = Axes(verdict, Scale.of(trials, verdict), "rank")
    values = done[verdict.objective].astype(float)
    best = float(values.min() if verdict.minimize else values.max())
    behind = (values - best).abs() / (abs(best) or 1.0)
    there = set(done["kind"])
    looks = kind_looks(zip(trials["method"], trials["kind"], strict=True))
    looks = {kind: look for kind, look in looks.items() if kind in there}
    layers = []
    for (low, *_), (high, colour, size) in pairwise([(-1.0, "", 0.0), *_BANDS]):
        band = done[(behind > low) & (behind <= high)]
        name = f"within {percent_text(high)}" if high < 1 else f"over {percent_text(low)} worse"
        is_first = True
        for kind, (_, symbol, _) in looks.items():
            layer = _at_rates(axes, name, band[band["kind"] == kind])
            if layer.x:
                look = replace(layer, colour=colour, size=size, symbol=symbol)
                layers.append(replace(look, in_legend=is_first))
                is_first = False
    rest = trials.drop(index=done.index)
    for outcome, (symbol, colour) in UNFINISHED.items():
        layer = _at_rates(axes, outcome, rest[rest["outcome"] == outcome])
        layers.append(replace(layer, colour=colour, symbol=symbol, size=9.0))
    name = objective_text(verdict.objective)
    rates = trials["learning_rate"].astype(float)
    low, high = float(rates.min()), float(rates.max())
    return Panel(
        key="rate_map",
        title=f"Map of rank and learning rate: {name}",
        finding=_finding(done.iloc[int(behind.argmin())], name, is_only=len(looks) == 1),
        caption=f"Full-length trials by how much worse their {name} is than the best: the larger "
        f"and the bluer the better. {_symbols_told(looks)}What did not finish is drawn open.",
        x_label="rank",
        y_label="learning rate",
        layers=tuple(layer for layer in layers if layer.x),
        x_is_log=True,
        x_ticks=tuple((float(rank), str(rank)) for rank in sorted(set(trials["rank"]))),
        y_is_log=True,
        y_ticks=rate_ticks(low, high),
        y_range=(low / 1.6, high * 1.6),
    )


def _at_rates(axes: Axes, name: str, rows: pd.DataFrame) -> Layer:
    layer = axes.points(name, rows)
    return replace(layer, y=tuple(float(rate) for rate in rows["learning_rate"]), colour=GREY)


def _finding(best: pd.Series[Any], name: str, *, is_only: bool) -> str:
    place = f"rank {best['rank']}, learning rate {rate_text(float(best['learning_rate']))}"
    kind = "" if is_only else f" ({best['kind']})"
    return f"The best {name} of a single trial is at {place}{kind}."


def _symbols_told(looks: Mapping[str, Look]) -> str:
    if len(looks) < 2:
        return ""
    told = {"circle": "discs", "square": "squares", "up": "triangles", "diamond": "diamonds"}
    kinds: dict[str, list[str]] = {}
    for kind, (_, symbol, _) in looks.items():
        kinds.setdefault(told[symbol], []).append(kind)
    text = ", ".join(f"{symbols} are {' or '.join(names)}" for symbols, names in kinds.items())
    return f"{text[0].upper()}{text[1:]}. "
