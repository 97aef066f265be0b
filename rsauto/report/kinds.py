"""What tables, legends and hovers call the sort of adapter a trial trains.

A study may set the power of rank in gamma_r, or in A's initialisation (appendices B.3 and B.6 of
the rsLoRA paper, arXiv:2312.03732). Its trials have one method and are yet of different kinds,
which never share a row or a line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import cycle

import pandas as pd

from rsauto.records import TrialRecord
from rsauto.report.panel import (
    BLUE,
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

Look = tuple[str, Symbol, Dash]

_SPARE: tuple[Look, ...] = (
    (SKY, "diamond", "dash"),
    (GREEN, "up", "dot"),
    (PINK, "square", "dashdot"),
    (YELLOW, "circle", "dash"),
    (ORANGE, "diamond", "dot"),
    (BLUE, "square", "dashdot"),
)
"""Of kinds beyond the methods themselves."""


def kind_text(
    method: str, rank: int, scaling_exponent: float | None, init_scale: float | None
) -> str:
    """'rsLoRA'; 'LoRA alpha r^-0.25' where gamma_r is neither rule's; 'LoRA, A by r^-0.5' where A
    is not drawn as usual."""
    name = method_text(method)
    if scaling_exponent is not None:
        name = f"LoRA alpha r^{scaling_exponent:g}"
    return name if init_scale is None else f"{name}, A by {_power(rank, init_scale)}"


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
    """Colour, symbol and dash of every kind, given with its method: a method's own where nothing
    else was set."""
    pairs = sorted(set(found))
    spare = cycle(_SPARE)
    return {
        kind: (
            METHOD_COLOURS.get(method, GREY),
            METHOD_SYMBOLS.get(method, "circle"),
            METHOD_DASHES.get(method, "solid"),
        )
        if kind == method_text(method)
        else next(spare)
        for method, kind in pairs
    }


def _power(rank: int, scale: float) -> str:
    """rank**p as 'r^p', and of rank 1, which has no power, the number itself."""
    return f"r^{math.log(scale) / math.log(rank):.3g}" if rank > 1 else f"{scale:.3g}"
