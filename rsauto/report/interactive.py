"""Panels as plotly figures, for the page."""

from __future__ import annotations

import html
from typing import Any

import plotly.graph_objects as go

from rsauto.report.panel import GREY, Layer, Panel

_SYMBOLS = {
    "circle": "circle",
    "square": "square",
    "diamond": "diamond",
    "star": "star",
    "down": "triangle-down-open",
    "up": "triangle-up",
    "cross": "x-thin-open",
    "plus": "cross-thin-open",
    "ring": "circle-open",
}
_HEIGHT = 460


def interactive(panel: Panel) -> go.Figure:
    """The panel as a figure without a background, so that it suits a light and a dark page."""
    figure = go.Figure([_trace(layer) for layer in panel.layers])
    figure.update_layout(
        template="none",
        height=_HEIGHT,
        margin={"l": 64, "r": 16, "t": 28, "b": 64},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": GREY},
        hoverlabel={"align": "left"},
        legend={"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0},
        xaxis=_x_axis(panel),
        yaxis=_axis(panel.y_label),
    )
    if panel.y_range is not None:
        figure.update_yaxes(range=list(panel.y_range))
    if panel.x_limit is not None:
        figure.add_vline(
            x=panel.x_limit,
            line={"color": GREY, "dash": "dash", "width": 1.5},
            annotation={"text": html.escape(panel.x_limit_name), "textangle": -90, "yshift": -4},
            annotation_position="top left",
        )
    return figure


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
    if panel.x_ticks:
        axis["tickvals"] = [at for at, _ in panel.x_ticks]
        axis["ticktext"] = [html.escape(name) for _, name in panel.x_ticks]
    return axis


def _trace(layer: Layer) -> go.Scatter:
    parts = [
        part
        for part, is_there in (("lines", layer.dash), ("markers", layer.symbol))
        if is_there is not None
    ]
    text = ["<br>".join(map(html.escape, lines.split("\n"))) for lines in layer.hover]
    width = 1.0 if layer.size >= 12 else 0.5
    is_thin = layer.symbol in ("cross", "plus", "ring", "down")
    return go.Scatter(
        name=html.escape(layer.name),
        x=list(layer.x),
        y=list(layer.y),
        mode="+".join(parts),
        opacity=layer.opacity,
        text=text or None,
        hoverinfo="text" if text else "skip",
        legendgroup=html.escape(layer.name),
        showlegend=layer.in_legend,
        line={
            "color": layer.colour,
            "width": 2,
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
