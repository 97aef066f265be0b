"""Which settings the objective depended on, estimated from the trials of the study.

A random forest (Breiman, "Random Forests", 2001) learns the objective from the settings; the
importance of a setting is how much worse the forest predicts once the values of that setting are
shuffled among the configurations (permutation importance, section 10 there), as a share of the sum
over all settings. It is an estimate: the configurations are where the search chose to look, and two
settings that it moved together share their importance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from rsauto.report.noise import CONFIGURATION, configurations, full_runs
from rsauto.report.panel import BLUE, Layer, Panel
from rsauto.report.table import ALLOCATION_COLUMNS
from rsauto.report.trial_layers import Scale
from rsauto.report.verdict import Verdict
from rsauto.units import objective_text, percent_text

MIN_CONFIGURATIONS = 10
"""Fewer say nothing about a dependence on several settings."""

_NUM_TREES = 100
_NUM_SHUFFLES = 5
_SEED = 0

# scaling_rule follows from the method, target_rank is the rank of AdaLoRA.
_FOLLOWING = frozenset({"scaling_rule", "target_rank", "num_evals"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """How the objective depends on the settings that were varied."""

    shares: dict[str, float]
    """Of each setting, largest first; they sum to one."""
    num_configurations: int
    explained: float
    """Share of the variance that the forest predicts of configurations it has not seen, R^2 out of
    bag; zero or less says that the shares mean nothing."""


def importance(trials: pd.DataFrame, verdict: Verdict) -> Importance | None:
    """Over feasible configurations at full length, each a mean over its seeds.

    None with fewer than MIN_CONFIGURATIONS of them, or fewer than two settings that vary. Values
    far off the scale of the figures count as at its end, or one hopeless learning rate would be
    all there is.
    """
    runs = full_runs(trials, verdict.objective)
    rows = configurations(runs[runs["feasible"]])
    settings = _settings(rows)
    scale = Scale.of(trials, verdict)
    values = rows[verdict.objective].astype(float).clip(scale.low, scale.high)
    if len(rows) < MIN_CONFIGURATIONS or settings.shape[1] < 2 or values.nunique() < 2:
        return None
    return _importance(settings, values)


def importance_panel(trials: pd.DataFrame, verdict: Verdict) -> Panel | None:
    """Settings from the top, the most important first."""
    found = importance(trials, verdict)
    if found is None:
        return None
    names = list(found.shares)
    told = [f"{_name(name)} {percent_text(share)}" for name, share in found.shares.items()]
    trust = (
        f"It predicts {percent_text(found.explained)} of the variance of configurations that it "
        "has not seen (out of bag)."
        if found.explained > 0
        else "It predicts nothing of configurations that it has not seen (out of bag): do not rely "
        "on these shares."
    )
    return Panel(
        key="importance",
        title="What the result depended on",
        finding=f"{', '.join(told)}.",
        caption=f"Estimated importance of each setting for the {objective_text(verdict.objective)} "
        f"of {found.num_configurations} feasible configurations: how much worse a random forest "
        f"predicts once a setting's values are shuffled. {trust} The configurations are where the "
        "search chose to look; a setting that was tried in a narrow range seems unimportant.",
        x_label="share of the importance",
        y_label="",
        layers=(
            Layer(
                name="importance",
                x=tuple(x for share in found.shares.values() for x in (0.0, share, math.nan)),
                y=tuple(float(y) for n in range(len(names)) for y in (n, n, math.nan)),
                colour=BLUE,
                dash="solid",
                width=5.0,
                in_legend=False,
            ),
            Layer(
                name="importance",
                x=tuple(found.shares.values()),
                y=tuple(map(float, range(len(names)))),
                colour=BLUE,
                symbol="circle",
                size=13.0,
                hover=tuple(told),
                in_legend=False,
            ),
        ),
        x_range=(0.0, 1.08 * max(found.shares.values())),
        x_ticks=tuple((n / 10, f"{10 * n} %") for n in range(11)),
        y_ticks=tuple((float(n), _name(name)) for n, name in enumerate(names)),
        y_range=(len(names) - 0.5, -0.5),
    )


def _settings(rows: pd.DataFrame) -> pd.DataFrame:
    """The settings that vary, as numbers. A forest only compares, so text can be numbered in any
    order, and what a method does not have is a number of its own."""
    kept = {}
    for name in CONFIGURATION:
        if name in _FOLLOWING or name in ALLOCATION_COLUMNS or name not in rows.columns:
            continue
        column = rows[name]
        if column.nunique(dropna=False) < 2:
            continue
        if pd.api.types.is_numeric_dtype(column):
            kept[name] = column.astype("Float64").fillna(-1.0).astype(float)
        else:
            numbers = pd.factorize(column, sort=True)[0]
            kept[name] = pd.Series(numbers, index=rows.index, dtype=float)
    return pd.DataFrame(kept)


def _importance(settings: pd.DataFrame, values: pd.Series[float]) -> Importance | None:
    # Here, because a report of a small study need not wait for it.
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    forest = RandomForestRegressor(_NUM_TREES, oob_score=True, random_state=_SEED)
    features = settings.to_numpy()
    forest.fit(features, values.to_numpy())
    drops = permutation_importance(
        forest, features, values.to_numpy(), n_repeats=_NUM_SHUFFLES, random_state=_SEED
    ).importances_mean
    positive = [max(0.0, float(drop)) for drop in drops]
    total = sum(positive)
    if not total:
        return None
    found = {name: drop / total for name, drop in zip(settings.columns, positive, strict=True)}
    return Importance(
        shares=dict(sorted(found.items(), key=lambda item: -item[1])),
        num_configurations=len(settings),
        explained=float(forest.oob_score_),
    )


def _name(setting: str) -> str:
    return setting.replace("_", " ")
