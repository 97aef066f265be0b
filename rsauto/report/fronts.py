"""What an objective costs in memory, compute and time: three Pareto fronts."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from rsauto.report.panel import BLUE, Layer, Panel
from rsauto.report.pareto import pareto
from rsauto.report.table import cost_bytes
from rsauto.report.trial_layers import AT_THE_EDGE, Axes, Scale
from rsauto.report.verdict import Verdict
from rsauto.report.wording import noise_remark
from rsauto.units import byte_unit, bytes_text, objective_text, value_text

_FRONT = "The line joins the trials that no other beats in both."


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cost:
    """What may be spent on a fine-tune."""

    key: str
    tab: str
    column: str
    x_label: str
    """With a place for the unit."""
    caption: str


_COSTS = (
    _Cost(
        key="memory",
        tab="Memory",
        column="memory_bytes",
        x_label="smallest memory budget ({})",
        caption="Every trial at the smallest budget it can be trained in alone, as predicted.",
    ),
    _Cost(
        key="compute",
        tab="Compute",
        column="flops",
        x_label="training compute ({})",
        caption="Floating-point operations of training; a trial that was stopped early stands at "
        "what it had spent.",
    ),
    _Cost(
        key="time",
        tab="Time",
        column="train_seconds",
        x_label="training time ({})",
        caption="Wall time of optimizer steps, of trials that ran alone: what shared a pack has no "
        "time of its own.",
    ),
)


def fronts(trials: pd.DataFrame, verdict: Verdict) -> tuple[Panel, ...]:
    """One figure for every cost that is known of some trial with a value."""
    trials = trials.assign(memory_bytes=cost_bytes(trials))
    scale = Scale.of(trials, verdict)
    known = trials[trials[verdict.objective].notna()]
    return tuple(
        _front(trials, verdict, scale, cost) for cost in _COSTS if known[cost.column].notna().any()
    )


def _front(trials: pd.DataFrame, verdict: Verdict, scale: Scale, cost: _Cost) -> Panel:
    largest = float(trials[cost.column].max())
    divisor, unit = _unit(cost.column, largest)
    axes = Axes(verdict, scale, cost.column, divisor)
    front = pareto(trials, cost.column, verdict.objective, verdict.minimize)
    line = Layer(
        name="Pareto front",
        x=tuple(float(v) / divisor for v in front[cost.column]),
        y=tuple(scale.place(float(v)) for v in front[verdict.objective]),
        colour=BLUE,
        dash="solid",
        is_step=True,
        opacity=0.8,
    )
    name = objective_text(verdict.objective)
    limit, told = _budget(verdict, cost, largest)
    return Panel(
        key=cost.key,
        group="front",
        tab=cost.tab,
        title=f"What {cost.tab.lower()} buys: {name} against {cost.tab.lower()}",
        finding=f"Along the front: {_told(line, unit)}." if line.x else "",
        caption=f"{cost.caption} {_FRONT} {noise_remark(verdict)} {AT_THE_EDGE}{told}",
        x_label=cost.x_label.format(unit),
        y_label=name,
        layers=(*([line] if line.x else []), *axes.trials(trials), *axes.marked()),
        y_range=scale.y_range,
        x_limit=None if limit is None else limit / divisor,
        x_limit_name="memory budget",
    )


def _told(front: Layer, unit: str) -> str:
    """'20.4 MiB 2.351, 23.4 MiB 1.974', as many points as can be listened to."""
    points = list(zip(front.x, front.y, strict=True))[-12:]
    return ", ".join(f"{x:.3g} {unit} {value_text(y)}" for x, y in points)


def _budget(verdict: Verdict, cost: _Cost, largest: float) -> tuple[int | None, str]:
    """The budget as a line, and in words. One far beyond every trial would squeeze them into a
    corner: it is told, not drawn."""
    budget = verdict.memory_budget_bytes
    if budget is None or cost.key != "memory":
        return None, ""
    return (
        budget if budget < 4 * largest else None,
        f" The memory budget is {bytes_text(budget)}.",
    )


def _unit(column: str, largest: float) -> tuple[float, str]:
    if column == "memory_bytes":
        return byte_unit(largest)
    units: tuple[tuple[float, str], ...] = ((1.0, "FLOPs"), (1e9, "GFLOPs"), (1e12, "TFLOPs"),
        (1e15, "PFLOPs"), (1e18, "EFLOPs"))  # fmt: skip
    if column == "train_seconds":
        units = ((1.0, "seconds"), (60.0, "minutes"), (3600.0, "hours"))
    # A unit is taken from two of it on, so that an axis does not run from 0.2 to 1.1.
    return max(unit for unit in units if unit[0] == 1.0 or largest >= 2 * unit[0])
