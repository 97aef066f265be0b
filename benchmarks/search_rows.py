"""Ratios, plot and summary of `benchmarks/search.py`, made of its raw results alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib import rc_context
from matplotlib.figure import Figure

Raw = dict[str, Any]

FIGURES = (
    "tokens_to_target", "seconds_to_target", "tokens_total", "seconds_total", "setup_seconds",
    "censored", "best_loss", "best", "trials", "full_length_trials", "num_threads",
    "final_test_loss", "final_test_accuracy", "final_test_exact_match",
)  # fmt: skip
"""What a row repeats of every competitor's raw results."""

RATIOS = {
    "tokens_ratio_vs_grid": ("tokens", "grid"),
    "tokens_ratio_vs_random": ("tokens", "random"),
    "tokens_ratio_vs_tpe": ("tokens", "tpe"),
    "wall_ratio_vs_hf": ("seconds", "hf"),
    "tokens_ratio_vs_no_transfer": ("tokens", "no-transfer"),
    "tokens_ratio_vs_no_halving": ("tokens", "no-halving"),
    "wall_ratio_vs_no_packing": ("seconds", "no-packing"),
}
"""Field to what is compared, and with whom; the last three leave one lever of rsauto out."""


def ratio(ours: Raw | None, theirs: Raw | None, cost: str) -> tuple[float | None, bool]:
    """(our cost to the target over theirs, whether it is at most that).

    None where we did not get there or one is missing. Where they did not get there, all that they
    spent stands for what they would have: it is at least as much.
    """
    if ours is None or theirs is None or ours[f"{cost}_to_target"] is None:
        return None, False
    reached = theirs[f"{cost}_to_target"]
    at_most = reached is None
    whole = theirs[f"{cost}_total"] if at_most else reached
    return ours[f"{cost}_to_target"] / whole, at_most


def row_of(task: str, seed: int, found: Mapping[str, Raw]) -> dict[str, Any]:
    """One row of the report: everything about one task and seed."""
    ours, grid = found.get("rsauto"), found.get("grid")
    ratios = {name: ratio(ours, found.get(other), cost) for name, (cost, other) in RATIOS.items()}
    gap = None
    if ours is not None and grid is not None and ours["best_loss"] is not None:
        gap = ours["best_loss"] / grid["best_loss"] - 1
    return {
        "task": task,
        "seed": seed,
        **{name: value for name, (value, _) in ratios.items()},
        "at_most": [name for name, (_, at_most) in ratios.items() if at_most],
        "loss_gap_vs_grid": gap,
        "target": None if grid is None else grid["target"],
        "competitors": {
            name: {key: raw[key] for key in FIGURES if key in raw} for name, raw in found.items()
        },
    }


def median(values: Sequence[float | None]) -> float | None:
    """Of a ratio over seeds, one that never got there being the largest; None if it is one."""
    found = statistics.median(math.inf if value is None else value for value in values)
    return found if math.isfinite(found) else None


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Medians over seeds, by task: ratios, then what every competitor spent and found."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        lines.append(f"{task}, median of {len(own)} seeds; smaller is better")
        for name in (*RATIOS, "loss_gap_vs_grid"):
            value = median([row[name] for row in own])
            bound = sum(name in row["at_most"] for row in own)
            note = f"  (an upper bound on {bound} seeds)" if bound else ""
            lines.append(f"  {name:<28} {'-' if value is None else f'{value:.4f}'}{note}")
        for name in own[0]["competitors"]:
            lines.append(f"  {name:<12} {_figures(name, own)}")
    return "\n".join(lines)


def _figures(name: str, rows: Sequence[dict[str, Any]]) -> str:
    raws = [row["competitors"][name] for row in rows if name in row["competitors"]]

    def shown(key: str, form: str) -> str:
        value = median([raw.get(key) for raw in raws])
        return "-" if value is None else format(value, form)

    return (
        f"to target {shown('tokens_to_target', ',.0f')} tokens, "
        f"{shown('seconds_to_target', '.1f')} s; in all {shown('tokens_total', ',.0f')} tokens, "
        f"{shown('seconds_total', '.1f')} s, {shown('trials', 'g')} trials; best loss "
        f"{shown('best_loss', '.4f')}, test {shown('final_test_loss', '.4f')}"
    )


def median_curve(raws: Sequence[Raw], tokens: numpy.ndarray) -> numpy.ndarray:
    """Median over seeds of the best loss so far at these numbers of trained tokens.

    NaN until more than half of the seeds have a trial of full length; a search that has stopped
    keeps what it found.
    """
    curves = numpy.full((len(raws), len(tokens)), math.inf)
    for curve, raw in zip(curves, raws, strict=True):
        for spent, _, loss in raw["curve"]:
            curve[tokens >= spent] = loss
    found = numpy.sort(curves, axis=0)
    middle = found[[(len(raws) - 1) // 2, len(raws) // 2]].mean(axis=0)
    return numpy.where(numpy.isfinite(middle), middle, math.nan)


def plot(found: Mapping[str, Sequence[Mapping[str, Raw]]], path: Path) -> None:
    """Best loss so far against trained tokens, a panel for each task, a line for each competitor.

    ``found`` has, by task, one mapping of competitors to raw results for every seed.
    """
    with rc_context({"svg.hashsalt": "rsauto", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.4 * len(found), 4.4), layout="constrained")
        panels = figure.subplots(1, len(found), squeeze=False)[0]
        for panel, (task, seeds) in zip(panels, found.items(), strict=True):
            _panel(panel, task, seeds)
        panels[0].set_ylabel("best validation loss so far")
        panels[0].legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _panel(panel: Any, task: str, seeds: Sequence[Mapping[str, Raw]]) -> None:
    every = [raw for found in seeds for raw in found.values() if raw["curve"]]
    first = min(raw["curve"][0][0] for raw in every)
    last = max(raw["tokens_total"] for raw in every)
    tokens = numpy.geomspace(first, last, 400)
    for n, name in enumerate(dict.fromkeys(name for found in seeds for name in found)):
        raws = [found[name] for found in seeds if name in found]
        style = "--" if name.startswith("no-") else "-"
        width = 2.2 if name == "rsauto" else 1.2
        losses = median_curve(raws, tokens)
        panel.plot(tokens, losses, style, color=f"C{n}", linewidth=width, label=name)
    targets = [found["grid"]["target"] for found in seeds if "grid" in found]
    if targets:
        panel.axhline(statistics.median(targets), color="0.6", linewidth=0.8)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_title(f"{task}, median of {len(seeds)} seeds")
    panel.set_xlabel("trained tokens; the line is the target")
