"""Trials as points of a figure, drawn the same in all figures of the objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from rsauto.report.kinds import kind_looks, refit_text
from rsauto.report.noise import configurations, full_runs
from rsauto.report.panel import (
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    Layer,
    Symbol,
)
from rsauto.report.verdict import Verdict
from rsauto.units import (
    bytes_text,
    count_text,
    mean_text,
    objective_text,
    rank_text,
    rate_text,
    seconds_text,
    value_text,
)

AT_THE_EDGE = "Trials without a value, or far off the scale, stand at the edge."

UNFINISHED: dict[str, tuple[Symbol, str]] = {
    "pruned": ("down", GREY),
    "diverged": ("cross", VERMILLION),
    "oom": ("plus", VERMILLION),
    "infeasible": ("ring", VERMILLION),
    "failed": ("bar", GREY),
}
"""How trials are drawn that did not finish: open symbols, told apart by shape as by colour."""

_SORTS: tuple[tuple[str, Symbol | None, str], ...] = (
    ("searched", None, "{}"),
    ("default", "right", "{}, default adapter"),
    ("refit", "left", "{} refit, AdaLoRA's ranks"),
)
"""Trials that finished: what sort, how drawn (None: as the kind), and called in the legend."""


_TOLD = ("number", "outcome", "seed", "kind", "refit", "rank", "init_rank", "r_max", "alpha",
         "learning_rate", "predicted_peak_bytes", "measured_peak_bytes", "flops", "train_seconds",
         "engine", "pack_size")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scale:
    """The part of the objective's axis worth seeing, and the edge where the rest is drawn."""

    low: float
    high: float
    edge: float

    @classmethod
    def of(cls, trials: pd.DataFrame, verdict: Verdict) -> Scale:
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
        return cls(low, high, high + pad if verdict.minimize else low - pad)

    def place(self, value: float | None) -> float:
        """The height at which a value is drawn; none, or one off the scale, goes to the edge."""
        if value is None or not self.low <= value <= self.high:
            return self.edge
        return value

    @property
    def y_range(self) -> tuple[float, float]:
        pad = abs(self.high - self.low) * 0.05
        return min(self.low, self.edge) - pad, max(self.high, self.edge) + pad


@dataclass(frozen=True, slots=True)
class Axes:
    """What every figure of the objective is drawn on."""

    verdict: Verdict
    scale: Scale
    x: str
    """A column of the table."""
    divisor: float = 1.0
    """Of x, for its unit."""

    def points(self, name: str, rows: pd.DataFrame) -> Layer:
        """A layer of trials; colour and symbol are the caller's."""
        values = [None if pd.isna(v) else float(v) for v in rows[self.verdict.objective]]
        return Layer(
            name=name,
            x=tuple(float(v) / self.divisor for v in rows[self.x]),
            y=tuple(self.scale.place(v) for v in values),
            colour=GREY,
            hover=tuple(rows["hover"]),
        )

    def trials(self, trials: pd.DataFrame) -> list[Layer]:
        """All trials: those that finished by kind, the rest by how they ended."""
        trials = trials[trials[self.x].notna()]
        done = full_runs(trials, self.verdict.objective)
        which = _is_default(done).map({True: "default", False: "searched"})
        which = which.mask(done["refit"], "refit")
        looks = kind_looks(zip(trials["method"], trials["kind"], strict=True))
        layers = []
        for kind in sorted(set(done["kind"]), reverse=True):
            colour, own, _ = looks[kind]
            for sort, symbol, name in _SORTS:
                rows = done[(done["kind"] == kind) & (which == sort)]
                layer = self.points(name.format(kind), rows)
                look = replace(layer, colour=colour, symbol=symbol or own, opacity=0.9)
                # A triangle looks smaller than a disc of its width.
                layers.append(look if symbol is None else replace(look, size=10.0))
        rest = trials.drop(index=done.index)
        for outcome, (symbol, colour) in UNFINISHED.items():
            layer = self.points(outcome, rest[rest["outcome"] == outcome])
            layers.append(replace(layer, colour=colour, symbol=symbol, size=9.0))
        return [layer for layer in layers if layer.x]

    def marked(self) -> list[Layer]:
        """The means the verdict is about."""
        shown: tuple[tuple[str, str, Symbol, str], ...] = (
            ("default_tuned", "tuned default", "right", ORANGE),
            ("best", "best", "diamond", GREEN),
            ("recommended", "recommended", "star", VERMILLION),
        )
        layers = []
        for key, name, symbol, colour in shown:
            standing = self.verdict.standings.get(key)
            if standing is None:
                continue
            is_need = self.x == "memory_bytes"
            at = standing.need_bytes if is_need else getattr(standing.record, self.x)
            if at is None:
                continue
            seeds = f", mean of {standing.num_seeds} seeds" if standing.num_seeds > 1 else ""
            mean = mean_text(standing.objective, standing.half_width)
            layers.append(
                Layer(
                    name=name,
                    x=(at / self.divisor,),
                    y=(self.scale.place(standing.objective),),
                    colour=colour,
                    symbol=symbol,
                    size=15.0,
                    half_width=standing.half_width,
                    hover=(f"{name}{seeds}\nrank {standing.record.rank}: {mean}",),
                )
            )
        return layers


def with_hover(trials: pd.DataFrame, objective: str) -> pd.DataFrame:
    """The table with a column ``hover``: lines about each trial, joined by newlines. Made once for
    all figures."""
    columns = {name: _plain(trials[name]) for name in (*_TOLD, objective)}
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return trials.assign(hover=[_hover(row, objective) for row in rows])


def _plain(column: pd.Series[Any]) -> list[Any]:
    return [None if pd.isna(value) else value for value in column.tolist()]


def _hover(row: dict[Any, Any], objective: str) -> str:
    lines = [
        f"trial {row['number']}, {row['outcome']}, seed {row['seed']}",
        f"{refit_text(row['kind'], row['refit'])} rank "
        f"{rank_text(row['rank'], row['init_rank'])}, alpha {row['alpha']}, "
        f"learning rate {rate_text(row['learning_rate'])}",
        f"{objective_text(objective)} {value_text(row[objective])}",
        f"peak {' and '.join(_peaks(row))}",
    ]
    if row["r_max"] is not None and row["r_max"] > row["rank"]:
        lines.insert(2, f"largest rank of a module {row['r_max']}")
    spent = [f"{count_text(row['flops'])} FLOPs"] if row["flops"] is not None else []
    if row["train_seconds"] is not None:
        spent.append(f"trained for {seconds_text(row['train_seconds'])}")
    lines += [", ".join(spent)] if spent else []
    if row["engine"] == "packed":
        size = "" if row["pack_size"] is None else f" of up to {row['pack_size']}"
        lines.append(f"trained in a pack{size}; the peak is that of the trial alone")
    return "\n".join(lines)


def _peaks(row: dict[Any, Any]) -> Sequence[str]:
    found = [f"{bytes_text(row['predicted_peak_bytes'])} predicted"]
    if row["measured_peak_bytes"] is not None:
        found.append(f"{bytes_text(row['measured_peak_bytes'])} measured")
    return found


def _is_default(done: pd.DataFrame) -> pd.Series[bool]:
    """Trials of the default adapter, those that repeat it on another seed included."""
    rows = configurations(done)
    ours = rows[rows["roles"].str.contains("default", regex=False).astype(bool)]
    numbers = {int(number) for joined in ours["numbers"] for number in joined.split(",")}
    return done["number"].isin(numbers)
