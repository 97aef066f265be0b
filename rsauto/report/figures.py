"""What the figures show. The page and report.md draw the same panels, so they cannot disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from rsauto.records import TrialRecord
from rsauto.report.curves import curves_panel
from rsauto.report.noise import configurations, full_runs
from rsauto.report.panel import (
    BLUE,
    GREEN,
    GREY,
    METHOD_COLOURS,
    ORANGE,
    RANK_COLOURS,
    VERMILLION,
    HeatMap,
    Layer,
    Panel,
    Symbol,
    rate_ticks,
)
from rsauto.report.pareto import pareto
from rsauto.report.predictions import predictions_panel
from rsauto.report.rank_map import rank_map
from rsauto.report.rate_figure import rates_panel
from rsauto.report.table import cost_bytes, table
from rsauto.report.verdict import Verdict
from rsauto.report.wording import noise_remark
from rsauto.units import (
    byte_unit,
    bytes_text,
    mean_text,
    method_text,
    objective_text,
    rank_text,
    rate_text,
    value_text,
)

_RANK_SYMBOLS: tuple[Symbol, ...] = ("circle", "square", "diamond", "up", "down")
_KINDS: tuple[tuple[str, Symbol, str], ...] = (
    ("searched", "circle", "{}"),
    ("default", "square", "{}, default adapter"),
    ("refit", "up", "{} refit, AdaLoRA's ranks"),
)
"""Trials that finished: what sort, how drawn, and called in the legend."""
_AT_THE_EDGE = "Trials without a value, or far off the scale, stand at the edge."
_UNFINISHED: dict[str, tuple[Symbol, str]] = {
    "pruned": ("down", GREY),
    "diverged": ("cross", VERMILLION),
    "oom": ("plus", VERMILLION),
    "infeasible": ("ring", VERMILLION),
    "failed": ("cross", GREY),
}


def panels(records: Sequence[TrialRecord], verdict: Verdict) -> tuple[Panel | HeatMap, ...]:
    """The figures for which the records have something to show."""
    trials = table(records)
    if verdict.objective not in trials.columns or trials[verdict.objective].notna().sum() == 0:
        return ()
    found = (
        _memory(trials, verdict),
        _by_rank(trials, verdict),
        _learning_rates(trials, verdict),
        rates_panel(records),
        rank_map(records, verdict),
        curves_panel(records),
        predictions_panel(trials),
    )
    return tuple(panel for panel in found if panel is not None)


@dataclass(frozen=True, slots=True)
class _Scale:
    """The part of the objective's axis worth seeing, and the edge where the rest is drawn."""

    low: float
    high: float
    edge: float

    def place(self, value: float | None) -> float:
        """The height at which a value is drawn; none, or one off the scale, goes to the edge."""
        if value is None or not self.low <= value <= self.high:
            return self.edge
        return value


def _scale(trials: pd.DataFrame, verdict: Verdict) -> _Scale:
    """From the best value to the worst, but no further than twice the middle half's spread
    beyond the quarter that is worse: one hopeless learning rate would flatten all else."""
    values = full_runs(trials, verdict.objective)[verdict.objective].astype(float)
    if values.empty:
        values = trials[verdict.objective].dropna().astype(float)
    lower, upper = float(values.quantile(0.25)), float(values.quantile(0.75))
    reach = 2 * (upper - lower)
    low, high = float(values.min()), float(values.max())
    if verdict.minimize:
        high = min(high, upper + reach)
    else:
        low = max(low, lower - reach)
    pad = 0.06 * (high - low or abs(high) or 1.0)
    low, high = low - pad, high + pad
    return _Scale(low, high, high + pad if verdict.minimize else low - pad)


def _y_range(scale: _Scale) -> tuple[float, float]:
    pad = abs(scale.high - scale.low) * 0.05
    return min(scale.low, scale.edge) - pad, max(scale.high, scale.edge) + pad


def _points(
    name: str, rows: pd.DataFrame, x: str, divisor: float, verdict: Verdict, scale: _Scale
) -> Layer:
    """A layer of trials; colour and symbol are the caller's."""
    values = [None if pd.isna(v) else float(v) for v in rows[verdict.objective]]
    return Layer(
        name=name,
        x=tuple(float(v) / divisor for v in rows[x]),
        y=tuple(scale.place(v) for v in values),
        colour=GREY,
        hover=tuple(_hover(row, verdict.objective) for _, row in rows.iterrows()),
    )


def _hover(row: pd.Series[Any], objective: str) -> str:
    """Lines about a trial, joined by newlines."""
    value = row[objective]
    peak = row["predicted_peak_bytes"]
    start = None if pd.isna(row["init_rank"]) else int(row["init_rank"])
    lines = [
        f"trial {row['number']}, {row['outcome']}, seed {row['seed']}",
        f"{method_text(row['method'], is_refit=row['refit'])} rank "
        f"{rank_text(row['rank'], start)}, alpha {row['alpha']}, "
        f"learning rate {rate_text(row['learning_rate'])}",
        f"{objective_text(objective)} {value_text(None if pd.isna(value) else float(value))}",
        f"predicted peak {bytes_text(None if pd.isna(peak) else int(peak))}",
    ]
    if not pd.isna(row["r_max"]) and row["r_max"] > row["rank"]:
        lines.insert(2, f"largest rank of a module {row['r_max']}")
    if row["engine"] == "packed":
        size = "" if pd.isna(row["pack_size"]) else f" of up to {row['pack_size']}"
        lines.append(f"trained in a pack{size}; the peak is that of the trial alone")
    return "\n".join(lines)


def _trial_layers(
    trials: pd.DataFrame, x: str, divisor: float, verdict: Verdict, scale: _Scale
) -> list[Layer]:
    """All trials: those that finished by method, the rest by how they ended."""
    trials = trials[trials[x].notna()]
    done = full_runs(trials, verdict.objective)
    kind = _is_default(done).map({True: "default", False: "searched"})
    kind = kind.mask(done["refit"], "refit")
    layers = []
    for method in sorted(done["method"].unique(), reverse=True):
        colour = METHOD_COLOURS.get(method, GREY)
        for which, symbol, name in _KINDS:
            rows = done[(done["method"] == method) & (kind == which)]
            layer = _points(name.format(method_text(method)), rows, x, divisor, verdict, scale)
            layers.append(replace(layer, colour=colour, symbol=symbol, opacity=0.9))
    rest = trials.drop(index=done.index)
    for outcome, (symbol, colour) in _UNFINISHED.items():
        layer = _points(outcome, rest[rest["outcome"] == outcome], x, divisor, verdict, scale)
        layers.append(replace(layer, colour=colour, symbol=symbol, size=9.0))
    return [layer for layer in layers if layer.x]


def _is_default(done: pd.DataFrame) -> pd.Series[bool]:
    """Trials of the default adapter, those that repeat it on another seed included."""
    rows = configurations(done)
    ours = rows[rows["roles"].str.contains("default", regex=False).astype(bool)]
    numbers = {int(number) for joined in ours["numbers"] for number in joined.split(",")}
    return done["number"].isin(numbers)


def _marked(x: str, divisor: float, verdict: Verdict, scale: _Scale) -> list[Layer]:
    """The means the verdict is about."""
    shown: tuple[tuple[str, str, Symbol, str], ...] = (
        ("default_tuned", "tuned default", "diamond", ORANGE),
        ("best", "best", "diamond", GREEN),
        ("recommended", "recommended", "star", VERMILLION),
    )
    layers = []
    for key, name, symbol, colour in shown:
        standing = verdict.standings.get(key)
        if standing is None:
            continue
        at = standing.need_bytes if x == "memory_bytes" else getattr(standing.record, x)
        if at is None:
            continue
        seeds = f", mean of {standing.num_seeds} seeds" if standing.num_seeds > 1 else ""
        layers.append(
            Layer(
                name=name,
                x=(at / divisor,),
                y=(scale.place(standing.objective),),
                colour=colour,
                symbol=symbol,
                size=15.0,
                half_width=standing.half_width,
                hover=(f"{name}{seeds}\nrank {standing.record.rank}: "
                       f"{mean_text(standing.objective, standing.half_width)}",),
            )
        )  # fmt: skip
    return layers


def _memory(trials: pd.DataFrame, verdict: Verdict) -> Panel | None:
    x = "memory_bytes"
    trials = trials.assign(memory_bytes=cost_bytes(trials))
    if trials[x].notna().sum() == 0:
        return None
    divisor, unit = byte_unit(float(trials[x].max()))
    scale = _scale(trials, verdict)
    front = pareto(trials, x, verdict.objective, verdict.minimize)
    line = Layer(
        name="Pareto front",
        x=tuple(float(v) / divisor for v in front[x]),
        y=tuple(scale.place(float(v)) for v in front[verdict.objective]),
        colour=BLUE,
        dash="solid",
        is_step=True,
        opacity=0.8,
    )
    name = objective_text(verdict.objective)
    budget = verdict.memory_budget_bytes
    # A budget far beyond every trial would squeeze them into a corner: it is told, not drawn.
    is_near = budget is not None and budget < 4 * float(trials[x].max())
    told = f" The memory budget is {bytes_text(budget)}." if budget is not None else ""
    return Panel(
        key="memory",
        title=f"What memory buys: {name} against memory",
        caption="Every trial at the smallest budget it can be trained in alone, as predicted. The "
        f"line joins the trials that no other beats in both. {noise_remark(verdict)} "
        f"{_AT_THE_EDGE}{told}",
        x_label=f"smallest memory budget ({unit})",
        y_label=name,
        layers=(*([line] if line.x else []), *_trial_layers(trials, x, divisor, verdict, scale),
                *_marked(x, divisor, verdict, scale)),
        y_range=_y_range(scale),
        x_limit=budget / divisor if budget is not None and is_near else None,
        x_limit_name="memory budget",
    )  # fmt: skip


def _by_rank(trials: pd.DataFrame, verdict: Verdict) -> Panel:
    scale = _scale(trials, verdict)
    done = full_runs(trials, verdict.objective)
    lines = []
    for (method, refit), group in done.groupby(["method", "refit"]):
        best = group.groupby("rank")[verdict.objective]
        line = (best.min() if verdict.minimize else best.max()).sort_index()
        lines.append(
            Layer(
                name=f"best of {method_text(str(method), is_refit=bool(refit))}",
                x=tuple(float(rank) for rank in line.index),
                y=tuple(scale.place(float(v)) for v in line),
                colour=METHOD_COLOURS.get(str(method), GREY),
                dash="dot" if refit else "solid",
            )
        )
    name = objective_text(verdict.objective)
    return Panel(
        key="rank",
        title=f"What rank buys: {name} against rank",
        caption="The line follows the best single trial of each rank; all trials are shown, means "
        f"over seeds with their 95 % intervals. {noise_remark(verdict)} {_AT_THE_EDGE}",
        x_label="rank",
        y_label=name,
        layers=(*(line for line in lines if len(line.x) > 1),
                *_trial_layers(trials, "rank", 1.0, verdict, scale),
                *_marked("rank", 1.0, verdict, scale)),
        x_is_log=True,
        x_ticks=tuple((float(rank), str(rank)) for rank in sorted(set(trials["rank"]))),
        y_range=_y_range(scale),
    )  # fmt: skip


def _learning_rates(trials: pd.DataFrame, verdict: Verdict) -> Panel | None:
    scale = _scale(trials, verdict)
    done = full_runs(trials, verdict.objective).sort_values("learning_rate", kind="stable")
    layers = []
    kinds = sorted(set(zip(trials["rank"], trials["method"], trials["refit"], strict=True)))
    for (rank, method, refit), rows in done.groupby(["rank", "method", "refit"]):
        index = kinds.index((rank, method, refit))
        layer = _points("", rows, "learning_rate", 1.0, verdict, scale)
        layers.append(
            replace(
                layer,
                name=f"{method_text(str(method), is_refit=bool(refit))} {rank}",
                colour=RANK_COLOURS[index % len(RANK_COLOURS)],
                symbol=_RANK_SYMBOLS[index % len(_RANK_SYMBOLS)],
                dash="dash" if method == "lora" else "solid",
                opacity=0.95,
            )
        )
    if not layers:
        return None
    name = objective_text(verdict.objective)
    return Panel(
        key="learning_rate",
        title=f"Every rank's learning rate: {name} against it",
        caption="Full-length trials, one line a method and rank. Where the best point is at the "
        f"end of a line, a wider range of learning rates may do better. {_AT_THE_EDGE}",
        x_label="learning rate",
        y_label=name,
        layers=tuple(layers),
        x_is_log=True,
        x_ticks=rate_ticks(float(done["learning_rate"].min()), float(done["learning_rate"].max())),
        y_range=_y_range(scale),
    )
