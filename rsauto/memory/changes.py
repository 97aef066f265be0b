"""What to change so that a rank fits: the change that costs least, in words.

Changes are tried from the cheapest on:

    smaller micro-batches    the same result, a little slower
    gradient checkpointing   the same result, one more forward pass a step
    8-bit, 4-bit base        weights are rounded, steps are slower
    shorter sequences        other data
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rsauto.errors import InputError
from rsauto.memory.kinds import Bits, Prediction, StepKind
from rsauto.memory.planner import MemoryPlanner
from rsauto.units import bytes_text

if TYPE_CHECKING:
    from rsauto.memory.plan import PlannedRank

SHORTEST = 64
"""Tokens; sequences are not cut further to make a rank fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Settings under which a rank fits that did not."""

    rank: int
    settings: Mapping[str, Any]
    """Of `rsauto.plan`, those that differ."""
    prediction: Prediction
    needed_bytes: int
    freed_bytes: int

    def __str__(self) -> str:
        words = " and ".join(_words(name, value) for name, value in self.settings.items())
        frees = "frees" if set(self.settings) in _SINGULAR else "free"
        return f"{words} {frees} {bytes_text(self.freed_bytes)}; then rank {self.rank} fits"


def cheapest_change(
    planner: MemoryPlanner,
    row: PlannedRank,
    memory_budget_bytes: int,
    batch_size: int,
    max_length: int,
) -> Change | None:
    """The first of the module's changes, alone or with those before it, that makes a rank fit."""
    if planner.outside_bytes + trained_bytes(planner.kind, row.prediction) > memory_budget_bytes:
        return None
    before = {
        "micro_batch_size": row.prediction.micro_batch_size,
        "gradient_checkpointing": planner.kind.gradient_checkpointing,
        "quant_bits": planner.kind.quant_bits,
        "max_length": max_length,
    }
    for kind, length in _variants(planner.kind, max_length):
        changed = planner.changed(kind, length)
        try:
            found = changed.largest_micro_batch(
                row.rank, memory_budget_bytes=memory_budget_bytes, batch_size=batch_size
            )
        except InputError:  # such as an architecture without checkpointing
            continue
        if found is None:
            continue
        after = {
            "micro_batch_size": found.micro_batch_size,
            "gradient_checkpointing": kind.gradient_checkpointing,
            "quant_bits": kind.quant_bits,
            "max_length": length,
        }
        needed = changed.needed_bytes(found)
        return Change(
            rank=row.rank,
            settings={name: value for name, value in after.items() if value != before[name]},
            prediction=found,
            needed_bytes=needed,
            freed_bytes=row.needed_bytes - needed,
        )
    return None


def trained_bytes(kind: StepKind, prediction: Prediction) -> int:
    """Adapters and AdamW's two moments of them: what no change makes smaller."""
    whole_moments = kind.optimizer.startswith("adamw") and kind.optimizer != "adamw_8bit"
    return prediction.breakdown.get("adapters", 0) * (3 if whole_moments else 1)


def _variants(kind: StepKind, max_length: int) -> Iterator[tuple[StepKind, int]]:
    """The user's own settings first: a smaller micro-batch alone may do."""
    checkpointing = [False, True] if not kind.gradient_checkpointing else [True]
    bases: list[Bits | None] = [kind.quant_bits]
    if kind.quant_bits is None and kind.method != "dora":
        bases += [8, 4]
    elif kind.quant_bits == 8:
        bases += [4]
    for bits in bases:
        for checkpointed in checkpointing:
            yield replace(kind, quant_bits=bits, gradient_checkpointing=checkpointed), max_length
    length = max_length // 2
    while length >= SHORTEST:
        for bits in bases:
            yield replace(kind, quant_bits=bits, gradient_checkpointing=True), length
        length //= 2


_SINGULAR = ({"gradient_checkpointing"}, {"quant_bits"})
"""Changes that are one thing, in the grammar of their words."""


def _words(setting: str, value: Any) -> str:
    if setting == "gradient_checkpointing":
        return "gradient checkpointing"
    if setting == "quant_bits":
        return f"{'an' if value == 8 else 'a'} {value}-bit base"
    if setting == "micro_batch_size":
        return f"micro-batches of {value}"
    return f"sequences of at most {value} tokens"
