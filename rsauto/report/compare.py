"""Several studies side by side: what each recommends, what it costs, how their fronts lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from rsauto import atomic
from rsauto.errors import InputError
from rsauto.records import TrialRecord
from rsauto.report.cells import Grid, in_words
from rsauto.report.drawing import drawing
from rsauto.report.kinds import kind_of
from rsauto.report.markdown import inline, pipe_table
from rsauto.report.page import csv_bytes
from rsauto.report.panel import RANK_COLOURS, Layer, Panel
from rsauto.report.pareto import pareto
from rsauto.report.standing import Standing
from rsauto.report.table import Study, cost_bytes, load_study
from rsauto.report.verdict import Verdict, judge
from rsauto.units import ABSENT, byte_unit, difference_text, mean_text, objective_text

COLUMNS = {
    "study": "string",
    "folder": "string",
    "model": "string",
    "data": "string",
    "same_data_as": "string",
    "memory_budget_bytes": "Int64",
    "method": "string",
    "kind": "string",
    "rank": "Int64",
    "alpha": "Int64",
    "learning_rate": "Float64",
    "objective": "Float64",
    "half_width": "Float64",
    "num_seeds": "Int64",
    "smallest_budget_bytes": "Int64",
    "measured_peak_bytes": "Int64",
    "num_trainable_params": "Int64",
    "train_seconds": "Float64",
    "flops": "Float64",
    "default_tuned": "Float64",
    "gain": "Float64",
    "gain_half_width": "Float64",
    "best_rank": "Int64",
    "best": "Float64",
    "num_trials": "Int64",
    "tokens": "Int64",
}
"""Columns of ``compare``, one row a study: settings and costs of what it recommends (objective is
the mean over num_seeds seeds), the tuned default's objective and the gain over it, the best one's
rank and objective, and the trials and tokens that were spent. same_data_as is the first study with
the same rows, lengths and model vocabulary, with its folder where names are the same; only such
objectives may be compared."""

_SHOWN = (
    "study", "folder", "model", "data", "memory_budget_bytes", "kind", "rank", "alpha",
    "learning_rate", "value", "smallest_budget_bytes", "train_seconds", "flops", "gained",
    "best_rank", "num_trials", "tokens",
)  # fmt: skip

_TITLES = {
    "kind": "method",
    "gained": "gain over the tuned default",
    "train_seconds": "train time",
    "flops": "FLOPs",
    "best_rank": "rank of the best",
    "num_trials": "trials",
    "tokens": "tokens trained on",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Studies with one objective."""

    objective: str
    rows: pd.DataFrame
    """See ``COLUMNS``."""
    notes: tuple[str, ...]
    """What must be known to read the rows."""
    front: Panel | None
    """Objective against memory, a line a study; None where their data differ."""

    @property
    def values(self) -> list[dict[str, Any]]:
        """The rows as JSON values, every digit of them; what is not known is None."""
        return [
            {str(name): None if pd.isna(value) else value for name, value in row.items()}
            for row in self.rows.astype(object).to_dict(orient="records")
        ]

    @property
    def grid(self) -> Grid:
        """In words, a column for each study."""
        shown = self.rows.assign(value=_values(self.rows), gained=_gains(self.rows))
        titles = {**_TITLES, "value": objective_text(self.objective)}
        lines = in_words(shown, _SHOWN, titles)
        across = list(zip(lines.headers, *lines.rows, strict=True))
        return Grid(
            headers=("", *across[0][1:]),
            rows=tuple(across[1:]),
            is_number=(False, *[True] * len(lines.rows)),
        )


def compare(folders: Sequence[Path | str]) -> pd.DataFrame:
    """What each study recommends and what that costs, one row a study (see ``COLUMNS``).

    Raises InputError for a folder that is no study, and for studies of different objectives.
    """
    return comparison(folders).rows


def comparison(folders: Sequence[Path | str]) -> Comparison:
    """Reads the studies. Raises InputError as ``compare`` does."""
    if len(folders) < 2:
        raise InputError("DIR: compare takes two study folders or more.")
    studies = [load_study(Path(folder)) for folder in folders]
    objectives = {study.config.search.objective: study.folder for study in studies}
    if len(objectives) > 1:
        told = ", ".join(f"{name} ({folder})" for name, folder in objectives.items())
        raise InputError(
            f"DIR: the studies have different objectives, which cannot be compared: {told}. "
            "Compare those of one objective."
        )
    judged = [(s, judge(s.config, s.records, s.environment)) for s in studies]
    labels = _labels(studies)
    first = _first_with_same_data(studies)
    rows = [
        _row(study, verdict, labels[same])
        for (study, verdict), same in zip(judged, first, strict=True)
    ]
    frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)
    is_alike = set(first) == {0}
    return Comparison(
        objective=next(iter(objectives)),
        rows=frame,
        notes=_notes(judged, labels, is_alike),
        front=_front(judged, labels) if is_alike else None,
    )


def write_comparison(found: Comparison, folder: Path) -> list[Path]:
    """Writes compare.md, compare.csv and, where there is one, compare.svg into ``folder``.

    Raises InputError where it cannot be written.
    """
    text = [
        "# Studies side by side",
        pipe_table(found.grid.headers, found.grid.rows, found.grid.is_number),
        *(inline(note) for note in found.notes),
    ]
    files = {"compare.csv": csv_bytes(found.rows)}
    if found.front is not None:
        files["compare.svg"] = drawing(found.front)
        text += [f"![{inline(found.front.alt)}](compare.svg)", inline(found.front.caption)]
    files["compare.md"] = ("\n\n".join(text) + "\n").encode("utf-8")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            atomic.write_bytes(folder / name, data)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written: {error}.") from None
    return [folder / name for name in files]


def _row(study: Study, verdict: Verdict, same: str) -> dict[str, Any]:
    record, chosen = verdict.recommended, verdict.standings.get("recommended")
    gain, best = verdict.gain, verdict.standings.get("best")
    row: dict[str, Any] = {
        "study": study.config.name,
        "folder": str(study.folder),
        "model": study.config.model.name,
        "data": study.config.data.name,
        "same_data_as": same,
        "memory_budget_bytes": verdict.memory_budget_bytes,
        "default_tuned": _objective(verdict.standings.get("default_tuned")),
        "gain": gain.difference if gain is not None else None,
        "gain_half_width": gain.half_width if gain is not None else None,
        "best_rank": best.record.rank if best is not None else None,
        "best": _objective(best),
        "num_trials": verdict.num_trials,
        "tokens": sum(found.tokens or 0 for found in study.records),
    }
    if record is None or chosen is None:
        return row
    return (
        row
        | _costs(record)
        | {
            "objective": chosen.objective,
            "half_width": chosen.half_width,
            "num_seeds": chosen.num_seeds,
            "smallest_budget_bytes": chosen.need_bytes,
        }
    )


def _costs(record: TrialRecord) -> dict[str, Any]:
    names = (
        "method", "rank", "alpha", "learning_rate", "measured_peak_bytes", "num_trainable_params",
        "train_seconds", "flops",
    )  # fmt: skip
    return {"kind": kind_of(record), **{name: getattr(record, name) for name in names}}


def _objective(standing: Standing | None) -> float | None:
    return None if standing is None else standing.objective


def _labels(studies: Sequence[Study]) -> list[str]:
    """The studies' names, with the folder where two have the same."""
    names = [study.config.name for study in studies]
    return [
        name if names.count(name) == 1 else f"{name} ({study.folder})"
        for name, study in zip(names, studies, strict=True)
    ]


def _first_with_same_data(studies: Sequence[Study]) -> list[int]:
    """For each study the place of the first whose data have the same fingerprint; its own where
    unknown."""
    first: dict[str | int, int] = {}
    return [first.setdefault(_data_of(study) or n, n) for n, study in enumerate(studies)]


def _data_of(study: Study) -> str | None:
    """Fingerprint of the tokenised rows: the same rows in another vocabulary have another."""
    prints = study.environment.get("fingerprints")
    found = prints.get("data") if isinstance(prints, dict) else None
    return found if isinstance(found, str) else None


def _notes(
    judged: Sequence[tuple[Study, Verdict]], labels: Sequence[str], is_alike: bool
) -> tuple[str, ...]:
    notes = []
    if not is_alike:
        notes.append(
            "The studies were not trained and validated on the same tokens (other rows, another "
            "length or another vocabulary): compare their gains, not their values."
        )
    unknown = [
        label for label, (_, verdict) in zip(labels, judged, strict=True) if verdict.noise is None
    ]
    if unknown:
        notes.append(
            f"Nothing is known about the noise of {', '.join(unknown)}: no configuration ran on "
            "two seeds."
        )
    devices = {str(study.environment.get("device")) for study, _ in judged}
    if len(devices) > 1:
        notes.append(f"Times are of different devices: {', '.join(sorted(devices))}.")
    return tuple(notes)


def _front(judged: Sequence[tuple[Study, Verdict]], labels: Sequence[str]) -> Panel | None:
    """The Pareto front of every study in one figure."""
    objective, minimize = judged[0][1].objective, judged[0][1].minimize
    needs = pd.concat([cost_bytes(study.trials) for study, _ in judged]).dropna()
    divisor, unit = byte_unit(float(needs.max()) if len(needs) else 1.0)
    layers = []
    for index, (study, verdict) in enumerate(judged):
        if verdict.best is None:
            continue
        trials = study.trials.assign(memory_bytes=cost_bytes(study.trials))
        front = pareto(trials, "memory_bytes", objective, minimize)
        layers.append(
            Layer(
                name=labels[index],
                x=tuple(float(cost) / divisor for cost in front["memory_bytes"]),
                y=tuple(float(value) for value in front[objective]),
                colour=RANK_COLOURS[index % len(RANK_COLOURS)],
                symbol="circle",
                dash="solid",
                is_step=True,
                hover=tuple(f"rank {rank}" for rank in front["rank"]),
            )
        )
    if len(layers) < 2:
        return None
    name = objective_text(objective)
    return Panel(
        key="compare",
        title=f"What memory buys in each study: {name} against memory",
        caption="Of each study the trials that no other of it beats in both, at the smallest "
        "budget they can be trained in. These are single trials, and lines no further apart than "
        "two seeds are not different.",
        x_label=f"smallest memory budget ({unit})",
        y_label=name,
        layers=tuple(layers),
        x_is_log=True,
    )


def _values(rows: pd.DataFrame) -> list[str]:
    return [
        ABSENT
        if pd.isna(value)
        else mean_text(float(value), None if pd.isna(half) else float(half))
        for value, half in zip(rows["objective"], rows["half_width"], strict=True)
    ]


def _gains(rows: pd.DataFrame) -> list[str]:
    return [
        ABSENT if pd.isna(gain) else difference_text(gain, None if pd.isna(half) else float(half))
        for gain, half in zip(rows["gain"], rows["gain_half_width"], strict=True)
    ]
