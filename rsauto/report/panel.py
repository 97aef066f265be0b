"""A figure as plain numbers, drawn by `interactive` for the page and by `drawing` for report.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Symbol = Literal["circle", "square", "diamond", "star", "down", "up", "cross", "plus", "ring"]
Dash = Literal["solid", "dash", "dot"]

# Okabe and Ito, "Color Universal Design" (2008), distinguishable with any colour vision; their
# black is left out because it vanishes on a dark page, and grey stands in for it.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILLION, YELLOW, GREY = "#56B4E9", "#D55E00", "#F0E442", "#8A8A8A"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One entry of a figure: points, a line, or both."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    colour: str
    symbol: Symbol | None = None
    """None draws no points."""
    dash: Dash | None = None
    """None draws no line."""
    is_step: bool = False
    size: float = 8.0
    opacity: float = 1.0
    hover: tuple[str, ...] = ()
    in_legend: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One figure."""

    key: str
    """Name of its file, and of its place on the page."""
    title: str
    caption: str
    x_label: str
    y_label: str
    layers: tuple[Layer, ...]
    x_is_log: bool = False
    x_ticks: tuple[tuple[float, str], ...] = ()
    """Where a logarithmic axis is labelled, and how."""
    y_range: tuple[float, float] | None = None
    x_limit: float | None = None
    x_limit_name: str = ""
    """A vertical line, such as the memory budget."""
