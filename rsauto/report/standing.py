"""A configuration as its seeds show it, and how much better it is than another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from rsauto.records import TrialRecord
from rsauto.report.noise import Noise
from rsauto.report.table import cost_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """A configuration as its seeds show it."""

    record: TrialRecord
    """The trial that stands for it, one that ran alone where there is one."""
    objective: float
    """Mean over its seeds."""
    num_seeds: int
    half_width: float | None = None
    """Of the 95 % interval of the mean; None for a single run, which may be the luckiest."""
    need_bytes: int | None
    """The smallest budget it can be trained in, see ``cost_bytes``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """How much better one configuration is than another; positive is better."""

    difference: float
    half_width: float | None
    """Of the 95 % interval of the difference; None without repeated seeds."""
    relative: float | None
    """Share of the other's objective; None where that is zero."""
    num_fresh_seeds: int = 0
    """Seeds it was measured on that had no part in choosing either; 0 where there are none and
    the seeds that chose stand in, which favours what was chosen."""

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half_width is not None and abs(self.difference) > self.half_width


def standing_of(
    row: pd.Series[Any], objective: str, records: Mapping[int, TrialRecord], noise: Noise | None
) -> Standing:
    """The standing of a row of ``configurations``; ``records`` by their numbers."""
    need = cost_bytes(row.to_frame().T).iloc[0]
    seeds = int(row["num_seeds"])
    return Standing(
        record=records[int(row["number"])],
        objective=float(row[objective]),
        num_seeds=seeds,
        half_width=noise.mean_half_width(seeds) if noise is not None and seeds > 1 else None,
        need_bytes=None if pd.isna(need) else int(need),
    )


def gain_over(new: Standing, old: Standing, noise: Noise | None, *, minimize: bool) -> Gain:
    """How much better ``new`` is than ``old``, with the interval that their seeds allow."""
    difference = old.objective - new.objective if minimize else new.objective - old.objective
    return Gain(
        difference=difference,
        half_width=None if noise is None else noise.half_width(new.num_seeds, old.num_seeds),
        relative=difference / abs(old.objective) if old.objective else None,
    )
