"""How many triplets may be active at a step, and which: the rank budget of AdaLoRA.

Notation
    b0, bT    triplets of all modules together at the start and at the end
    ti, tf    steps of warm-up and of final fine-tuning at a fixed pattern (tinit, tfinal)
    T         steps in all (total_step)

Pure mathematics on numbers and score tensors; knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetSchedule:
    """The global budget of AdaLoRA (arXiv:2303.10512, equation 12), step by step from 1."""

    initial: int
    """b0, triplets."""
    target: int
    """bT, triplets."""
    tinit: int
    tfinal: int
    total_step: int
    delta_t: int = 1
    """Steps between two allocations."""

    @property
    def final_step(self) -> int:
        """From this step on the pattern is fixed and the budget is the target."""
        return self.total_step - self.tfinal

    def budget(self, step: int) -> int:
        """Triplets that may be active after ``step``, rounded down.

        b0 until ti; then bT + (b0 - bT) (1 - (t - ti) / (T - ti - tf))^3; bT from T - tf on.
        """
        if step <= self.tinit:
            return self.initial
        if step >= self.final_step:
            return self.target
        left, span = self.final_step - step, self.final_step - self.tinit
        # In whole numbers: floats round some budgets that are whole to one triplet less.
        return self.target + (self.initial - self.target) * left**3 // span**3

    def allocates(self, step: int) -> bool:
        """Whether ``step`` chooses the active triplets anew; the final step always does."""
        if step == self.final_step:
            return True
        return self.tinit < step < self.final_step and step % self.delta_t == 0


def keep_best(scores: Sequence[Tensor], active: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Masks of the ``budget`` best triplets, True where kept: exactly that many, always.

    ``scores`` and ``active`` hold one tensor (r,) a module; scores that are NaN count as the
    lowest. Of equal scores those already active stay, then the modules share what is left evenly,
    so that the choice never depends on how a device sorts. A module may end with none.

    Raises ValueError for a budget that is negative or above the number of triplets.
    """
    sizes = [len(score) for score in scores]
    if not 0 <= budget <= sum(sizes):
        raise ValueError(f"rank_budget must be between 0 and {sum(sizes)}, but got {budget}.")
    if not sizes:
        return []
    device = scores[0].device  # the layers of one model may lie on several
    score = torch.cat([s.to(device).float() for s in scores]).nan_to_num(
        nan=-torch.inf, posinf=torch.inf
    )
    is_active = torch.cat([mask.to(device) for mask in active])
    # Ties are broken by sorting stably, the least important criterion first.
    place = torch.cat([torch.arange(size, device=device) for size in sizes])
    order = torch.argsort(place, stable=True)
    order = order[torch.argsort(is_active[order].int(), descending=True, stable=True)]
    order = order[torch.argsort(score[order], descending=True, stable=True)]
    kept = torch.zeros(len(score), dtype=torch.bool, device=device)
    kept[order[:budget]] = True
    return list(kept.split(sizes))
