"""An export from beginning to end: the trial, its weights or settings, the check, the folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rsauto.atomic import write_text
from rsauto.base import load_weights, pick_device
from rsauto.card import Form, Subject, model_card
from rsauto.environment import package_versions
from rsauto.errors import InputError
from rsauto.exports.axolotl import ABILITIES as AXOLOTL
from rsauto.exports.axolotl import write_axolotl
from rsauto.exports.chosen import Chosen, choose
from rsauto.exports.llamafactory import ABILITIES as LLAMAFACTORY
from rsauto.exports.llamafactory import write_llamafactory
from rsauto.exports.merged import merged_logits, require_mergeable, write_merged
from rsauto.exports.parity import (
    Parity,
    adapter_logits,
    compare,
    num_rows,
    trained_logits,
)
from rsauto.exports.place import built, require_free, write_mark
from rsauto.exports.recipe import Abilities, Recipe, recipe_of
from rsauto.exports.request import WEIGHTS, Request, checked_request
from rsauto.exports.settings import Written
from rsauto.exports.snippet import ABILITIES as PEFT
from rsauto.exports.snippet import write_snippet
from rsauto.exports.trl import ABILITIES as TRL
from rsauto.exports.trl import write_trl
from rsauto.exports.weights import (
    Saved,
    require_adalora,
    saved_weights,
    write_lora,
    write_stock_adalora,
)
from rsauto.records import TrialRecord
from rsauto.report.choice import Choice
from rsauto.report.table import checked_record, load_study

_SETTINGS: Mapping[str, tuple[Abilities, Callable[[Recipe, Path], Written]]] = {
    "axolotl": (AXOLOTL, write_axolotl),
    "llamafactory": (LLAMAFACTORY, write_llamafactory),
    "trl": (TRL, write_trl),
    "peft": (PEFT, write_snippet),
}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    out: Path
    to: str
    trial: int
    files: tuple[str, ...]
    weights: Path | None = None
    """Where they were taken from; None for settings and the card."""
    steps: int | None = None
    """That these weights were trained for."""
    parity: Parity | None = None
    """Of weights; None for settings and the card."""
    command: str | None = None
    """That runs the settings, in the folder."""
    notes: tuple[str, ...] = ()
    """In what a trainer differs from the study."""

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "to": self.to,
            "trial": self.trial,
            "files": list(self.files),
            "weights": None if self.weights is None else str(self.weights),
            "steps": self.steps,
            "parity": None if self.parity is None else self.parity.to_json(),
            "command": self.command,
            "notes": list(self.notes),
        }


def export(
    folder: str | Path,
    to: str,
    *,
    trial: int | None = None,
    rank: int | None = None,
    best: bool = False,
    recommended: bool = False,
    out: str | Path | None = None,
    padded: bool = False,
    dtype: str | None = None,
    force: bool = False,
) -> Exported:
    """Writes a trial of a study for others to run, as `rsauto export` does.

    Raises InputError for what cannot be exported exactly, before anything is written, and
    ParityError where what was written does not compute what was trained.
    """
    choice = Choice(trial=trial, rank=rank, best=best, recommended=recommended)
    request = checked_request(
        Path(folder), to, choice, out=None if out is None else Path(out), padded=padded,
        dtype=dtype, force=force,
    )  # fmt: skip
    return run(request)


def run(request: Request) -> Exported:
    """See `export`."""
    require_free(request.place, request.force)
    chosen = choose(load_study(request.folder), request.choice)
    if request.to in WEIGHTS:
        return _weights(request, chosen)
    if request.to == "card":
        card = _card(chosen, "lora", None)
        return _finished(request, chosen, lambda new: write_text(new / "README.md", card))
    abilities, write = _SETTINGS[request.to]
    recipe = recipe_of(chosen, abilities)
    return _finished(request, chosen, lambda new: write(recipe, new))


def _finished(
    request: Request, chosen: Chosen, write: Callable[[Path], Any], saved: Saved | None = None
) -> Exported:
    """Builds the folder; what is written may tell of itself, and of its check."""
    with built(request.place) as new:
        told = write(new)
        settings = told if isinstance(told, Written) else None
        exported = Exported(
            out=request.place,
            to=request.to,
            trial=chosen.record.number,
            files=tuple(sorted(str(p.relative_to(new)) for p in new.rglob("*") if p.is_file())),
            weights=None if saved is None else saved.folder,
            steps=None if saved is None else (saved.record or {}).get("steps", chosen.record.steps),
            parity=told if isinstance(told, Parity) else None,
            command=settings.command if settings else None,
            notes=settings.notes if settings else (),
        )
        mark = {"study": chosen.config.name, **exported.to_json(), "packages": package_versions()}
        places = ("out", "weights")
        write_mark(new, {key: value for key, value in mark.items() if key not in places})
    return exported


def _weights(request: Request, chosen: Chosen) -> Exported:
    if request.to == "adalora":
        require_adalora(chosen)
    if request.to == "merged":
        require_mergeable(chosen)
    saved = saved_weights(chosen)
    device = pick_device()
    base = load_weights(chosen.source, chosen.config.model, device).model
    expected = trained_logits(base, saved, chosen.data, device)
    dtype = None if request.dtype is None else getattr(torch, request.dtype)
    base_dtype = chosen.source.dtype
    if request.to == "merged":
        del base

    def write(new: Path) -> Parity:
        files = dtype or torch.float32
        if request.to == "merged":
            files = write_merged(chosen, saved, new, device, dtype)
            write_text(new / "README.md", _card(chosen, "merged", saved))
            found = merged_logits(chosen, new, device)
        else:
            _write_adapter(request, chosen, saved, new, dtype)
            found = adapter_logits(base, str(new), chosen.data, device)
        rows = num_rows(chosen.data)
        return compare(expected, found, files, base_dtype, rows=rows)

    return _finished(request, chosen, write, saved)


def _write_adapter(
    request: Request, chosen: Chosen, saved: Saved, new: Path, dtype: torch.dtype | None
) -> None:
    if request.to == "adalora":
        write_stock_adalora(saved, new, _card(chosen, "adalora", saved), chosen, dtype)
    else:
        card = _card(chosen, "lora", saved)
        write_lora(saved, new, card, padded=request.padded, dtype=dtype)


def _card(chosen: Chosen, form: Form, saved: Saved | None) -> str:
    again = saved.record if saved is not None else None
    data = chosen.data
    return model_card(
        Subject(
            config=chosen.config,
            base_name=chosen.config.model.name,
            record=chosen.record if again is None else _trained(chosen.record, again),
            form=form,
            label_names=data.label_names,
            pad_token_id=data.pad_token_id,
            fingerprints={"model": chosen.source.fingerprint, "data": data.fingerprint},
            packages=chosen.study.environment.get("packages", {}),
            test_metrics=_test_metrics(again),
        )
    )


def _trained(record: TrialRecord, again: dict[str, Any]) -> TrialRecord:
    """The record of the full-length run. Raises InputError where it is none."""
    try:
        return checked_record({**record.to_json(), **again})
    except ValueError as error:
        raise InputError(
            f"trial {record.number}: the record.json of its training is not what rsauto train "
            f"wrote: {error}. Remove that training's folder, or train it again."
        ) from None


def _test_metrics(again: dict[str, Any] | None) -> dict[str, float]:
    """Numbers of the test split that `rsauto train` wrote."""
    found = (again or {}).get("test")
    values = found.items() if isinstance(found, dict) else ()
    return {k: float(v) for k, v in values if k != "rows" and isinstance(v, (int, float))}
