"""Tables as the words people read: the rank table, the list of trials, the figures on top."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from rsauto.report.kinds import kind_of, refit_text
from rsauto.report.standing import Gain
from rsauto.report.table import ALLOCATION_COLUMNS, COLUMNS, PEFT_NAMES, is_refit
from rsauto.report.verdict import Verdict
from rsauto.report.wording import needs_room
from rsauto.units import (
    ABSENT,
    bytes_text,
    count_text,
    difference_text,
    mean_text,
    objective_text,
    percent_text,
    rate_text,
    seconds_text,
    value_text,
)


@dataclass(frozen=True, slots=True)
class Grid:
    """A table ready to be shown."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_number: tuple[bool, ...]
    """Columns to align to the right."""
    classes: tuple[str, ...] = ()
    """One word a row that says how to colour it, or ''."""
    names: tuple[str, ...] = ()
    """Of the columns of the table that it was made of."""
    keys: tuple[tuple[float | None, ...], ...] = ()
    """What a row is sorted and filtered by where a column holds numbers; None elsewhere."""


_ALWAYS = ("number", "outcome", "role", "method", "rank", "alpha", "learning_rate", "seed")
_BEFORE_THE_REST = ("fidelity", "smallest_budget_bytes", "predicted_peak_bytes",
                    "measured_peak_bytes", "flops", "train_seconds")  # fmt: skip
_TOLD_ELSEWHERE = frozenset({*PEFT_NAMES, "target_rank", "rank_pattern", "pack_id"})
"""Of the list of trials: other names of its columns, a pattern, which is a figure, and the name of
a pack, which says nothing to people."""
_NAMES = {"fidelity": "share of full length"}
_WORDED = frozenset({"mean", "finished"})
"""Columns of numbers that are put into words before they get to the grid."""
_Write = Callable[[Any], str]


def rank_grid(ranks: pd.DataFrame, verdict: Verdict) -> Grid:
    """``rank_table`` in words. The largest rank is shown where modules differ in theirs."""
    wording: tuple[tuple[str, str, _Write], ...] = (
        ("rank", "rank", str),
        ("method", "method", str),
        ("r_max", "largest rank", str),
        ("marks", "", str),
        ("mean", objective_text(verdict.objective), str),
        ("num_seeds", "seeds", str),
        ("best_single", "best single", value_text),
        ("alpha", "alpha", str),
        ("learning_rate", "learning rate", rate_text),
        ("smallest_budget_bytes", "smallest budget", bytes_text),
        ("predicted_peak_bytes", "predicted peak", bytes_text),
        ("measured_peak_bytes", "measured peak", bytes_text),
        ("fits", "fits", lambda fits: "yes" if fits else "no"),
        ("num_trainable_params", "trainable", count_text),
        ("train_seconds", "train time", seconds_text),
        ("flops", "FLOPs", count_text),
        ("finished", "finished", str),
        ("num_pruned", "pruned", str),
    )
    names = [
        refit_text(kind, refit) for kind, refit in zip(ranks["kind"], ranks["refit"], strict=True)
    ]
    if not (ranks["r_max"] > ranks["rank"]).any():
        wording = tuple(entry for entry in wording if entry[0] != "r_max")
    classes = tuple(
        "recommended" if "recommended" in str(marks) else "" if fits is True else "unfit"
        for marks, fits in zip(ranks["marks"], ranks["fits"].astype(object), strict=True)
    )
    if not (ranks["num_pruned"] > 0).any():
        wording = tuple(entry for entry in wording if entry[0] != "num_pruned")
    shown = ranks.assign(method=names, mean=_means(ranks), marks=_marks(ranks),
                         finished=_finished(ranks))  # fmt: skip
    return _grid(shown, wording, classes)


def marks_text(marks: str | None, is_tied: bool | None) -> str:
    """What the verdict says of a rank, and whether the noise leaves it as good as the best."""
    named = (marks or "").split(", ") if marks else []
    if is_tied and "best" not in named:
        named.append("tied with best")
    return ", ".join(named)


def _means(ranks: pd.DataFrame) -> list[str]:
    return [
        ABSENT if pd.isna(mean) else mean_text(float(mean), None if pd.isna(half) else float(half))
        for mean, half in zip(ranks["objective"], ranks["half_width"], strict=True)
    ]


def _marks(ranks: pd.DataFrame) -> list[str]:
    plain = ranks[["marks", "is_tied"]].astype(object).where(ranks[["marks", "is_tied"]].notna())
    return [
        marks_text(marks, tied is True)
        for marks, tied in zip(plain["marks"], plain["is_tied"], strict=True)
    ]


def _finished(ranks: pd.DataFrame) -> list[str]:
    return [
        f"{done} of {tried}"
        for done, tried in zip(ranks["num_complete"], ranks["num_trials"], strict=True)
    ]


def trial_grid(trials: pd.DataFrame, objective: str) -> Grid:
    """Every trial: what it is and how it ended first, then the columns that tell trials apart."""
    first = [*_ALWAYS, *([objective] if objective in trials.columns else [])]
    costs = [name for name in _BEFORE_THE_REST if name in trials.columns]
    rest = [
        str(name)
        for name in dict.fromkeys([*costs, *trials.columns])
        if name not in first and name not in _TOLD_ELSEWHERE and _differs(trials, str(name))
    ]
    wording = tuple(
        (name, _NAMES.get(name, name.replace("_", " ")), _writer(name)) for name in (*first, *rest)
    )
    return _grid(trials, wording, tuple(str(outcome) for outcome in trials["outcome"]))


def in_words(rows: pd.DataFrame, names: Sequence[str], titles: Mapping[str, str]) -> Grid:
    """The named columns, each worded by its unit; ``titles`` where its name is not the header."""
    wording = tuple(
        (
            name,
            titles.get(name, name.removesuffix("_bytes").replace("_", " ")),
            _writer(name) if _is_number(rows[name]) and not name.startswith("num_") else str,
        )
        for name in names
    )
    return _grid(rows, wording, ())


def _differs(trials: pd.DataFrame, name: str) -> bool:
    """Whether a column tells trials apart. That only AdaLoRA has an allocation, its name says."""
    return trials[name].nunique(dropna=name in ALLOCATION_COLUMNS) > 1


def tiles(verdict: Verdict) -> list[tuple[str, str, str]]:
    """The numbers on top of the page: what, how much, and a remark."""
    found: list[tuple[str, str, str]] = []
    name = objective_text(verdict.objective)
    chosen = verdict.standings.get("recommended")
    if chosen is not None:
        record = chosen.record
        settings = [
            refit_text(kind_of(record), is_refit(record)),
            f"alpha {record.alpha}",
            f"learning rate {rate_text(record.learning_rate)}",
        ]
        if needs_room(record):
            settings.append(f"largest rank of a module {record.r_max}")
        found.append(("rank to take", str(record.rank), ", ".join(settings)))
        seeds = f"mean of {chosen.num_seeds} seeds" if chosen.num_seeds > 1 else "one seed"
        if chosen.half_width is not None:
            seeds += ", ± 95 %"
        elif verdict.noise is None:
            seeds += ", noise not known"
        if verdict.baseline is not None:
            seeds += f"; base model {value_text(verdict.baseline)}"
        found.append((name, mean_text(chosen.objective, chosen.half_width), seeds))
        budget = verdict.memory_budget_bytes
        limit = f"of {bytes_text(budget)}" if budget is not None else "no budget set"
        if chosen.need_bytes not in (None, chosen.record.measured_peak_bytes):
            limit = f"predicted, {limit}"
        found.append(("memory needed", bytes_text(chosen.need_bytes), limit))
    if verdict.gain is not None:
        found.append(
            (
                "gain over the tuned default",
                _gain_value(verdict.gain),
                difference_text(verdict.gain.difference, verdict.gain.half_width)
                + (" (95 %)" if verdict.gain.half_width is not None else ", noise not known"),
            )
        )
    finished = f"{verdict.num_complete} finished at full length"
    if verdict.num_pruned:
        finished += f", {verdict.num_pruned} pruned"
    found.append(("trials", str(verdict.num_trials), finished))
    return found


def _gain_value(gain: Gain) -> str:
    """A gain that may be zero is not put in large figures."""
    if gain.half_width is not None and not gain.is_certain:
        return "within noise"
    return percent_text(gain.relative) if gain.relative is not None else ABSENT


def _grid(
    frame: pd.DataFrame, wording: tuple[tuple[str, str, _Write], ...], classes: tuple[str, ...]
) -> Grid:
    columns = [
        [ABSENT if pd.isna(value) else write(value) for value in frame[name]]
        for name, _, write in wording
    ]
    return Grid(
        headers=tuple(header for _, header, _ in wording),
        rows=tuple(zip(*columns, strict=True)),
        is_number=tuple(name in _WORDED or _is_number(frame[name]) for name, _, _ in wording),
        classes=classes,
        names=tuple(name for name, _, _ in wording),
        keys=tuple(zip(*(_keys(frame[name]) for name, _, _ in wording), strict=True)),
    )


def _keys(column: pd.Series[Any]) -> list[float | None]:
    if not _is_number(column):
        return [None] * len(column)
    return [None if pd.isna(value) else float(value) for value in column]


def _is_number(column: pd.Series[Any]) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _writer(name: str) -> _Write:
    """How a column of the table is worded, by the unit in its name."""
    if name.endswith("_bytes"):
        return bytes_text
    if name == "learning_rate":
        return rate_text
    if name == "train_seconds":
        return seconds_text
    if name in ("flops", "tokens", "num_trainable_params"):
        return count_text
    if name == "fidelity":
        return percent_text
    if name in ("feasible", "refit"):
        return lambda holds: "yes" if holds else "no"
    if {**COLUMNS, **ALLOCATION_COLUMNS}.get(name, "Float64") == "Float64":
        return lambda value: f"{value:.4g}"
    return str
