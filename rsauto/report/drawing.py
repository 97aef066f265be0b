"""Panels as SVG, for report.md. The same panel gives the same bytes."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from rsauto.report.panel import GREY, Layer, Panel

_MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "star": "*",
    "down": "v",
    "up": "^",
    "cross": "x",
    "plus": "+",
    "ring": "o",
}
_DASHES = {"solid": "-", "dash": "--", "dot": ":"}

# The salt names the elements inside the file and the date would be that of the run: fixed and
# left out, so that a report made twice differs nowhere. Text stays text, in the reader's own font.
_STYLE: Any = {
    "svg.hashsalt": "rsauto",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def drawing(panel: Panel) -> bytes:
    """The panel as an SVG file on white."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.0, 4.8), layout="constrained")
        axes = figure.add_subplot()
        for layer in panel.layers:
            _draw(axes, layer)
        _dress(axes, panel)
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _draw(axes: Axes, layer: Layer) -> None:
    is_open = layer.symbol in ("ring", "down")
    axes.plot(
        list(layer.x),
        list(layer.y),
        label=_plain(layer.name) if layer.in_legend else "_nolegend_",
        color=layer.colour,
        alpha=layer.opacity,
        linestyle=_DASHES[layer.dash] if layer.dash else "none",
        linewidth=1.6,
        drawstyle="steps-post" if layer.is_step else "default",
        marker=_MARKERS[layer.symbol] if layer.symbol else "none",
        markersize=layer.size * (1.1 if layer.symbol == "star" else 0.75),
        markerfacecolor="none" if is_open else layer.colour,
        markeredgecolor=layer.colour if is_open or layer.symbol in ("cross", "plus") else "white",
        markeredgewidth=1.4 if is_open or layer.symbol in ("cross", "plus") else 0.6,
        zorder=4 if layer.size >= 12 else 3,
    )


def _dress(axes: Axes, panel: Panel) -> None:
    axes.set_title(_plain(panel.title), loc="left", fontsize=11)
    axes.set_xlabel(_plain(panel.x_label))
    axes.set_ylabel(_plain(panel.y_label))
    axes.grid(color=GREY, alpha=0.25, linewidth=0.7)
    if panel.x_is_log:
        axes.set_xscale("log")
    if panel.x_ticks:
        axes.xaxis.set_major_locator(FixedLocator([at for at, _ in panel.x_ticks]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([_plain(name) for _, name in panel.x_ticks])
    if panel.y_range is not None:
        axes.set_ylim(*panel.y_range)
    if panel.x_limit is not None:
        axes.axvline(panel.x_limit, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
        axes.annotate(
            _plain(panel.x_limit_name),
            (panel.x_limit, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            color=GREY,
            fontsize=9,
        )


def _plain(text: str) -> str:
    """A dollar sign would start a formula."""
    return text.replace("$", r"\$")
