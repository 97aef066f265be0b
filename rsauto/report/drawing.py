"""Panels as SVG, for report.md. The same panel gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from rsauto.report.panel import GREY, NONE, SCALE, Dash, HeatMap, Layer, Panel

_MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "star": "*",
    "down": "v",
    "up": "^",
    "left": "<",
    "right": ">",
    "cross": "x",
    "plus": "+",
    "bar": "|",
    "ring": "o",
}
_DASHES: Mapping[Dash, Any] = {
    "solid": "-",
    "dash": "--",
    "dot": ":",
    "dashdot": "-.",
    "longdash": (0, (9, 3)),
    "longdashdot": (0, (9, 3, 1.5, 3)),
}

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


_LEGEND_CHARACTERS, _HANDLE_CHARACTERS = 110, 11
"""In a line of a legend across the figure, and what a handle takes of them."""


def drawing(panel: Panel | HeatMap) -> bytes:
    """The panel as an SVG file on white."""
    with matplotlib.rc_context(_STYLE):
        figure = _heat_map(panel) if isinstance(panel, HeatMap) else _layers(panel)
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None, "Title": panel.alt}
        figure.savefig(buffer, format="svg", metadata=metadata)
    return buffer.getvalue()


def _layers(panel: Panel) -> Figure:
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for layer in panel.layers:
        _draw(axes, layer)
    _dress(axes, panel)
    names = [layer.name for layer in panel.layers if layer.in_legend]
    if names:
        columns = max(1, min(4, _LEGEND_CHARACTERS // (max(map(len, names)) + _HANDLE_CHARACTERS)))
        figure.legend(  # handles long enough to tell one dash from another
            loc="outside lower center", ncols=columns, frameon=False, fontsize=9, handlelength=3.6
        )
    return figure


def _heat_map(panel: HeatMap) -> Figure:
    height = min(max(3.6, 1.6 + 0.26 * len(panel.rows)), 12.0)
    figure = Figure(figsize=(8.0, height), layout="constrained")
    axes = figure.add_subplot()
    values = np.ma.masked_invalid(np.array(panel.values, dtype=float))
    colours = LinearSegmentedColormap.from_list("", SCALE).with_extremes(under=NONE)
    # A mesh, because an image would be pixels inside of the file.
    mesh = axes.pcolormesh(
        values, cmap=colours, vmin=0.5, vmax=panel.largest, edgecolors="white", linewidth=0.6
    )
    if panel.has_room:
        _write_values(axes, panel)
    _name_cells(axes, panel)
    axes.set_title(_plain(panel.title), loc="left", fontsize=11)
    axes.set_xlabel(_plain(panel.x_label))
    axes.set_ylabel(_plain(panel.y_label))
    figure.colorbar(
        mesh,
        label=_plain(panel.value_label),
        ticks=MaxNLocator(8, integer=True),
        extend="min" if values.min() == 0 else "neither",
        extendfrac=0.03,
        aspect=30,
    )
    return figure


def _name_cells(axes: Axes, panel: HeatMap) -> None:
    """Rows from the top. A cell stands between whole numbers, its middle half a step further."""
    across = [_plain(panel.columns[i]) for i in panel.labelled_columns]
    axes.set_xticks([i + 0.5 for i in panel.labelled_columns], across)
    if len("".join(across)) > 60:
        axes.tick_params("x", labelrotation=30)
    axes.set_yticks(
        [i + 0.5 for i in panel.labelled_rows],
        [_plain(panel.rows[i]) for i in panel.labelled_rows],
    )
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _write_values(axes: Axes, panel: HeatMap) -> None:
    for y, row in enumerate(panel.values):
        for x, value in enumerate(row):
            if value is not None:
                axes.text(
                    x + 0.5, y + 0.5, str(value), color=panel.ink(value), ha="center", va="center"
                )


def _draw(axes: Axes, layer: Layer) -> None:
    if layer.y_high:
        name = _plain(layer.name) if layer.in_legend else "_nolegend_"
        axes.fill_between(
            list(layer.x), list(layer.y), list(layer.y_high),
            color=layer.colour, alpha=layer.opacity, linewidth=0, label=name, zorder=1,
        )  # fmt: skip
        return
    if layer.half_width:
        axes.errorbar(
            list(layer.x), list(layer.y), yerr=layer.half_width,
            fmt="none", ecolor=layer.colour, elinewidth=1.4, capsize=4, zorder=3,
        )  # fmt: skip
    is_open = layer.symbol in ("ring", "down")
    is_thin = is_open or layer.symbol in ("cross", "plus", "bar")
    axes.plot(
        list(layer.x),
        list(layer.y),
        label=_plain(layer.name) if layer.in_legend else "_nolegend_",
        color=layer.colour,
        alpha=layer.opacity,
        linestyle=_DASHES[layer.dash] if layer.dash else "none",
        linewidth=0.8 * layer.width,
        drawstyle="steps-post" if layer.is_step else "default",
        marker=_MARKERS[layer.symbol] if layer.symbol else "none",
        markersize=layer.size * (1.1 if layer.symbol == "star" else 0.75),
        markerfacecolor="none" if is_open else layer.colour,
        markeredgecolor=layer.colour if is_thin else "white",
        markeredgewidth=1.4 if is_thin else 0.6,
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
    if panel.y_is_log:
        axes.set_yscale("log")
    if panel.y_ticks:
        axes.yaxis.set_major_locator(FixedLocator([at for at, _ in panel.y_ticks]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_yticklabels([_plain(name) for _, name in panel.y_ticks])
    if panel.x_range is not None:
        axes.set_xlim(*panel.x_range)
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
