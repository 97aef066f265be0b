"""Records as a table: trials.jsonl read strictly, one row a trial, columns with fixed types."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import TypeAdapter, ValidationError

from rsauto import study_file
from rsauto.config import StudyConfig
from rsauto.enclosed import require_enclosed
from rsauto.errors import InputError
from rsauto.records import ADALORA_METHODS, TrialRecord
from rsauto.report.plausible import implausible

COLUMNS: Mapping[str, str] = {
    "number": "Int64",
    "outcome": "string",
    "role": "string",
    "method": "string",
    "engine": "string",
    "rank": "Int64",
    "init_rank": "Int64",
    "target_rank": "Int64",
    "r_max": "Int64",
    "rank_pattern": "string",
    "alpha": "Int64",
    "scaling_rule": "string",
    "scaling_exponent": "Float64",
    "init_scale": "Float64",
    "gamma_r": "Float64",
    "target_modules": "string",
    "learning_rate": "Float64",
    "lr_ratio": "Float64",
    "lambda_lr_ratio": "Float64",
    "head_learning_rate": "Float64",
    "adapter_dtype": "string",
    "quant_bits": "Int64",
    "optimizer": "string",
    "schedule": "string",
    "warmup_share": "Float64",
    "weight_decay": "Float64",
    "max_grad_norm": "Float64",
    "batch_size": "Int64",
    "micro_batch_size": "Int64",
    "product_order": "string",
    "max_length": "Int64",
    "seed": "Int64",
    "steps": "Int64",
    "num_evals": "Int64",
    "tokens": "Int64",
    "fidelity": "Float64",
    "eval_loss": "Float64",
    "perplexity": "Float64",
    "num_trainable_params": "Int64",
    "adapter_bytes": "Int64",
    "flops": "Float64",
    "smallest_budget_bytes": "Int64",
    "predicted_peak_bytes": "Int64",
    "predicted_reserved_bytes": "Int64",
    "measured_peak_bytes": "Int64",
    "memory_budget_bytes": "Int64",
    "pack_id": "string",
    "pack_size": "Int64",
    "pack_peak_bytes": "Int64",
    "train_seconds": "Float64",
    "tokens_per_second": "Float64",
    "retry_of": "Int64",
    "worker": "string",
    "started_at": "string",
    "error": "string",
}
"""Fields of a record that become columns. Lists of modules are joined by commas, rank_pattern is
JSON. Curve, log and activation_moments are left out; metrics become columns of their own name."""

ALLOCATION_COLUMNS: Mapping[str, str] = {
    "allocation_tinit": "Int64",
    "allocation_tfinal": "Int64",
    "allocation_delta_t": "Int64",
    "allocation_beta1": "Float64",
    "allocation_beta2": "Float64",
    "allocation_orth_reg_weight": "Float64",
    "allocation_orth_reg_form": "string",
    "allocation_score": "string",
    "allocation_recovery": "string",
    "allocation_scale_rank": "string",
    "allocation_init_std": "Float64",
}
"""Columns made of a record's allocation: how AdaLoRA placed its rank, NA for other methods."""

LEFT_OUT = frozenset({"allocation", "metrics", "curve", "log", "activation_moments"})

PEFT_NAMES: Mapping[str, str] = {
    "accelerator_memory_max": "measured_peak_bytes",
    "train_time": "train_seconds",
    "file_size": "adapter_bytes",
    "train_total_tokens": "tokens",
    "created_at": "started_at",
}
"""Names of PEFT's method_comparison for columns of ours, added so that both can be read alike.

num_trainable_params has the same name there, and train_loss is the last point of the curve. One
difference: PEFT's memory is what the allocator reserved less a baseline, ours what was allocated.
"""

_OURS = frozenset({*COLUMNS, *ALLOCATION_COLUMNS, *PEFT_NAMES, "train_loss", "feasible", "refit"})
_NEEDS = ("predicted_peak_bytes", "predicted_reserved_bytes", "measured_peak_bytes")
_RECORD = TypeAdapter(TrialRecord)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study folder as read: nothing of it is computed but the table."""

    folder: Path
    config: StudyConfig
    environment: dict[str, Any]
    records: tuple[TrialRecord, ...]
    trials: pd.DataFrame


def load_study(folder: Path) -> Study:
    """Read study.yaml, environment.json (may be absent) and trials.jsonl.

    Raises InputError that names the file, and the line or setting, that cannot be read.
    """
    folder = Path(folder)
    require_enclosed(folder)
    records = tuple(read_records(folder))
    return Study(
        folder=folder,
        config=study_file.load(folder / "study.yaml"),
        environment=read_environment(folder / "environment.json"),
        records=records,
        trials=table(records),
    )


def read_records(folder: Path) -> list[TrialRecord]:
    """The records of trials.jsonl in the order of the file.

    Raises InputError for a missing file and for every line that is no record; a last line that was
    cut off is an error too, since a report that leaves a trial out in silence would be wrong.
    """
    path = Path(folder) / "trials.jsonl"
    lines = _read_text(path).split("\n")
    cut_off = len(lines) if lines[-1].strip() else None
    records: list[TrialRecord] = []
    line_of: dict[int, int] = {}
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = _record(line)
        except ValueError as error:
            problems.append(_line_problem(path, number, error, is_cut_off=number == cut_off))
            continue
        if record.number in line_of:
            first = line_of[record.number]
            problems.append(f"{path} has trial {record.number} twice: lines {first} and {number}")
        line_of[record.number] = number
        records.append(record)
    if problems:
        raise InputError(problems)
    return records


def table(records: Sequence[TrialRecord]) -> pd.DataFrame:
    """One row a trial, every scalar field and metric a column; the same columns for no rows at all.

    Beside the fields: ALLOCATION_COLUMNS, train_loss (last point of the curve), one column a metric
    (``metric_NAME`` where a field has that name), feasible (see ``feasible``), refit (see
    ``is_refit``), and PEFT_NAMES.
    """
    columns: dict[str, Any] = {
        name: _column([_cell(getattr(record, name)) for record in records], dtype)
        for name, dtype in COLUMNS.items()
    }
    for name, dtype in ALLOCATION_COLUMNS.items():
        field = name.removeprefix("allocation_")
        columns[name] = _column([getattr(r.allocation, field, None) for r in records], dtype)
    last_losses = [record.curve[-1].train_loss if record.curve else None for record in records]
    columns["train_loss"] = _column(last_losses, "Float64")
    for metric in sorted({name for record in records for name in record.metrics}):
        name = f"metric_{metric}" if metric in _OURS else metric
        columns[name] = _column([record.metrics.get(metric) for record in records], "Float64")
    frame = pd.DataFrame(columns)
    frame["feasible"] = feasible(frame)
    frame["refit"] = pd.Series([is_refit(record) for record in records], dtype=bool)
    for name, source in PEFT_NAMES.items():
        frame[name] = frame[source]
    return frame


def metric_columns(trials: pd.DataFrame) -> list[str]:
    """Columns of a table that came from metrics."""
    return [str(name) for name in trials.columns if name not in _OURS]


def is_refit(record: TrialRecord) -> bool:
    """Whether it was trained with ranks that AdaLoRA found, on whatever seed and in whatever role.

    AdaLoRA's own pattern is what its trial came to; another method's is what it was given.
    """
    return record.rank_pattern is not None and record.method not in ADALORA_METHODS


def needed_bytes(trials: pd.DataFrame) -> pd.Series[Any]:
    """Memory a trial needs on its device: the largest of predicted peak, predicted reserved and
    measured peak, of those that are known; NA where none is."""
    known = [trials[name].astype("Int64") for name in _NEEDS if name in trials.columns]
    if not known:
        return pd.Series(pd.NA, index=trials.index, dtype="Int64")
    return pd.concat(known, axis=1).max(axis=1).astype("Int64")


def cost_bytes(trials: pd.DataFrame) -> pd.Series[Any]:
    """What a configuration costs in memory, so that ranks can be compared: the smallest budget it
    can be trained in, or where that is not known the largest of its peaks."""
    if "smallest_budget_bytes" not in trials.columns:
        return needed_bytes(trials)
    return trials["smallest_budget_bytes"].astype("Int64").fillna(needed_bytes(trials))


def feasible(trials: pd.DataFrame) -> pd.Series[bool]:
    """Whether a trial fits its own memory budget: neither refused nor out of memory, and every
    known peak within the budget. Says nothing about the loss: a diverged trial may be feasible."""
    fits = ~trials["outcome"].isin(["infeasible", "oom"])
    over = (needed_bytes(trials) > trials["memory_budget_bytes"]).fillna(False)
    return (fits & ~over).astype(bool)


def _record(line: str) -> TrialRecord:
    """A checked record. Raises ValueError that says what is wrong with the line."""
    data = _parsed(line)
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    return checked_record(data)


def _parsed(text: str) -> Any:
    """Raises ValueError also for what is nested deeper than Python reads."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def checked_record(data: dict[str, Any]) -> TrialRecord:
    """A record of JSON values. Raises ValueError that says which of them is wrong."""
    try:
        _require_shapes(data)
        # A metric that was not finite is written as null; absent says the same.
        data["metrics"] = _without_null(data.get("metrics"))
        for point in data.get("curve") or ():
            point["metrics"] = _without_null(point.get("metrics"))
        record = _RECORD.validate_python(dataclasses.asdict(TrialRecord.from_json(data)))
        problems = "; ".join(implausible(dataclasses.asdict(record)))
    except ValidationError as error:
        places = (
            f"{'.'.join(map(str, e['loc']))} is {_start(e['input'])!r}: {e['msg']}"
            for e in error.errors()
        )
        raise ValueError("; ".join(places)) from None
    except (TypeError, AttributeError) as error:
        raise ValueError(str(error).replace("TrialRecord.__init__()", "it")) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if problems:
        raise ValueError(problems)
    return record


def _start(value: Any) -> str:
    try:
        return str(value)[:60]
    except ValueError:  # Python refuses to write very long numbers
        return "a number of thousands of digits"


def _require_shapes(data: dict[str, Any]) -> None:
    """Raises ValueError where a part is of another kind than it can be."""
    lists = ("curve", "log", "activation_moments")
    for name, kind in (("metrics", dict), ("allocation", dict), *((name, list) for name in lists)):
        if not isinstance(data.get(name), (kind, type(None))):
            raise ValueError(f"{name} is {_start(data[name])!r}, of another kind than it was")
    for name in lists:
        if any(not isinstance(point, dict) for point in data.get(name) or ()):
            raise ValueError(f"{name} has a point that is no JSON object")


def _without_null(metrics: Any) -> dict[str, Any]:
    return {name: value for name, value in (metrics or {}).items() if value is not None}


def _line_problem(path: Path, number: int, error: ValueError, *, is_cut_off: bool) -> str:
    if is_cut_off and isinstance(error, json.JSONDecodeError):
        return (
            f"{path} line {number} is cut off: its writer was interrupted. Continue the study with "
            "the same command, which writes the file anew, or delete that line"
        )
    return (
        f"{path} line {number} is not a trial record: {error}. The command that continues the "
        "study writes the file anew from the study's storage"
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"{path} is not there: give the folder of a study, such as runs/<study name>"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def read_environment(path: Path) -> dict[str, Any]:
    """Every key is optional, so a study without the file only has less to show.

    Raises InputError that names the file and what is wrong with it.
    """
    if not path.exists():
        return {}
    text = _read_text(path)
    try:
        data = _parsed(text)
        problems = ["must hold a JSON object"] if not isinstance(data, dict) else []
        problems = problems or [*implausible(data), *_no_objects(data)]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if problems:
        raise InputError(f"{path} {'; '.join(problems)}")
    found: dict[str, Any] = data
    return found


def _no_objects(data: dict[str, Any]) -> list[str]:
    parts = {name: data.get(name) for name in ("baseline", "fingerprints", "packages")}
    if isinstance(parts["baseline"], dict):
        parts["baseline.metrics"] = parts["baseline"].get("metrics")
    wrong = [name for name, part in parts.items() if not isinstance(part, (dict, type(None)))]
    return [f"must have an object as {name}" for name in wrong]


def _cell(value: Any) -> Any:
    if isinstance(value, tuple):
        return ",".join(value)
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value


def _column(values: Sequence[Any], dtype: str) -> Any:
    """Values as a pandas array; a number that is not finite counts as absent."""
    plain = [None if isinstance(v, float) and not math.isfinite(v) else v for v in values]
    return pd.array(plain, dtype=dtype)  # type: ignore[call-overload]
