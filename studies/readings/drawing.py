"""Figures in the manner of the paper's: copper for LoRA, blue to green for rsLoRA, brighter with
rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from statistics import fmean

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsauto.records import TrialRecord
from rsauto.report.table import Study

from .reading import Cells, by_rank, final_loss, labels_of, mean_of, ranks_of

MAPS = {"LoRA": "copper", "rsLoRA": "winter"}
MARKERS = "osD^v*"

Curve = Callable[[TrialRecord], Mapping[int, float]]
"""Step to value."""


def train_losses(record: TrialRecord) -> dict[int, float]:
    return {point.step: point.train_loss for point in record.log}


def norms(record: TrialRecord) -> dict[int, float]:
    return {point.step: point.grad_norm for point in record.log}


def curves(study: Study, curve: Curve, y_label: str, *, log: bool = False) -> Figure:
    """A panel for each rule, a line for each rank, means over seeds."""
    cells = by_rank(study)
    names, ranks = labels_of(cells), ranks_of(cells)
    figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        for position, rank in enumerate(ranks):
            found = [curve(record) for record in cells.get((name, rank), ())]
            if not any(found):
                continue
            colour = mpl.colormaps[MAPS.get(name, "viridis")](0.15 + 0.8 * position / len(ranks))
            steps = sorted(set.intersection(*(set(one) for one in found)))
            values = [fmean(one[step] for one in found) for step in steps]
            axis.plot(steps, values, color=colour, lw=1.4, label=f"rank {rank}")
        _finish(axis, name, "step", log)
    axes[0].set_ylabel(y_label)
    return figure


def _finish(axis: Axes, title: str, x_label: str, log: bool) -> None:
    axis.set_title(title)
    axis.set_xlabel(x_label)
    axis.grid(alpha=0.3)
    if log:
        axis.set_yscale("log")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)


def losses_by_rank(cells: Cells) -> Figure:
    """Final validation loss against rank, a line for each rule, 95 % intervals over seeds."""
    lines = {
        name: {
            rank: [final_loss(r) for r in cells[name, rank]]
            for rank in ranks_of(cells)
            if (name, rank) in cells
        }
        for name in labels_of(cells)
    }
    return against_rank(lines, "validation loss")


def against_rank(
    lines: Mapping[str, Mapping[int, Sequence[float]]], y_label: str, *, log: bool = False
) -> Figure:
    """Values of several seeds at each rank, a line for each name."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axis = figure.subplots()
    for number, (name, line) in enumerate(lines.items()):
        means = {rank: mean_of(values) for rank, values in line.items()}
        axis.errorbar(
            list(means),
            [m.mean for m in means.values()],
            yerr=[m.half_width or 0.0 for m in means.values()],
            label=name,
            marker=MARKERS[number % len(MARKERS)],
            capsize=3,
            lw=1.4,
        )
    axis.set_xscale("log", base=2)
    ranks = sorted({rank for line in lines.values() for rank in line})
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    _finish(axis, "", "rank", log)
    axis.set_ylabel(y_label)
    return figure


def svg(figure: Figure, name: str) -> str:
    """The same text for the same figure, every time."""
    mpl.rcParams["svg.hashsalt"] = name
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
