"""What the figures show. The page and report.md draw the same panels, so they cannot disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from rsauto.records import TrialRecord
from rsauto.report.curves import curve_panels
from rsauto.report.fronts import fronts
from rsauto.report.importance import importance_panel
from rsauto.report.kinds import kind_looks, kinds, refit_text
from rsauto.report.noise import full_runs
from rsauto.report.panel import (
    HeatMap,
    Layer,
    Panel,
    rank_looks,
    rate_ticks,
)
from rsauto.report.predictions import predictions_panel
from rsauto.report.rank_map import rank_map
from rsauto.report.rate_figure import rates_panel
from rsauto.report.rate_map import rate_map
from rsauto.report.table import table
from rsauto.report.trial_layers import AT_THE_EDGE, Axes, Scale, with_hover
from rsauto.report.verdict import Verdict
from rsauto.report.wording import noise_remark
from rsauto.units import objective_text, value_text


def panels(records: Sequence[TrialRecord], verdict: Verdict) -> tuple[Panel | HeatMap, ...]:
    """The figures for which the records have something to show."""
    trials = table(records)
    if verdict.objective not in trials.columns or trials[verdict.objective].notna().sum() == 0:
        return ()
    trials = with_hover(trials.assign(kind=kinds(trials)), verdict.objective)
    found = (
        *fronts(trials, verdict),
        _by_rank(trials, verdict),
        *curve_panels(records, verdict),
        rates_panel(records),
        _learning_rates(trials, verdict),
        rate_map(trials, verdict),
        importance_panel(trials, verdict),
        rank_map(records, verdict),
        predictions_panel(trials),
    )
    return tuple(panel for panel in found if panel is not None)


def _by_rank(trials: pd.DataFrame, verdict: Verdict) -> Panel:
    scale = Scale.of(trials, verdict)
    axes = Axes(verdict, scale, "rank")
    done = full_runs(trials, verdict.objective)
    lines = []
    looks = kind_looks(zip(trials["method"], trials["kind"], strict=True))
    for (kind, refit), group in done.groupby(["kind", "refit"]):
        best = group.groupby("rank")[verdict.objective]
        line = (best.min() if verdict.minimize else best.max()).sort_index()
        lines.append(
            Layer(
                name=f"best of {refit_text(str(kind), bool(refit))}",
                x=tuple(float(rank) for rank in line.index),
                y=tuple(scale.place(float(v)) for v in line),
                colour=looks[str(kind)][0],
                dash="dot" if refit else "solid",
            )
        )
    name = objective_text(verdict.objective)
    return Panel(
        key="rank",
        title=f"What rank buys: {name} against rank",
        finding=". ".join(_told(line) for line in lines),
        caption="The line follows the best single trial of each rank; all trials are shown, means "
        f"over seeds with their 95 % intervals. {noise_remark(verdict)} {AT_THE_EDGE}",
        x_label="rank",
        y_label=name,
        layers=(*(line for line in lines if len(line.x) > 1),
                *axes.trials(trials), *axes.marked()),
        x_is_log=True,
        x_ticks=tuple((float(rank), str(rank)) for rank in sorted(set(trials["rank"]))),
        y_range=scale.y_range,
    )  # fmt: skip


def _told(line: Layer) -> str:
    """'best of rsLoRA: rank 8 2.063, rank 16 1.974'"""
    points = zip(line.x, line.y, strict=True)
    return f"{line.name}: {', '.join(f'rank {x:.0f} {value_text(y)}' for x, y in points)}"


def _learning_rates(trials: pd.DataFrame, verdict: Verdict) -> Panel | None:
    scale = Scale.of(trials, verdict)
    done = full_runs(trials, verdict.objective).sort_values("learning_rate", kind="stable")
    axes = Axes(verdict, scale, "learning_rate")
    looks = rank_looks(trials["rank"])
    of_kinds = kind_looks(zip(trials["method"], trials["kind"], strict=True))
    layers = []
    for (rank, kind, refit), rows in done.groupby(["rank", "kind", "refit"]):
        colour, symbol = looks[int(str(rank))]
        name = f"{refit_text(str(kind), bool(refit))} {rank}"
        layers.append(
            replace(
                axes.points(name, rows),
                colour=colour,
                symbol=symbol,
                # Through many points, of several alphas, a line would only zigzag.
                dash=of_kinds[str(kind)][2] if len(rows) <= 8 else None,
                opacity=0.95,
            )
        )
    if not layers:
        return None
    name = objective_text(verdict.objective)
    return Panel(
        key="learning_rate",
        title=f"Every rank's learning rate: {name} against it",
        caption="Full-length trials, one line for each kind and rank. Where the best point is at "
        f"the end of a line, a wider range of learning rates may do better. {AT_THE_EDGE}",
        x_label="learning rate",
        y_label=name,
        layers=tuple(layers),
        x_is_log=True,
        x_ticks=rate_ticks(float(done["learning_rate"].min()), float(done["learning_rate"].max())),
        y_range=scale.y_range,
    )
