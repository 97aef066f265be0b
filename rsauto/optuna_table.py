"""A study that was made with Optuna alone, as the table that ours have, as far as its data go.

    import optuna, rsauto
    study = optuna.load_study(study_name="lora", storage="sqlite:///lora.db")
    trials = rsauto.trials_of(study, objective="eval_loss")
    rsauto.pareto(trials, x="num_trainable_params")
    rsauto.select_rank(trials, parameters=2_000_000)

A study of rsauto's keeps its records in its trials, so its table comes out whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import pandas as pd
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from rsauto.errors import InputError, nearest
from rsauto.records import Outcome, TrialRecord
from rsauto.report.noise import FOREIGN
from rsauto.report.table import COLUMNS, PEFT_NAMES, feasible, table

NAMES: Mapping[str, str] = {
    **PEFT_NAMES,
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lr": "learning_rate",
    "loraplus_lr_ratio": "lr_ratio",
    "init_r": "init_rank",
    "target_r": "target_rank",
    "lr_scheduler_type": "schedule",
    "optim": "optimizer",
    "max_seq_length": "max_length",
    "num_params": "num_trainable_params",
    "total_flos": "flops",
    "train_runtime": "train_seconds",
}
"""Usual names of parameters and attributes for columns of ours. A name of ours needs none."""

_OUTCOMES: Mapping[TrialState, Outcome] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


def trials_of(
    study: optuna.Study,
    *,
    objective: str | Sequence[str] = "eval_loss",
    columns: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """One row a settled trial, with the columns of ``Study.trials``; what is not known is NA.

    ``objective`` names what the trials' value is (several names for a multi-objective study).
    Parameters and user attributes become the column of the same name, of a usual other name
    (``NAMES``) or of the one that ``columns`` gives; what has none keeps its own name, with
    ``param_`` in front for a parameter. A trial that violates a constraint is not feasible, a
    pruned one has the last value it reported, and the share of the longest trial's steps as its
    fidelity. ``trial_seconds`` is the trial's whole duration. ``attrs["minimize"]`` of the table
    says by objective whether less is better.

    Raises InputError for a wrong number of objectives, or a column that is no column.
    """
    own = _records(study)
    if own:
        return table(own)
    objectives = [objective] if isinstance(objective, str) else list(objective)
    _check(study, objectives, columns or {})
    names = {**NAMES, **(columns or {})}
    settled = [t for t in study.get_trials(deepcopy=False) if t.state in _OUTCOMES]
    longest = max((t.last_step or 0 for t in settled), default=0)
    rows = [_row(trial, objectives, names, longest) for trial in settled]
    frame = _typed(rows)
    is_minimised = [way == StudyDirection.MINIMIZE for way in study.directions]
    frame.attrs["minimize"] = dict(zip(objectives, is_minimised, strict=True))
    return frame


def _records(study: optuna.Study) -> list[TrialRecord]:
    """What a study of ours has written into its trials; nothing for another one."""
    trials = study.get_trials(deepcopy=False)
    stored = [trial.user_attrs.get("record") for trial in trials]
    return [
        TrialRecord.from_json(record)
        for record, trial in zip(stored, trials, strict=True)
        if isinstance(record, dict) and "spec" in trial.user_attrs
    ]


def _check(study: optuna.Study, objectives: Sequence[str], columns: Mapping[str, str]) -> None:
    if len(objectives) != len(study.directions):
        raise InputError(
            f"objective: the study {study.study_name!r} has {len(study.directions)} values a "
            f"trial, and {len(objectives)} of them {'is' if len(objectives) == 1 else 'are'} named "
            f"({', '.join(objectives)}). Give as many names."
        )
    for source, name in columns.items():
        if name not in COLUMNS:
            raise InputError(
                f"columns: {source!r} cannot become {name!r}, which is no column of the table."
                + nearest(name, COLUMNS)
            )


def _row(
    trial: FrozenTrial, objectives: Sequence[str], names: Mapping[str, str], longest: int
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in trial.user_attrs.items():
        row[names.get(name, name)] = value
    for name, value in trial.params.items():
        ours = names.get(name, name)
        row[ours if ours in COLUMNS else f"{FOREIGN}{name}"] = value
    row |= {"number": trial.number, "outcome": _OUTCOMES[trial.state]}  # whatever it noted itself
    row |= dict(zip(objectives, _values(trial, len(objectives)), strict=True))
    if trial.last_step is not None:
        row.setdefault("steps", trial.last_step)
        row.setdefault("fidelity", 1.0 if trial.state == TrialState.COMPLETE else None)
        if trial.state == TrialState.PRUNED and longest:
            row["fidelity"] = trial.last_step / longest
    if trial.datetime_start is not None:
        row.setdefault("started_at", trial.datetime_start.isoformat(timespec="seconds"))
    if trial.duration is not None:
        row["trial_seconds"] = trial.duration.total_seconds()
    constraints = _constraints(trial)
    row["is_violated"] = any(value > 0 for value in constraints)
    return row


def _values(trial: FrozenTrial, count: int) -> list[float | None]:
    if trial.state == TrialState.COMPLETE:
        return list(trial.values)
    if trial.last_step is not None and count == 1:
        return [trial.intermediate_values[trial.last_step]]
    return [None] * count


def _constraints(trial: FrozenTrial) -> list[float]:
    """Values above zero are violations, whether set by name or by a sampler's function."""
    named = getattr(trial, "constraints", None)
    found = list(named.values()) if isinstance(named, Mapping) else []
    return found + list(trial.system_attrs.get("constraints") or ())


def _typed(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows with the columns of our own table, and those they have beside."""
    frame = table([])
    for name in frame.columns:
        if name in COLUMNS:
            frame[name] = _column([row.get(name) for row in rows], COLUMNS[name], name)
    for name, source in PEFT_NAMES.items():
        frame[name] = frame[source]
    for name in dict.fromkeys(name for row in rows for name in row if name not in frame.columns):
        values = [row.get(name) for row in rows]
        if name != "is_violated" and not any(isinstance(v, (dict, list)) for v in values):
            frame[name] = pd.Series(values).convert_dtypes()
    violated = pd.Series([bool(row["is_violated"]) for row in rows], dtype=bool)
    frame["feasible"] = feasible(frame) & ~violated
    frame["refit"] = pd.Series([False] * len(rows), dtype=bool)
    return frame


def _column(values: Sequence[Any], dtype: str, name: str) -> Any:
    """Raises InputError for a value that the column cannot hold."""
    if dtype == "string":
        values = [None if value is None else str(value) for value in values]
    try:
        return pd.array(values, dtype=dtype)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        wrong = next(v for v in values if v is not None and not _fits(v, dtype))
        raise InputError(
            f"{name}: a trial has {wrong!r}, and the column holds "
            f"{'whole numbers' if dtype == 'Int64' else 'numbers'}. Give what it is another name "
            "with columns={...}."
        ) from None


def _fits(value: Any, dtype: str) -> bool:
    try:
        pd.array([value], dtype=dtype)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        return False
    return True
