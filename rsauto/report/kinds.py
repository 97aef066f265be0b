"""What tables, legends and hovers call the sort of adapter a trial trains.

A study may set the power of rank in gamma_r, or in A's initialisation (appendices B.3 and B.6 of
the rsLoRA paper, arXiv:2312.03732). Its trials have one method and are yet of different kinds,
which never share a row or a line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import TypeVar

import pandas as pd

from rsauto.records import TrialRecord
from rsauto.report.panel import (
    BLUE,
    DASHES,
    GREEN,
    GREY,
    METHOD_COLOURS,
    METHOD_DASHES,
    METHOD_SYMBOLS,
    ORANGE,
    PINK,
    SKY,
    YELLOW,
    Dash,
    Symbol,
)
from rsauto.units import method_text

T = TypeVar("T")
Look = tuple[str, Symbol, Dash]

_COLOURS = (SKY, GREEN, PINK, YELLOW, ORANGE, BLUE)
_SYMBOLS: tuple[Symbol, ...] = ("diamond", "up", "square", "circle")
"""Of kinds that are no method's own, as far as no method that is there has them."""


def kind_text(
    method: str, rank: int, scaling_exponent: float | None, init_scale: float | None
) -> str:
    """'rsLoRA'; 'LoRA alpha r^-0.25' where a study sets the power in gamma_r, whichever of the two
    methods it took the place of; 'LoRA, A by r^-0.5' where A is not drawn as usual."""
    name = method_text(method)
    if _is_set(scaling_exponent):
        name = f"LoRA alpha r^{scaling_exponent:g}"
    if init_scale is None or not _is_set(init_scale) or init_scale == 1:
        return name
    return f"{name}, A by {_power(rank, init_scale)}"


def kind_of(record: TrialRecord) -> str:
    return kind_text(record.method, record.rank, record.scaling_exponent, record.init_scale)


def kinds(trials: pd.DataFrame) -> pd.Series[str]:
    """The kind of every trial of a table."""
    names = ["method", "rank", "scaling_exponent", "init_scale"]
    plain = trials[names].astype(object).where(trials[names].notna(), None)
    found = [kind_text(*row) for row in plain.itertuples(index=False, name=None)]
    return pd.Series(found, index=trials.index, dtype="string")


def refit_text(kind: str, is_refit: bool) -> str:
    """'rsLoRA', and of a trial with the ranks that AdaLoRA found 'rsLoRA refit'."""
    return f"{kind} refit" if is_refit else kind


def kind_looks(found: Iterable[tuple[str, str]]) -> dict[str, Look]:
    """Colour, symbol and dash of every kind, given with its method.

    A method has its own where nothing else was set; the others share out what is left.
    """
    pairs = sorted(set(found))
    looks: dict[str, Look] = {
        kind: (
            METHOD_COLOURS.get(method, GREY),
            METHOD_SYMBOLS.get(method, "circle"),
            METHOD_DASHES.get(method, "solid"),
        )
        for method, kind in pairs
        if kind == method_text(method)
    }
    colours = _left(_COLOURS, {colour for colour, _, _ in looks.values()})
    symbols = _left(_SYMBOLS, {symbol for _, symbol, _ in looks.values()})
    dashes = _left(DASHES, {dash for _, _, dash in looks.values()})
    for n, kind in enumerate(sorted({kind for _, kind in pairs} - set(looks))):
        turn = n // len(colours)  # symbols and dashes are shifted where colours begin anew
        looks[kind] = (
            colours[n % len(colours)],
            symbols[(n + turn) % len(symbols)],
            dashes[(n + turn) % len(dashes)],
        )
    return looks


def _left(there_are: Sequence[T], taken: AbstractSet[T]) -> Sequence[T]:
    """Those that nobody has; all, where that is none."""
    return [one for one in there_are if one not in taken] or there_are


def _is_set(number: float | None) -> bool:
    """Whether a table, which knows no infinity, would have it, too."""
    return number is not None and math.isfinite(number)


def _power(rank: int, scale: float) -> str:
    """rank**p as 'r^p'; the number itself where it is no power of it."""
    if rank < 2 or scale <= 0:
        return f"{scale:.6g}"
    return f"r^{math.log(scale) / math.log(rank):.6g}"
