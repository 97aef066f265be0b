"""Which trial of a study a command is about."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from rsauto.errors import InputError
from rsauto.records import TrialRecord
from rsauto.report.noise import configurations, full_runs
from rsauto.report.pareto import choose
from rsauto.report.table import Study
from rsauto.report.verdict import judge


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What was asked for, one of these at most; nothing is the recommendation."""

    trial: int | None = None
    """By number, however it ended."""
    rank: int | None = None
    """The best configuration of that rank that fits the budget, by its mean over seeds."""
    best: bool = False
    recommended: bool = False

    def __post_init__(self) -> None:
        if len(self.given) > 1:
            raise InputError(
                f"{' and '.join(self.given)} say which trial twice. Give one of --trial N, "
                "--rank R, --best and --recommended, or none for the recommendation."
            )

    @property
    def given(self) -> tuple[str, ...]:
        """The options that were given, as they are typed."""
        values: list[tuple[str, Any]] = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return tuple(
            f"--{name}" for name, value in values if value is not None and value is not False
        )

    @property
    def name(self) -> str:
        """Of a folder for what was chosen, such as rank-64."""
        if self.trial is not None:
            return f"trial-{self.trial}"
        if self.rank is not None:
            return f"rank-{self.rank}"
        return "best" if self.best else "recommended"


def chosen_record(study: Study, choice: Choice) -> TrialRecord:
    """The trial that was asked for.

    Raises InputError where there is none, with those that there are.
    """
    by_number = {record.number: record for record in study.records}
    if choice.trial is not None:
        return _by_number(study, by_number, choice.trial)
    verdict = judge(study.config, study.records, study.environment)
    if choice.rank is not None:
        row = _best_of_rank(study, choice.rank, verdict.memory_budget_bytes)
        return by_number[int(row["number"])]
    found = verdict.best if choice.best else verdict.recommended
    if found is None:
        raise InputError(
            f"{study.folder}: no trial has finished yet, so there is no answer. Continue the "
            "study, or name a trial with --trial."
        )
    return found


def _by_number(study: Study, by_number: dict[int, TrialRecord], number: int) -> TrialRecord:
    if number not in by_number:
        known = f"{min(by_number)} to {max(by_number)}" if by_number else "none yet"
        raise InputError(
            f"--trial {number}: {study.folder} has no such trial; there are {known}. "
            f"The first column of {study.folder / 'tradeoff.csv'} has their numbers."
        )
    return by_number[number]


def _best_of_rank(study: Study, rank: int, budget: int | None) -> Any:
    objective = study.config.search.objective
    rows = configurations(full_runs(study.trials, objective))
    ranks = sorted({int(found) for found in rows["rank"]})
    if rank not in ranks:
        there = ", ".join(map(str, ranks)) or "none"
        raise InputError(
            f"--rank {rank}: no trial of that rank finished at full length; ranks that did: "
            f"{there}. Choose one of them, or continue the study with that rank in its range."
        )
    rows = rows[rows["rank"] == rank]
    minimize = study.config.search.minimize
    return choose(rows, budget, prefer="best", objective=objective, minimize=minimize)
