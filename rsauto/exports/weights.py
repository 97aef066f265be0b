"""Saved weights of a trial, written again as plain LoRA or as PEFT's own AdaLoRA.

What a study and `rsauto train` keep of a trial is plain LoRA of scale 1, Delta W = B A in every
module. The product of a triplet of AdaLoRA is one column of B and one row of A, so its lambda is
the product of their lengths over gamma_r, and PEFT's AdaLoRA can be made of the same files.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor

from rsauto.adapters.export import Folded, lora_tensors, padded_factors, write_adapter
from rsauto.adapters.stock_adalora import stock_config
from rsauto.errors import InputError
from rsauto.exports.adapter_config import load_plain_lora
from rsauto.exports.chosen import Chosen, card_names_trial
from rsauto.records import ADALORA_METHODS

_A, _B, _PREFIX = ".lora_A.weight", ".lora_B.weight", "base_model.model."


@dataclass(frozen=True)
class Saved:
    """An adapter as it was kept."""

    folder: Path
    config: LoraConfig
    factors: Folded
    """(A, B) of every adapted module, in float32."""
    others: dict[str, Tensor]
    """What was trained whole, such as a classifier's head, by its name in the file."""
    record: dict[str, Any] | None = None
    """What `rsauto train` wrote beside it, where it was trained once more."""

    @property
    def ranks(self) -> dict[str, int]:
        return {name: len(a) for name, (a, _) in self.factors.items()}


def saved_weights(chosen: Chosen) -> Saved:
    """The trial's weights: as `rsauto train` made them, else as the study kept them.

    Raises InputError where they are not there, with the command that makes them.
    """
    for folder, record in _places(chosen):
        if (folder / "adapter_config.json").is_file():
            return _read(folder, record)
    asked = " ".join(_asked(chosen))
    raise InputError(
        f"trial {chosen.record.number}: its weights are not in {chosen.study.folder}. A study "
        "keeps those of its best trials only. Train it at full length, then export it: "
        f"rsauto train {shlex.quote(str(chosen.study.folder))} {asked}".rstrip()
    )


def _asked(chosen: Chosen) -> tuple[str, ...]:
    choice = chosen.choice
    value = choice.trial if choice.trial is not None else choice.rank
    return choice.given if value is None else (*choice.given, str(value))


def _places(chosen: Chosen) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """Where the weights may be, the place to prefer first."""
    folder, number = chosen.study.folder, chosen.record.number
    own = folder / "trained" / chosen.choice.name
    others = sorted(path for path in (folder / "trained").glob("*") if path != own)
    there = [(path, _trained_record(path)) for path in (own, *others)]
    ours = [(path, r) for path, r in there if r is not None and r.get("number") == number]
    # What was asked for by this name, else the longest training of the same trial.
    for trained, record in sorted(ours, key=lambda one: (one[0] != own, -_steps(one[1]))):
        yield trained / "adapter", record
    yield folder / "adapters" / f"{number:04d}", None
    for name in ("best", "recommended"):
        if card_names_trial(folder / name, number):
            yield folder / name, None


def _steps(record: dict[str, Any]) -> int:
    found = record.get("steps")
    return found if isinstance(found, int) else 0


def _trained_record(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _read(folder: Path, record: dict[str, Any] | None) -> Saved:
    try:
        tensors = load_plain_lora(folder)
        config = LoraConfig.from_pretrained(str(folder))
    except (
        OSError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError
    ) as error:  # fmt: skip
        raise InputError(
            f"{folder}: the adapter cannot be read: {error}. Train the trial again: rsauto train."
        ) from None
    halves = {key.removesuffix(half) for half in (_A, _B) for key in tensors if key.endswith(half)}
    torn = [name for name in halves if not {name + _A, name + _B} <= tensors.keys()]
    if torn or not halves:
        raise InputError(
            f"{folder}: the adapter has not both factors of every module. Train the trial again: "
            "rsauto train."
        )
    names = [key.removesuffix(_A) for key in tensors if key.endswith(_A)]
    factors = {
        name.removeprefix(_PREFIX): (
            tensors.pop(name + _A).float(),
            tensors.pop(name + _B).float(),
        )
        for name in names
    }
    return Saved(folder, config, factors, tensors, record)


def write_lora(
    saved: Saved, folder: Path, card: str, *, padded: bool = False, dtype: torch.dtype | None = None
) -> int:
    """Plain LoRA of scale 1; returns the bytes of its weights.

    ``padded``: every module at the largest rank, filled up with zeros.
    """
    config, factors = saved.config, saved.factors
    if padded:
        factors = padded_factors(factors)
        config.rank_pattern, config.alpha_pattern = {}, {}
    tensors = {**lora_tensors(factors), **saved.others}
    return write_adapter(folder, _cast(tensors, dtype), _sorted(config), card)


def write_stock_adalora(
    saved: Saved, folder: Path, card: str, chosen: Chosen, dtype: torch.dtype | None = None
) -> int:
    """PEFT's AdaLoRA, its triplets of vectors of length one; returns the bytes of its weights."""
    record = chosen.record
    target = min(record.target_rank or record.rank, max(saved.ranks.values()))
    config = stock_config(saved.config, saved.ranks, record.gamma_r, target)
    config.target_modules = saved.config.target_modules
    config.modules_to_save = saved.config.modules_to_save
    tensors = dict(saved.others)
    for name, (a, b) in saved.factors.items():
        for factor, tensor in _triplets(a, b, record.gamma_r).items():
            tensors[f"{_PREFIX}{name}.lora_{factor}"] = tensor
    return write_adapter(folder, _cast(tensors, dtype), _sorted(config), card)


def _triplets(a: Tensor, b: Tensor, gamma: float) -> dict[str, Tensor]:
    """(A, B, E) with gamma B diag(E) A the product of b (d_out x r) and a (r x d_in)."""
    lengths_a, lengths_b = a.norm(dim=1), b.norm(dim=0)
    tiny = torch.finfo(a.dtype).tiny
    return {
        "A": (a / lengths_a.clamp_min(tiny)[:, None]).contiguous(),
        "B": (b / lengths_b.clamp_min(tiny)).contiguous(),
        "E": (lengths_a * lengths_b / gamma)[:, None].contiguous(),
    }


def require_adalora(chosen: Chosen) -> None:
    """Raises InputError for trials of other methods, which have no triplets."""
    record = chosen.record
    if record.method not in ADALORA_METHODS:
        raise InputError(
            f"--to adalora: trial {record.number} was trained with {record.method}, which has no "
            "triplets. The exact export of it is --to lora."
        )


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    if dtype is None:
        return tensors
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _sorted(config: Any) -> Any:
    """With its layers as a list: PEFT reads a set, and would write another order every time."""
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    return config
