"""What each rank costs in memory, time and compute, and what it buys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from rsauto.records import TrialRecord
from rsauto.report.kinds import kind_of, kinds
from rsauto.report.noise import configurations, full_runs
from rsauto.report.pareto import fits
from rsauto.report.table import is_refit, needed_bytes, table
from rsauto.report.verdict import Verdict

RANK_COLUMNS = {
    "method": "string",
    "kind": "string",
    "refit": "bool",
    "rank": "Int64",
    "r_max": "Int64",
    "num_trials": "Int64",
    "num_complete": "Int64",
    "num_pruned": "Int64",
    "objective": "Float64",
    "half_width": "Float64",
    "num_seeds": "Int64",
    "best_single": "Float64",
    "alpha": "Int64",
    "learning_rate": "Float64",
    "smallest_budget_bytes": "Int64",
    "predicted_peak_bytes": "Int64",
    "measured_peak_bytes": "Int64",
    "num_trainable_params": "Int64",
    "adapter_bytes": "Int64",
    "train_seconds": "Float64",
    "flops": "Float64",
    "fits": "boolean",
    "marks": "string",
    "is_tied": "boolean",
}
"""Columns of ``rank_table``. kind is the method, with the powers of rank where a study sets them
(``rsauto.report.kinds``). objective is the mean over seeds of the rank's best configuration,
half_width that of the mean's 95 % interval (NA for a single run), best_single the best trial; the
settings and costs are those of that configuration, and r_max is the largest rank of any of its
modules, which a server must allow. measured_peak_bytes and train_seconds are of trials that ran
alone: those of that configuration, else others of the row that cost the same; NA where none did.
is_tied says whether the row is not told apart from the best over the seeds; NA where it is no
candidate or nothing is known about the noise."""

_COSTS = (
    "smallest_budget_bytes",
    "predicted_peak_bytes",
    "measured_peak_bytes",
    "num_trainable_params",
    "adapter_bytes",
    "train_seconds",
    "flops",
)

_MEASURED = ("measured_peak_bytes", "train_seconds")


def rank_table(records: Sequence[TrialRecord], verdict: Verdict) -> pd.DataFrame:
    """One row for every kind and rank, smallest rank first, and one for each rank's refits.

    A rank's configuration is the best of those that ran on the most seeds at that rank. A rank of
    which nothing finished still shows what it would need; ``fits`` is NA where that is not known.
    ``marks`` names the rows that the verdict is about: recommended, best, default_tuned, default.
    """
    trials = table(records)
    if verdict.objective not in trials.columns:
        trials[verdict.objective] = pd.array([None] * len(trials), dtype="Float64")
    trials = trials.assign(kind=kinds(trials))
    rows = [
        _row(group, verdict)
        for _, group in trials.groupby(["rank", "kind", "refit"], sort=True, observed=True)
    ]
    return pd.DataFrame(rows, columns=list(RANK_COLUMNS)).astype(RANK_COLUMNS)


def packing_note(records: Sequence[TrialRecord]) -> str | None:
    """What memory and time mean in a study of which trials shared packs; None where none did."""
    packed = [record for record in records if record.engine == "packed"]
    if not packed:
        return None
    most = max(record.pack_size or 1 for record in packed)
    how = f"in packs, up to {most} together" if most > 1 else "in turns with others of their cohort"
    return (
        f"{len(packed)} of {len(records)} trials were trained {how}; "
        "such a trial has no peak or time of its own. Measured peaks and times are of trials that "
        "ran alone, and missing where none of a rank did; predictions are of a trial alone."
    )


def _row(group: pd.DataFrame, verdict: Verdict) -> dict[str, Any]:
    runs = full_runs(group, verdict.objective)
    first = group.iloc[0]
    row: dict[str, Any] = {
        "method": first["method"],
        "kind": first["kind"],
        "refit": first["refit"],
        "rank": first["rank"],
        "num_trials": len(group),
        "num_complete": len(runs),
        "num_pruned": int((group["outcome"] == "pruned").sum()),
        "fits": _fits(group, verdict.memory_budget_bytes),
        "marks": _marks(first, verdict),
    }
    if runs.empty:
        return row | {name: group[name].min() for name in _COSTS[:4]}
    rows = configurations(runs)
    rows = rows[rows["num_seeds"] == rows["num_seeds"].max()]
    best = rows.sort_values(verdict.objective, ascending=verdict.minimize, kind="stable").iloc[0]
    single = runs[verdict.objective]
    row |= {name: best[name] for name in ("r_max", "num_seeds", "alpha", "learning_rate", *_COSTS)}
    row |= _measured_alone(best, runs)
    return row | {
        "objective": best[verdict.objective],
        "half_width": _half_width(best, verdict),
        "is_tied": _is_tied(best, verdict),
        "best_single": single.min() if verdict.minimize else single.max(),
    }


def _half_width(best: pd.Series[Any], verdict: Verdict) -> float | None:
    if verdict.noise is None or best["num_seeds"] < 2:
        return None
    return verdict.noise.mean_half_width(int(best["num_seeds"]))


def _is_tied(best: pd.Series[Any], verdict: Verdict) -> bool | None:
    if verdict.noise is None or best["num_seeds"] < verdict.candidate_seeds:
        return None
    return best["number"] in {standing.record.number for standing in verdict.ties}


def _measured_alone(best: pd.Series[Any], runs: pd.DataFrame) -> dict[str, Any]:
    """Peak and time of a configuration that was only trained in packs, by trials of its rank that
    ran alone, on the same layers and in the same micro-batches: what they cost does not depend on
    learning rate or alpha. Empty where it ran alone itself."""
    if best[list(_MEASURED)].notna().any():
        return {}
    alike = runs
    for name in ("target_modules", "micro_batch_size"):
        alike = alike[alike[name].isin([best[name]])]
    peak, seconds = (alike[name].dropna() for name in _MEASURED)
    return {
        "measured_peak_bytes": peak.max() if len(peak) else pd.NA,
        "train_seconds": seconds.mean() if len(seconds) else pd.NA,
    }


def _fits(group: pd.DataFrame, budget: int | None) -> bool | None:
    """Whether any trial of a rank fits; unknown where no peak is and none was refused."""
    ran = ~group["outcome"].isin(["infeasible", "oom"])
    if (ran & fits(group, budget)).any():
        return True
    known = needed_bytes(group).notna() | ~ran
    return False if known.all() else None


def _marks(row: pd.Series[Any], verdict: Verdict) -> str:
    kind = (row["rank"], row["kind"], row["refit"])
    named = {
        "recommended": verdict.recommended,
        "best": verdict.best,
        "tuned default": verdict.default_tuned,
        "default": verdict.default,
    }
    return ", ".join(
        name
        for name, record in named.items()
        if record is not None and (record.rank, kind_of(record), is_refit(record)) == kind
    )
