"""The two questions asked of a table of trials: what cannot be beaten, and which rank to take."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from numbers import Integral
from typing import Any, Literal, get_args

import pandas as pd

from rsauto.config import MINIMISED
from rsauto.devices import read_budget
from rsauto.errors import InputError, nearest
from rsauto.report.noise import Noise, configurations, full_runs, seed_noise
from rsauto.report.table import cost_bytes, metric_columns, needed_bytes
from rsauto.units import bytes_text, count_text, seconds_text

Preference = Literal["cheapest", "best", "largest"]


def pareto(
    trials: pd.DataFrame,
    x: str = "predicted_peak_bytes",
    y: str = "eval_loss",
    minimize_y: bool | None = None,
) -> pd.DataFrame:
    """The complete, feasible trials that no other one beats, sorted by ``x``.

    One trial beats another if it is no worse in both and better in one; ``x`` is a cost, less is
    better. Trials that are equal in both are all kept. Trials without a value of ``x`` or ``y``
    take no part. ``minimize_y`` None decides by the objective's name.
    """
    for name in (x, y):
        _check_column(trials, name)
    if minimize_y is None:
        minimize_y = _is_minimised(trials, y)
    runs = full_runs(trials, y)
    if "feasible" in runs.columns:
        runs = runs[runs["feasible"].astype(bool)]
    runs = runs[runs[x].notna()]
    runs = runs.sort_values([x, y], ascending=[True, minimize_y], kind="stable")
    kept: list[bool] = []
    front: tuple[float, float] | None = None
    for cost, value in zip(runs[x].astype(float), runs[y].astype(float), strict=True):
        better = front is None or (value < front[1] if minimize_y else value > front[1])
        kept.append(better or (cost, value) == front)
        if better:
            front = (cost, value)
    return runs[pd.Series(kept, index=runs.index, dtype=bool)]


def select_rank(
    trials: pd.DataFrame,
    memory_budget: int | str | None = None,
    within: float = 0.01,
    prefer: Preference = "cheapest",
    objective: str = "eval_loss",
    minimize: bool | None = None,
    *,
    min_seeds: int = 1,
    time_budget: float | str | timedelta | None = None,
    parameters: int | None = None,
) -> pd.Series[Any]:
    """The row of the configuration to take, averaged over its seeds (see ``configurations``).

    Considered are full-length complete trials that need no more than ``memory_budget`` (bytes, or
    text such as "24GiB"; None takes the budget each trial ran under), defaults included;
    with ``time_budget`` (seconds, or text such as "90min" or "2h") those whose optimizer steps took
    no longer on the study's device, with ``parameters`` those that train no more of them.
    A trial that was only trained in a pack has no time of its own and does not count as fitting a
    time that is given, nor does anything whose cost is not known.

    cheapest  of those no further from the best than ``within`` (relative to it) or one standard
              error of its mean over seeds, whichever is more, the one that can be trained in the
              least memory, then the fewest FLOPs, then the best objective
    best      the best objective, then the least memory, then the fewest FLOPs
    largest   the largest rank, at its best objective: the rule of the rsLoRA paper

    ``min_seeds`` leaves out configurations that ran on fewer seeds: the best of many single runs is
    partly luck. ``minimize`` None goes by the direction of the Optuna study that the table is of,
    and else by the objective's name. Raises InputError if nothing fits, or an argument makes no
    sense.
    """
    _check_arguments(trials, within, prefer, objective)
    rows = configurations(full_runs(trials, objective))
    rows = rows[rows["num_seeds"] >= min_seeds]
    limits: tuple[tuple[str, str, float | None, Callable[[float], str]], ...] = (
        ("time_budget", "train_seconds", _seconds(time_budget), seconds_text),
        ("parameters", "num_trainable_params", _parameters(parameters), count_text),
    )
    for name, column, limit, text in limits:
        if limit is not None:
            rows = _within(rows, column, limit, f"{name} of {text(limit)}", text)
    return choose(
        rows,
        _budget(memory_budget),
        within,
        prefer,
        objective=objective,
        minimize=_is_minimised(trials, objective) if minimize is None else minimize,
        noise=seed_noise(trials, objective),
    )


def choose(
    rows: pd.DataFrame,
    memory_budget_bytes: int | None,
    within: float = 0.0,
    prefer: Preference = "cheapest",
    *,
    objective: str,
    minimize: bool,
    noise: Noise | None = None,
) -> pd.Series[Any]:
    """``select_rank`` on rows that are configurations already, one row each."""
    rows = _fitting(rows, memory_budget_bytes, objective)
    loss = rows[objective].astype(float) * (1.0 if minimize else -1.0)
    if prefer == "largest":
        kept = rows["rank"] == rows["rank"].max()
    elif prefer == "best":
        kept = loss.notna()
    else:
        kept = _as_good(loss, rows["num_seeds"], within, noise)
    near = rows[kept].assign(_loss=loss[kept], _memory=cost_bytes(rows[kept]))
    costs = [name for name in ("_memory", "flops") if name in near.columns]
    order = [*costs, "_loss"] if prefer == "cheapest" else ["_loss", *costs]
    chosen: pd.Series[Any] = (
        near.sort_values(order, kind="stable").iloc[0].drop(["_loss", "_memory"])
    )
    return chosen


def _as_good(
    loss: pd.Series[float], num_seeds: pd.Series[int], within: float, noise: Noise | None
) -> pd.Series[bool]:
    """Which mean losses are no further from the lowest, m, than max(within |m|, one standard error
    of m over its seeds).

    The one-standard-error rule, here with a standard error that is pooled over all repeated
    configurations, since each has few seeds (Breiman, Friedman, Olshen and Stone 1984,
    Classification and Regression Trees, section 3.4.3). ``noise`` None leaves ``within`` alone.
    """
    best = int(loss.argmin())
    lowest = float(loss.iloc[best])
    error = 0.0 if noise is None else noise.standard_error(int(num_seeds.iloc[best]))
    # The last term keeps a row in that lies on the limit but for rounding.
    return loss - lowest <= max(within * abs(lowest), error) + 1e-12 * abs(lowest)


def fits(rows: pd.DataFrame, memory_budget_bytes: int | None) -> pd.Series[bool]:
    """Whether each row needs no more than the budget; None takes the one it ran under.

    A row of which no peak is known does not count as fitting a budget that is given.
    """
    if memory_budget_bytes is not None:
        return (needed_bytes(rows) <= memory_budget_bytes).fillna(False).astype(bool)
    if "feasible" in rows.columns:
        return rows["feasible"].astype(bool)
    return pd.Series(True, index=rows.index, dtype=bool)


def _fitting(rows: pd.DataFrame, budget: int | None, objective: str) -> pd.DataFrame:
    """Rows within the budget. Raises InputError that says what the smallest one would need."""
    if rows.empty:
        raise InputError(
            f"no trial finished at full length with a value of {objective}: continue the study"
        )
    fitting = rows[fits(rows, budget)]
    if not fitting.empty:
        return fitting
    needs = needed_bytes(rows)
    if needs.isna().all():
        raise InputError("no trial has a peak memory, predicted or measured: leave out the budget")
    least = rows[(needs == needs.min()).fillna(False).astype(bool)].iloc[0]
    limit = least["memory_budget_bytes"] if budget is None else budget
    raise InputError(
        f"no configuration fits the memory budget of {bytes_text(limit)}: the smallest, "
        f"rank {least['rank']}, needs {bytes_text(int(needs.min()))} as it was run. "
        "A study with that memory_budget would run it at a smaller micro-batch"
    )


def _within(
    rows: pd.DataFrame, column: str, limit: float, named: str, text: Callable[[float], str]
) -> pd.DataFrame:
    """Rows that cost no more than ``limit``. Raises InputError that names the cheapest."""
    costs = pd.to_numeric(rows.get(column, pd.Series(pd.NA, index=rows.index)), errors="coerce")
    kept = rows[(costs <= limit).fillna(False).astype(bool)]
    if not kept.empty or rows.empty:
        return kept
    if costs.isna().all():
        raise InputError(f"no configuration has {column} of its own: leave out the {named}")
    cheapest = rows[(costs == costs.min()).fillna(False).astype(bool)].iloc[0]
    raise InputError(
        f"no configuration is within the {named}: the cheapest, rank {cheapest['rank']}, takes "
        f"{text(float(costs.min()))}"
    )


def _check_arguments(trials: pd.DataFrame, within: float, prefer: str, objective: str) -> None:
    if prefer not in get_args(Preference):
        raise InputError(f"prefer must be 'cheapest', 'best' or 'largest', got {prefer!r}")
    if not (math.isfinite(within) and within >= 0):
        raise InputError(f"within must be a share such as 0.01, zero or more, got {within!r}")
    _check_column(trials, objective)


def _is_minimised(trials: pd.DataFrame, objective: str) -> bool:
    told: dict[str, bool] = trials.attrs.get("minimize", {})
    is_known = objective in MINIMISED or objective not in metric_columns(trials)
    return told.get(objective, is_known)


def _check_column(trials: pd.DataFrame, name: str) -> None:
    if name in trials.columns and pd.api.types.is_numeric_dtype(trials[name]):
        return
    objectives = [c for c in sorted(MINIMISED) if c in trials.columns] + metric_columns(trials)
    reason = "is not a number" if name in trials.columns else "is not a column of the table"
    raise InputError(
        f"{name!r} {reason}; objectives are {', '.join(objectives)}."
        + nearest(name, map(str, trials.columns))
    )


def _budget(memory_budget: int | str | None) -> int | None:
    if memory_budget is None:
        return None
    try:
        return read_budget(memory_budget).total_bytes
    except ValueError as error:
        raise InputError(f"memory_budget {memory_budget!r}: {error}") from None


def _seconds(time_budget: float | str | timedelta | None) -> float | None:
    """Seconds of a number or a text such as "90min"."""
    if time_budget is None:
        return None
    try:
        if isinstance(time_budget, str) and not time_budget.strip().isdecimal():
            time_budget = pd.Timedelta(time_budget)
        if isinstance(time_budget, timedelta):
            time_budget = time_budget.total_seconds()
        found = float(time_budget)
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(time_budget, bool) or not (math.isfinite(found) and found > 0):
        raise InputError(
            f'time_budget must be seconds, or text such as "90min" or "2h", got {time_budget!r}'
        )
    return found


def _parameters(parameters: int | None) -> int | None:
    if parameters is None:
        return None
    is_whole = isinstance(parameters, Integral) and not isinstance(parameters, bool)
    if not (is_whole and parameters > 0):
        raise InputError(f"parameters must be a whole number above zero, got {parameters!r}")
    return int(parameters)
