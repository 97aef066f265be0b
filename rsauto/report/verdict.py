"""What the study says: the default, the tuned default, the best, the one to take, and the gain.

The headline compares what is recommended with the tuned default, means over the same number of
seeds. The best of many single runs is partly luck, so once finalists ran on several seeds only
configurations with as many seeds as they have are candidates. Defaults are candidates like any
other: where they win, the verdict says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from rsauto.config import StudyConfig
from rsauto.errors import InputError, nearest
from rsauto.records import ADALORA_METHODS, TrialRecord
from rsauto.report.noise import Noise, configurations, full_runs, seed_noise
from rsauto.report.pareto import Preference, choose, fits
from rsauto.report.standing import Gain, Standing, gain_over, standing_of
from rsauto.report.table import cost_bytes, metric_columns, needed_bytes, table
from rsauto.report.wording import sentences


@dataclass(frozen=True, kw_only=True, slots=True)
class TooLarge:
    """A rank of which no trial fits the memory budget."""

    rank: int
    need_bytes: int | None
    """The least that any of its trials needs."""
    ran_out: bool
    """Planned to fit, but ran out of memory."""
    is_allocated: bool = False
    """Tried with AdaLoRA alone, which starts with more rank and needs more memory than others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The study's answer. What the records do not support is None."""

    objective: str
    minimize: bool
    memory_budget_bytes: int | None
    within: float
    num_trials: int
    num_complete: int
    """Trials that may be compared: complete, at full length."""
    num_pruned: int
    """Trials that were stopped early, compared with others at the same step."""
    candidate_seeds: int
    """Seeds a configuration must have run on to be best or recommended."""
    baseline: float | None
    """The objective of the untouched base model."""
    noise: Noise | None
    default: TrialRecord | None
    """PEFT's and Trainer's defaults, however that trial ended."""
    default_tuned: TrialRecord | None
    best: TrialRecord | None
    recommended: TrialRecord | None
    standings: Mapping[str, Standing]
    """Means behind default, default_tuned, best and recommended, where they finished."""
    ties: tuple[Standing, ...]
    """The best and what seeds do not tell apart from it, least memory first; or nothing."""
    tie_half_width: float | None
    """Candidates no further apart than this are not told apart: the intervals of their differences
    from the best hold all together with 95 %. None where nothing is known about the noise."""
    gain: Gain | None
    """Of recommended over default_tuned; None where either is missing or they are the same."""
    too_large: tuple[TooLarge, ...]
    ended: str | None
    """Why the search ended, where the study has written it down."""

    @property
    def sentences(self) -> tuple[str, ...]:
        """The verdict in words: which rank to take and why, the gain, what did not fit."""
        return sentences(self)

    @property
    def sentence(self) -> str:
        return " ".join(self.sentences)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Question:
    """What is asked of the table, the same for every part of the verdict."""

    objective: str
    minimize: bool
    budget: int | None
    within: float
    seeds: int
    first_seed: int
    """On which the search ran."""


def judge(
    config: StudyConfig, records: Sequence[TrialRecord], environment: Mapping[str, Any]
) -> Verdict:
    """The verdict on a study, finished or not, from its records alone.

    Raises InputError if trials finished and none has the study's objective.
    """
    asked = _Question(
        objective=config.search.objective,
        minimize=config.search.minimize,
        budget=_memory_budget(config, records, environment),
        within=config.search.within,
        seeds=config.search.seeds,
        first_seed=config.training.seed,
    )
    trials = _with_objective(table(records), asked.objective)
    rows = configurations(runs := full_runs(trials, asked.objective))
    noise = seed_noise(trials, asked.objective)
    searched = rows[fits(rows, asked.budget)]
    min_seeds = _most_seeds(searched, "search", asked.seeds)
    if config.search.repeat != "finalists":
        min_seeds = min(min_seeds, _seeds_of_all(searched))
    candidates = _candidates(rows, asked, min_seeds, noise)
    by_number = {record.number: record for record in records}
    standings = _standings(rows, by_number, asked, candidates, noise)
    default = next((record for record in records if record.role == "default"), None)
    stands_for = {name: standing.record for name, standing in standings.items()}
    return Verdict(
        objective=asked.objective,
        minimize=asked.minimize,
        memory_budget_bytes=asked.budget,
        within=asked.within,
        num_trials=len(records),
        num_complete=len(runs),
        num_pruned=sum(record.outcome == "pruned" for record in records),
        candidate_seeds=min_seeds,
        baseline=_baseline(environment, asked.objective),
        noise=noise,
        default=stands_for.get("default", default),
        default_tuned=stands_for.get("default_tuned"),
        best=stands_for.get("best"),
        recommended=stands_for.get("recommended"),
        standings=standings,
        ties=_ties(candidates, standings.get("best"), by_number, asked.objective, noise),
        tie_half_width=candidates.half_width,
        gain=_headline(standings, rows, runs, asked, noise),
        too_large=_too_large(trials, asked.budget),
        ended=_ended(environment),
    )


def _headline(
    standings: Mapping[str, Standing],
    rows: pd.DataFrame,
    runs: pd.DataFrame,
    asked: _Question,
    noise: Noise | None,
) -> Gain | None:
    """The gain of recommended over default_tuned, on seeds that chose neither where both have some.

    Both were picked as the best of many by their result on the search's own seed, which is
    therefore better than they are.
    """
    new, old = standings.get("recommended"), standings.get("default_tuned")
    if new is None or old is None or new.record.number == old.record.number:
        return None
    fresh_new, fresh_old = (_on_fresh_seeds(s, rows, runs, asked) for s in (new, old))
    if fresh_new is None or fresh_old is None:
        return gain_over(new, old, noise, minimize=asked.minimize)
    gain = gain_over(fresh_new, fresh_old, noise, minimize=asked.minimize)
    return replace(gain, num_fresh_seeds=min(fresh_new.num_seeds, fresh_old.num_seeds))


def _on_fresh_seeds(
    standing: Standing, rows: pd.DataFrame, runs: pd.DataFrame, asked: _Question
) -> Standing | None:
    """The same configuration by all seeds but the search's, None where it has no other."""
    own = rows.loc[rows["number"] == standing.record.number, "numbers"].iloc[0]
    is_member = runs["number"].isin([int(number) for number in str(own).split(",")])
    repeats = runs[is_member & (runs["seed"] != asked.first_seed)]
    if repeats.empty:
        return None
    mean = float(repeats.groupby("seed")[asked.objective].mean().mean())
    return replace(standing, objective=mean, num_seeds=int(repeats["seed"].nunique()))


def _standings(
    rows: pd.DataFrame,
    by_number: Mapping[int, TrialRecord],
    asked: _Question,
    candidates: _Candidates,
    noise: Noise | None,
) -> dict[str, Standing]:
    """The four configurations the verdict is about, as far as they finished."""
    chosen = {
        "default": _default(rows),
        "default_tuned": _default_tuned(rows, asked),
        "best": _take(candidates.rows, asked, "best", noise),
        "recommended": _take(candidates.rows, asked, "cheapest", noise),
    }
    return {
        name: standing_of(row, asked.objective, by_number, noise)
        for name, row in chosen.items()
        if row is not None
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidates:
    """What may be best or recommended: fits the budget, and ran on enough seeds."""

    rows: pd.DataFrame
    half_width: float | None
    """Two of them that are no further apart are not told apart."""


def _candidates(
    rows: pd.DataFrame, asked: _Question, min_seeds: int, noise: Noise | None
) -> _Candidates:
    """Every finalist is compared with the best, so their intervals hold all together (Bonferroni).

    Single runs are too many for that and their noise is measured elsewhere: each pair by itself.
    """
    kept = rows[(rows["num_seeds"] >= min_seeds) & fits(rows, asked.budget)]
    if noise is None:
        return _Candidates(rows=kept, half_width=None)
    comparisons = max(1, len(kept) - 1) if min_seeds > 1 else 1
    return _Candidates(rows=kept, half_width=noise.half_width(min_seeds, min_seeds, comparisons))


def _ties(
    candidates: _Candidates,
    best: Standing | None,
    by_number: Mapping[int, TrialRecord],
    objective: str,
    noise: Noise | None,
) -> tuple[Standing, ...]:
    """The best and all candidates that are not told apart from it, what needs least memory first;
    nothing where the best stands alone, or the noise is not known."""
    if best is None or candidates.half_width is None:
        return ()
    values = candidates.rows[objective].astype(float)
    slack = 1e-12 * abs(best.objective)  # as in the choice, for a row on the limit
    near = candidates.rows[(values - best.objective).abs() <= candidates.half_width + slack]
    found = [standing_of(row, objective, by_number, noise) for _, row in near.iterrows()]
    found.sort(key=lambda s: (s.need_bytes or 0, s.record.rank, s.record.number))
    return tuple(found) if len(found) > 1 else ()


def _take(
    candidates: pd.DataFrame, asked: _Question, prefer: Preference, noise: Noise | None
) -> pd.Series[Any] | None:
    """The configuration to take, or None where none finished within the budget."""
    if candidates.empty:
        return None
    return choose(
        candidates,
        asked.budget,
        asked.within,
        prefer,
        objective=asked.objective,
        minimize=asked.minimize,
        noise=noise,
    )


def _default(rows: pd.DataFrame) -> pd.Series[Any] | None:
    ours = rows[_has_role(rows, "default")]
    return None if ours.empty else ours.iloc[0]


def _default_tuned(rows: pd.DataFrame, asked: _Question) -> pd.Series[Any] | None:
    """The default adapter at its best learning rate; the default rate is one of those tried."""
    ours = rows[_has_role(rows, "default") | _has_role(rows, "default_tuned")]
    if ours.empty:
        return None
    min_seeds = _most_seeds(ours, "default_tuned", asked.seeds)
    ours = ours[ours["num_seeds"] >= min_seeds]
    return ours.sort_values(asked.objective, ascending=asked.minimize, kind="stable").iloc[0]


def _most_seeds(rows: pd.DataFrame, role: str, seeds: int) -> int:
    """The most seeds that a configuration with a trial of this role ran on, at most ``seeds``.

    One while none was repeated: then everything that finished is a candidate.
    """
    repeats = rows.loc[_has_role(rows, role), "num_seeds"]
    return min(seeds, max([1, *map(int, repeats)]))


def _seeds_of_all(rows: pd.DataFrame) -> int:
    """Seeds on which every method and rank has a configuration, where all are to be repeated.

    Those that an interrupted study has repeated so far are no better for that.
    """
    kinds = ["method", "rank", "scaling_exponent", "init_scale"]
    found = rows.groupby(kinds, dropna=False)["num_seeds"].max()
    return max(1, int(found.min())) if len(found) else 1


def _has_role(rows: pd.DataFrame, role: str) -> pd.Series[bool]:
    return rows["roles"].map(lambda roles: role in str(roles).split(",")).astype(bool)


def _too_large(trials: pd.DataFrame, budget: int | None) -> tuple[TooLarge, ...]:
    """Ranks of which every trial was refused, ran out of memory, or needs more than the budget.

    A trial with no known peak that ran says nothing against its rank.
    """
    refused = trials["outcome"].isin(["infeasible", "oom"])
    needs = needed_bytes(trials)
    over = (needs > budget).fillna(False) if budget is not None else ~trials["feasible"]
    found = []
    for rank, group in trials.assign(_no=refused | over, _need=cost_bytes(trials)).groupby("rank"):
        if group["_no"].all():
            least = group["_need"].min()
            ran_out = bool((group["outcome"] == "oom").any())
            need = None if pd.isna(least) else int(least)
            found.append(
                TooLarge(
                    rank=int(str(rank)),
                    need_bytes=need,
                    ran_out=ran_out,
                    is_allocated=bool(group["method"].isin(ADALORA_METHODS).all()),
                )
            )
    return tuple(found)


def _with_objective(trials: pd.DataFrame, objective: str) -> pd.DataFrame:
    """The table with a column of the objective, empty while no trial has finished."""
    if objective in trials.columns:
        return trials
    if (trials["outcome"] == "complete").any():
        there = ["eval_loss", "perplexity", *metric_columns(trials)]
        raise InputError(
            f"no record has the study's objective {objective!r}; they have {', '.join(there)}."
            + nearest(objective, there)
        )
    return trials.assign(**{objective: pd.array([None] * len(trials), dtype="Float64")})


def _memory_budget(
    config: StudyConfig, records: Sequence[TrialRecord], environment: Mapping[str, Any]
) -> int | None:
    """The budget in bytes: as configured, else what 'auto' came to when the study ran."""
    if config.memory_budget != "auto":
        return config.memory_budget
    stated = environment.get("memory_budget_bytes")
    if isinstance(stated, int):
        return stated
    ran_under = [r.memory_budget_bytes for r in records if r.memory_budget_bytes is not None]
    return ran_under[-1] if ran_under else None


def _baseline(environment: Mapping[str, Any], objective: str) -> float | None:
    baseline = environment.get("baseline")
    if not isinstance(baseline, dict):
        return None
    metrics = baseline.get("metrics")
    value = baseline.get(objective, metrics.get(objective) if isinstance(metrics, dict) else None)
    return float(value) if isinstance(value, (int, float)) else None


def _ended(environment: Mapping[str, Any]) -> str | None:
    text = environment.get("ended")
    return text.strip() or None if isinstance(text, str) else None
