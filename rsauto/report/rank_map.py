"""Where AdaLoRA put its rank: one cell a module, layers downwards and modules across."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from rsauto.records import ADALORA_METHODS, TrialRecord
from rsauto.report.noise import full_runs
from rsauto.report.panel import HeatMap
from rsauto.report.table import is_refit, table
from rsauto.units import method_text, objective_text, rank_text, value_text

if TYPE_CHECKING:
    from rsauto.report.verdict import Verdict

OUTSIDE = "none"
"""The row of modules that belong to no layer, such as lm_head."""

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module stands: 'model.layers.3.mlp.up_proj' is ('mlp', 'up_proj') in layer 3 of the
    stack ('model', 'layers')."""

    stack: Path
    layer: int | None
    """None for a module outside of every stack; the path is then its whole name."""
    path: Path


def place(module: str) -> Place:
    """Splits a module's name at its first number, which counts the layers; later ones, such as
    those of experts, are part of the path within a layer."""
    parts = tuple(module.split("."))
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return Place((), None, parts)
    return Place(parts[:at], int(parts[at]), parts[at + 1 :])


def short_names(paths: Iterable[Path]) -> dict[Path, str]:
    """The fewest last parts that tell each path from the others, the whole where none do: 'query',
    but 'intermediate.dense' beside 'output.dense'."""
    distinct = dict.fromkeys(paths)
    ends = Counter(path[-n:] for path in distinct for n in range(1, len(path) + 1))
    return {
        path: ".".join(next((path[-n:] for n in range(1, len(path)) if ends[path[-n:]] == 1), path))
        for path in distinct
    }


def rank_map(records: Sequence[TrialRecord], verdict: Verdict) -> HeatMap | None:
    """The ranks of the modules in the AdaLoRA trial that matters most; None where none finished.

    That is the recommended or the best trial, or the one whose ranks it was given if it is a refit;
    failing all of them the AdaLoRA trial with the best objective.
    """
    runs = full_runs(table(records), verdict.objective)
    runs = runs[runs["method"].isin(ADALORA_METHODS) & runs["rank_pattern"].notna()]
    if runs.empty:
        return None
    runs = runs.sort_values(verdict.objective, ascending=verdict.minimize, kind="stable")
    by_number = {record.number: record for record in records}
    shown = _chosen([by_number[int(number)] for number in runs["number"]], verdict)
    value = float(runs.loc[runs["number"] == shown.number, verdict.objective].iloc[0])
    pattern = shown.rank_pattern or {}
    places = {place(module): module for module in pattern}
    rows, columns = _rows(places), short_names(p.path for p in places)
    grid = [[places.get(Place(*row, path)) for path in columns] for row in rows]
    return HeatMap(
        key="rank_map",
        title=f"Where the rank went: {_name(shown)}, trial {shown.number}",
        caption=f"Trial {shown.number}, {objective_text(verdict.objective)} {value_text(value)}. "
        + " ".join(_caption(shown, verdict)),
        alt=f"Where the rank went in trial {shown.number}, {_name(shown)}, on average over the "
        f"layers: {_means(pattern, columns)}.",
        x_label="module",
        y_label="layer",
        value_label="rank",
        columns=tuple(columns.values()),
        rows=tuple(rows.values()),
        values=tuple(tuple(None if m is None else pattern[m] for m in row) for row in grid),
        hover=tuple(
            tuple("" if m is None else f"{m}\nrank {pattern[m]}" for m in row) for row in grid
        ),
    )


def _chosen(found: Sequence[TrialRecord], verdict: Verdict) -> TrialRecord:
    """Of AdaLoRA's trials, best first."""
    for record in (verdict.recommended, verdict.best):
        for other in found:
            if record is not None and (other.number == record.number or _gave(other, record)):
                return other
    return found[0]


def _gave(allocated: TrialRecord, record: TrialRecord) -> bool:
    """Whether a trial is a refit of an AdaLoRA trial's ranks. It has no module of rank 0."""
    found = allocated.rank_pattern or {}
    kept = {module: rank for module, rank in found.items() if rank > 0}
    return is_refit(record) and record.rank_pattern in (found, kept)


def _rows(places: Iterable[Place]) -> dict[tuple[Path, int | None], str]:
    """Names of the rows from the top: layers by number, then what is outside of them."""
    names = short_names(p.stack for p in places if p.layer is not None)
    order = list(names)
    layers = {(p.stack, p.layer) for p in places if p.layer is not None}
    rows: dict[tuple[Path, int | None], str] = {
        (stack, layer): str(layer) if len(names) == 1 else f"{names[stack]} {layer}"
        for stack, layer in sorted(layers, key=lambda row: (order.index(row[0]), row[1]))
    }
    if any(p.layer is None for p in places):
        rows[(), None] = OUTSIDE
    return rows


def _name(record: TrialRecord) -> str:
    return f"{method_text(record.method)} rank {rank_text(record.rank, record.init_rank)}"


def _caption(record: TrialRecord, verdict: Verdict) -> list[str]:
    """What the numbers come to, what they ask of a server, and what the colours say."""
    ranks = list((record.rank_pattern or {}).values())
    modules = "module" if len(ranks) == 1 else "modules"
    said = [
        f"Rank of each module at the end: {sum(ranks)} over {len(ranks)} {modules}, for a target "
        f"of {record.target_rank or record.rank} on average.",
        f"The largest is {max(ranks)}: a server must allow at least rank {max(ranks)}.",
    ]
    if verdict.recommended is not None and _gave(record, verdict.recommended):
        said.append("The recommended refit was trained with these ranks.")
    zeros = ranks.count(0)
    if zeros:
        said.append(f"{zeros} {'module' if zeros == 1 else 'modules'} kept none, in orange.")
    else:
        said.append("Every module kept some.")
    return said


def _means(pattern: Mapping[str, int], columns: Mapping[Path, str]) -> str:
    """'q_proj 8.5, k_proj 15.5', largest first."""
    ranks: dict[str, list[int]] = {}
    for module, rank in pattern.items():
        ranks.setdefault(columns[place(module).path], []).append(rank)
    means = {name: fmean(found) for name, found in ranks.items()}
    best_first = sorted(means, key=lambda name: -means[name])
    return ", ".join(f"{name} {means[name]:.3g}" for name in best_first[:16])
