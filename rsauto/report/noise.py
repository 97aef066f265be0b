"""Repeated seeds: which trials repeat one another, and how far apart two means must be.

Notation
    n_i      seeds of configuration i, s_i their standard deviation
    nu       degrees of freedom, sum_i (n_i - 1)
    s_p      pooled standard deviation, s_p^2 = sum_i (n_i - 1) s_i^2 / nu
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from rsauto.intervals import t_quantile as t_quantile
from rsauto.records import ADALORA_METHODS
from rsauto.report.table import ALLOCATION_COLUMNS, metric_columns

CONFIGURATION = (
    "method",
    "rank",
    "init_rank",
    "target_rank",
    "alpha",
    "scaling_rule",
    "scaling_exponent",
    "init_scale",
    "target_modules",
    "learning_rate",
    "lr_ratio",
    "lambda_lr_ratio",
    "optimizer",
    "schedule",
    "warmup_share",
    "weight_decay",
    "max_grad_norm",
    "batch_size",
    "max_length",
    "num_evals",
    *ALLOCATION_COLUMNS,
)
"""What makes two trials repetitions of one another, with the planned number of steps and a rank
pattern that was given: everything that decides a trial but its seed. How a batch is split
(micro_batch_size) changes only rounding."""

FOREIGN = "param_"
"""Before the names of parameters of a study that was not ours; they tell configurations apart."""

_AVERAGED = (
    "eval_loss",
    "perplexity",
    "train_loss",
    "train_seconds",
    "train_time",
    "tokens_per_second",
)
_LARGEST = ("measured_peak_bytes", "accelerator_memory_max")


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """How much an objective moves when nothing but the seed changes."""

    pooled_deviation: float
    """s_p, in the objective's own unit."""
    degrees_of_freedom: int
    num_configurations: int
    """Configurations with two or more seeds, all taken to be equally noisy."""

    def half_width(self, num_seeds: int, other_num_seeds: int, num_comparisons: int = 1) -> float:
        """Half width of the 95 % interval of a difference of two means over seeds,

            t_{1 - 0.025 / k, nu} s_p sqrt(1/n + 1/m)

        (two-sample interval with a pooled deviation, NIST/SEMATECH e-Handbook, section 7.3.1.1).
        With k = ``num_comparisons`` such intervals, all of them hold together with 95 % or more.
        Seeds that two configurations share are not paired up, which makes it too wide, if anything.
        """
        if num_seeds < 1 or other_num_seeds < 1:
            raise ValueError(f"a mean needs a seed or more, got {num_seeds=}, {other_num_seeds=}")
        spread = math.sqrt(1 / num_seeds + 1 / other_num_seeds)
        quantile = t_quantile(self.degrees_of_freedom, num_comparisons)
        return quantile * self.pooled_deviation * spread

    def standard_error(self, num_seeds: int) -> float:
        """Standard error of one mean over seeds, s_p / sqrt(n)."""
        if num_seeds < 1:
            raise ValueError(f"a mean needs a seed or more, got {num_seeds=}")
        return self.pooled_deviation / math.sqrt(num_seeds)

    def mean_half_width(self, num_seeds: int) -> float:
        """Half width of the 95 % interval of one mean over seeds, t_{0.975, nu} s_p / sqrt(n)."""
        return t_quantile(self.degrees_of_freedom) * self.standard_error(num_seeds)


def full_runs(trials: pd.DataFrame, objective: str) -> pd.DataFrame:
    """The rows that may be compared: complete, at full length, with a value of the objective.

    A column that a hand-made table lacks restricts nothing.
    """
    kept = trials[objective].notna()
    if "outcome" in trials.columns:
        kept &= (trials["outcome"] == "complete").fillna(False)
    if "fidelity" in trials.columns:
        kept &= (trials["fidelity"] > 1 - 1e-6).fillna(True)
    return trials[kept.astype(bool)]


def configurations(trials: pd.DataFrame) -> pd.DataFrame:
    """One row a configuration, in the order in which they first appear.

    Losses, metrics and times are means over seeds (a seed that ran twice counts once, as its own
    mean), measured peaks the largest; the rest is that of one trial, preferably one that ran alone.
    Added columns: num_seeds, and roles and numbers, those of its trials joined by commas.
    """
    groups: dict[Hashable, list[int]] = {}
    for position, key in enumerate(_keys(trials)):
        groups.setdefault(key, []).append(position)
    members = list(groups.values())
    seeds = _seeds(trials)
    merged = trials.iloc[_representatives(trials, members)].copy()
    # Plain lists, a column at a time: pandas would spend milliseconds on every group.
    for name in (*_AVERAGED, *metric_columns(trials)):
        if name in trials.columns and pd.api.types.is_numeric_dtype(trials[name]):
            values = _plain(trials[name])
            means = [_mean_over_seeds(group, values, seeds) for group in members]
            merged[name] = pd.array(means, dtype="Float64")
    for name in _LARGEST:
        if name in trials.columns:
            values = _plain(trials[name])
            known = [[values[i] for i in group if values[i] is not None] for group in members]
            merged[name] = pd.array([max(peaks, default=None) for peaks in known], dtype="Int64")
    counts = [len({seeds[i] for i in group}) for group in members]
    merged["num_seeds"] = pd.array(counts, dtype="Int64")
    for name, source in (("roles", "role"), ("numbers", "number")):
        values = _plain(trials[source]) if source in trials.columns else [None] * len(trials)
        there = [sorted({values[i] for i in group} - {None}) for group in members]
        merged[name] = pd.array([",".join(map(str, v)) for v in there], dtype="string")
    return merged


def seed_noise(trials: pd.DataFrame, objective: str = "eval_loss") -> Noise | None:
    """Pooled deviation over all configurations that ran on two or more seeds; None without any."""
    runs = full_runs(trials, objective)
    groups: dict[Hashable, dict[Hashable, list[float]]] = {}
    for key, seed, value in zip(_keys(runs), _seeds(runs), runs[objective], strict=True):
        groups.setdefault(key, {}).setdefault(seed, []).append(float(value))
    repeated = [
        [statistics.fmean(values) for values in by_seed.values()]
        for by_seed in groups.values()
        if len(by_seed) > 1
    ]
    if not repeated:
        return None
    freedom = sum(len(means) - 1 for means in repeated)
    variance = sum((len(means) - 1) * statistics.variance(means) for means in repeated) / freedom
    return Noise(
        pooled_deviation=math.sqrt(variance),
        degrees_of_freedom=freedom,
        num_configurations=len(repeated),
    )


def _representatives(trials: pd.DataFrame, members: list[list[int]]) -> list[int]:
    """The trial that stands for each configuration: the first that ran alone, else the first."""
    if "measured_peak_bytes" not in trials.columns:
        return [group[0] for group in members]
    measured = trials["measured_peak_bytes"].notna().tolist()
    return [next((i for i in group if measured[i]), group[0]) for group in members]


def _mean_over_seeds(group: list[int], values: list[Any], seeds: list[Hashable]) -> float | None:
    """Mean of the seeds' means, over those that have a value."""
    by_seed: dict[Hashable, list[float]] = {}
    for i in group:
        if values[i] is not None:
            by_seed.setdefault(seeds[i], []).append(values[i])
    if not by_seed:
        return None
    return statistics.fmean(statistics.fmean(found) for found in by_seed.values())


def _plain(column: pd.Series[Any]) -> list[Any]:
    return [None if pd.isna(value) else value for value in column.tolist()]


def _keys(trials: pd.DataFrame) -> list[Hashable]:
    """The configuration of every row. NA equals NA here, which pandas' own grouping does not
    promise for its nullable types."""
    names = [name for name in CONFIGURATION if name in trials.columns]
    names += [str(name) for name in trials.columns if str(name).startswith(FOREIGN)]
    columns = [_plain(trials[name]) for name in names]
    columns += [_planned_steps(trials), _given_patterns(trials)]
    return list(zip(*columns, strict=True))


def _given_patterns(trials: pd.DataFrame) -> list[Any]:
    """The rank pattern a trial was told to train. AdaLoRA's is its result and moves with the seed,
    so it tells no two configurations apart."""
    if "rank_pattern" not in trials.columns:
        return [None] * len(trials)
    methods = _plain(trials["method"]) if "method" in trials.columns else [None] * len(trials)
    return [
        None if method in ADALORA_METHODS else pattern
        for method, pattern in zip(methods, _plain(trials["rank_pattern"]), strict=True)
    ]


def _planned_steps(trials: pd.DataFrame) -> list[Any]:
    """Steps of a full-length run: the steps done over their share of it."""
    if "steps" not in trials.columns or "fidelity" not in trials.columns:
        return [None] * len(trials)
    return [
        None if steps is None or not share else round(steps / share)
        for steps, share in zip(_plain(trials["steps"]), _plain(trials["fidelity"]), strict=True)
    ]


def _seeds(trials: pd.DataFrame) -> list[Hashable]:
    """The seed of every row; rows without one count as different ones."""
    seeds = _plain(trials["seed"]) if "seed" in trials.columns else [None] * len(trials)
    return [("row", i) if seed is None else seed for i, seed in enumerate(seeds)]
