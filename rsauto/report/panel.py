"""A figure as plain numbers, drawn by `interactive` for the page and by `drawing` for report.md."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rsauto.units import rate_text

Symbol = Literal[
    "circle", "square", "diamond", "star", "down", "up", "left", "right", "cross", "plus", "bar",
    "ring",
]  # fmt: skip
Dash = Literal["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"]
DASHES: tuple[Dash, ...] = ("longdash", "longdashdot", "dash", "dot", "dashdot", "solid")

# Okabe and Ito, "Color Universal Design" (2008), distinguishable with any colour vision; their
# black is left out because it vanishes on a dark page, and grey stands in for it.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILLION, YELLOW, GREY = "#56B4E9", "#D55E00", "#F0E442", "#8A8A8A"
METHOD_COLOURS = {"rslora": BLUE, "lora": ORANGE, "adalora": GREEN, "rsadalora": PINK}
METHOD_SYMBOLS: dict[str, Symbol] = {"rslora": "circle", "lora": "square", "adalora": "up",
                                     "rsadalora": "diamond"}  # fmt: skip
"""Of points: green and pink come close for some eyes, so that shape tells as well."""
METHOD_DASHES: dict[str, Dash] = {"lora": "dash", "adalora": "dot", "rsadalora": "dashdot"}
"""Of lines; solid for rsLoRA."""
RANK_COLOURS = (SKY, ORANGE, GREEN, PINK, BLUE, VERMILLION, GREY, YELLOW)
RANK_SYMBOLS: tuple[Symbol, ...] = ("circle", "square", "diamond", "up", "star")


def rank_looks(ranks: Iterable[int]) -> dict[int, tuple[str, Symbol]]:
    """A colour and a symbol for every rank. Their numbers have no common divisor, so that forty
    ranks look different, and each pair of neighbours differs in both."""
    return {
        rank: (RANK_COLOURS[n % len(RANK_COLOURS)], RANK_SYMBOLS[n % len(RANK_SYMBOLS)])
        for n, rank in enumerate(sorted({int(rank) for rank in ranks}))
    }


SCALE = ("#D9EBF8", "#56A5D6", BLUE, "#06284A")
"""A heat map's colours from 1 to its largest number. They darken evenly, so that they can be told
apart without seeing colour, and every cell is filled, so that they suit a light and a dark page."""
NONE = "#F2B84B"
"""A heat map's colour of 0, which must not pass for a small number."""


def rate_ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Labels of an axis of learning rates: 1, 2 and 5 in every decade, from the one below the
    lowest to the one above the highest; powers of ten alone if that would be too many to read."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first < 4 else (1,)
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    inside = [t for t in ticks if low / 2.5 <= t <= high * 2.5]
    return tuple((tick, rate_text(tick)) for tick in inside)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One entry of a figure: points, a line, or both."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    """NaN breaks a line."""
    colour: str
    symbol: Symbol | None = None
    """None draws no points."""
    dash: Dash | None = None
    """None draws no line."""
    is_step: bool = False
    size: float = 8.0
    width: float = 2.0
    """Of the line."""
    opacity: float = 1.0
    hover: tuple[str, ...] = ()
    in_legend: bool = True
    y_high: tuple[float, ...] = ()
    """Fills the band from y to here instead of drawing y."""
    half_width: float | None = None
    """Of the interval that is drawn about every point."""


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
    y_is_log: bool = False
    y_ticks: tuple[tuple[float, str], ...] = ()
    y_range: tuple[float, float] | None = None
    x_limit: float | None = None
    x_limit_name: str = ""
    """A vertical line, such as the memory budget."""
    x_range: tuple[float, float] | None = None
    """Of an axis that is not logarithmic."""
    group: str = ""
    tab: str = ""
    """Figures of one group share a place on the page, where ``tab`` chooses one."""
    finding: str = ""
    """What it shows, in words."""

    @property
    def alt(self) -> str:
        """What stands for the figure where it cannot be seen."""
        return f"{self.title}. {self.finding}" if self.finding else self.title


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatMap:
    """One figure of numbers, zero or more, in rows and columns."""

    key: str
    title: str
    caption: str
    alt: str
    """What stands for the figure where it cannot be seen."""
    x_label: str
    y_label: str
    value_label: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    """From the top."""
    values: tuple[tuple[int | None, ...], ...]
    """A tuple a row; None leaves a cell empty."""
    hover: tuple[tuple[str, ...], ...]
    group: str = ""
    tab: str = ""

    @property
    def largest(self) -> int:
        """Of the values, 1 at least."""
        return max([1, *(v for row in self.values for v in row if v is not None)])

    def ink(self, value: int) -> str:
        """The colour of a number on its cell, legible on all of SCALE and on NONE."""
        return "#FFFFFF" if value > 0.6 * self.largest else "#000000"

    @property
    def has_room(self) -> bool:
        """Whether the cells are large enough to hold their numbers."""
        return len(self.rows) <= 40 and len(self.columns) <= 16

    @property
    def labelled_rows(self) -> tuple[int, ...]:
        """Rows whose name is written out: all, or as many as can be read."""
        return _thinned(len(self.rows), 40)

    @property
    def labelled_columns(self) -> tuple[int, ...]:
        return _thinned(len(self.columns), 24)


def _thinned(count: int, most: int) -> tuple[int, ...]:
    return tuple(range(0, count, max(1, math.ceil(count / most))))
