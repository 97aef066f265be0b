"""Panels as plotly figures, for the page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from rsauto.report.panel import GREY, NONE, SCALE, HeatMap, Layer, Panel

_SYMBOLS = {
    "circle": "circle",
    "square": "square",
    "diamond": "diamond",
    "star": "star",
    "down": "triangle-down-open",
    "up": "triangle-up",
    "left": "triangle-left",
    "right": "triangle-right",
    "cross": "x-thin-open",
    "plus": "cross-thin-open",
    "bar": "line-ns-open",
    "ring": "circle-open",
}
_HEIGHT = 460


def interactive(panel: Panel | HeatMap) -> go.Figure:
    """The panel as a figure without a background, so that it suits a light and a dark page."""
    figure = _heat_map(panel) if isinstance(panel, HeatMap) else _layers(panel)
    figure.update_layout(
        template="none",
        margin={"l": 64, "r": 16, "t": 28, "b": 64},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": GREY},
        hoverlabel={"align": "left"},
        # What was hidden or zoomed stays so when the page changes its colours.
        uirevision="kept",
    )
    return figure


def _layers(panel: Panel) -> go.Figure:
    figure = go.Figure([_trace(layer) for layer in panel.layers])
    figure.update_layout(
        height=_HEIGHT,
        legend={"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0},
        xaxis=_x_axis(panel),
        yaxis=_y_axis(panel),
    )
    if panel.x_limit is not None:
        figure.add_vline(
            x=panel.x_limit,
            line={"color": GREY, "dash": "dash", "width": 1.5},
            annotation={"text": html.escape(panel.x_limit_name), "textangle": -90, "yshift": -4},
            annotation_position="top left",
        )
    return figure


def _heat_map(panel: HeatMap) -> go.Figure:
    """Cells by position, since two rows may be called the same."""
    zero = 0.5 / panel.largest
    rises = [zero + (1 - zero) * i / (len(SCALE) - 1) for i in range(len(SCALE))]
    trace = go.Heatmap(
        z=[list(row) for row in panel.values],
        zmin=0,
        zmax=panel.largest,
        colorscale=[(0.0, NONE), (zero, NONE), *zip(rises, SCALE, strict=True)],
        colorbar={"title": {"text": html.escape(panel.value_label)}, "thickness": 14},
        xgap=1,
        ygap=1,
        hovertext=[[html.escape(text) for text in row] for row in panel.hover],
        hoverinfo="text",
        hoverongaps=False,
    )
    figure = go.Figure([trace, _numbers(panel)] if panel.has_room else trace)
    rows = _cell_axis(panel.y_label, panel.rows, panel.labelled_rows)
    figure.update_layout(
        height=min(max(_HEIGHT, 110 + 20 * len(panel.rows)), 910),
        xaxis=_cell_axis(panel.x_label, panel.columns, panel.labelled_columns),
        yaxis=rows | {"range": [len(panel.rows) - 0.5, -0.5]},
    )
    return figure


def _numbers(panel: HeatMap) -> go.Scatter:
    """A number on every cell. Plotly's own would be grey on the middle of the scale."""
    cells = [
        (x, y, value)
        for y, row in enumerate(panel.values)
        for x, value in enumerate(row)
        if value is not None
    ]
    return go.Scatter(
        x=[x for x, _, _ in cells],
        y=[y for _, y, _ in cells],
        mode="text",
        text=[str(value) for _, _, value in cells],
        textfont={"color": [panel.ink(value) for _, _, value in cells], "size": 12},
        hoverinfo="skip",
        showlegend=False,
    )


def _cell_axis(label: str, names: Sequence[str], labelled: Sequence[int]) -> dict[str, Any]:
    return {
        **_axis(label),
        "ticks": "",
        "showgrid": False,
        "showline": False,
        "tickvals": list(labelled),
        "ticktext": [html.escape(names[i]) for i in labelled],
        "range": [-0.5, len(names) - 0.5],
    }


def _axis(label: str) -> dict[str, Any]:
    return {
        "title": {"text": html.escape(label), "standoff": 10},
        "gridcolor": "rgba(138,138,138,0.25)",
        "linecolor": GREY,
        "zeroline": False,
        "ticks": "outside",
        "automargin": True,
    }


def _x_axis(panel: Panel) -> dict[str, Any]:
    axis = _axis(panel.x_label)
    if panel.x_is_log:
        axis["type"] = "log"
    if panel.x_range is not None:
        axis["range"] = list(panel.x_range)
    if panel.x_ticks:
        axis["tickvals"] = [at for at, _ in panel.x_ticks]
        axis["ticktext"] = [html.escape(name) for _, name in panel.x_ticks]
    return axis


def _y_axis(panel: Panel) -> dict[str, Any]:
    axis = _axis(panel.y_label)
    if panel.y_range is not None:
        ends = panel.y_range
        axis["range"] = [math.log10(end) for end in ends] if panel.y_is_log else list(ends)
    if panel.y_is_log:
        axis["type"] = "log"
    if panel.y_ticks:
        axis["tickvals"] = [at for at, _ in panel.y_ticks]
        axis["ticktext"] = [html.escape(name) for _, name in panel.y_ticks]
    return axis


def _error(layer: Layer) -> dict[str, Any] | None:
    if not layer.half_width:
        return None
    return {"type": "constant", "value": layer.half_width, "color": layer.colour, "width": 5}


def _band(layer: Layer) -> go.Scatter:
    """An area: there along its lower edge, back along its upper one."""
    return go.Scatter(
        name=html.escape(layer.name),
        x=[*layer.x, *reversed(layer.x)],
        y=[*layer.y, *reversed(layer.y_high)],
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=layer.colour,
        opacity=layer.opacity,
        hoverinfo="skip",
        legendgroup=html.escape(layer.name),
        showlegend=layer.in_legend,
    )


def _trace(layer: Layer) -> go.Scatter:
    if layer.y_high:
        return _band(layer)
    parts = [
        part
        for part, is_there in (("lines", layer.dash), ("markers", layer.symbol))
        if is_there is not None
    ]
    text = ["<br>".join(map(html.escape, lines.split("\n"))) for lines in layer.hover]
    width = 1.0 if layer.size >= 12 else 0.5
    is_thin = layer.symbol in ("cross", "plus", "bar", "ring", "down")
    return go.Scatter(
        name=html.escape(layer.name),
        x=_with_gaps(layer.x),
        y=_with_gaps(layer.y),
        mode="+".join(parts),
        opacity=layer.opacity,
        text=text or None,
        hoverinfo="text" if text else "skip",
        legendgroup=html.escape(layer.name),
        showlegend=layer.in_legend,
        error_y=_error(layer),
        line={
            "color": layer.colour,
            "width": layer.width,
            "dash": layer.dash or "solid",
            "shape": "hv" if layer.is_step else "linear",
        },
        marker={
            "color": layer.colour,
            "size": layer.size,
            "symbol": _SYMBOLS[layer.symbol or "circle"],
            "line": {"width": 2.0 if is_thin else width,
                     "color": layer.colour if is_thin else "#FFFFFF"},
        },
    )  # fmt: skip


def _with_gaps(values: Sequence[float]) -> list[float | None]:
    """JSON knows no NaN; plotly breaks a line at null."""
    return [None if math.isnan(value) else value for value in values]
