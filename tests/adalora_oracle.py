"""AdaLoRA once more, from the formulas of its paper (arXiv:2303.10512), slowly and by itself.

Loops over NumPy arrays in double precision; imports nothing of rsauto. A module's factors are
``E`` (r, 1), ``A`` (r, d_in) and ``B`` (d_out, r), as PEFT names lambda, Q and P.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Factors = dict[str, Array]
Step = tuple[Sequence[Factors], Sequence[Factors]]
"""Factors and gradients of every module, as they are after an optimizer's step."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What an allocation is configured by."""

    initial: int
    target: int
    tinit: int
    tfinal: int
    total_step: int
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    score: str = "full"
    recovery: str = "paper"

    @property
    def final_step(self) -> int:
        return self.total_step - self.tfinal

    def budget(self, step: int) -> int:
        """Equation 12 in exact fractions, rounded down."""
        if step < self.tinit:
            return self.initial
        if step >= self.final_step:
            return self.target
        done = Fraction(step - self.tinit, self.total_step - self.tinit - self.tfinal)
        return math.floor(self.target + (self.initial - self.target) * (1 - done) ** 3)

    def allocates(self, step: int) -> bool:
        if step <= self.tinit or step > self.final_step:
            return False
        return step == self.final_step or step % self.delta_t == 0


def best(
    scores: Sequence[Sequence[float]], active: Sequence[Sequence[bool]], budget: int
) -> list[list[bool]]:
    """Masks of the ``budget`` best: NaN last; ties to the active, then by place, then by module."""
    candidates = []
    for module, values in enumerate(scores):
        for place, value in enumerate(values):
            unknown = math.isnan(value)
            rank = (unknown, 0.0 if unknown else -value, not active[module][place], place, module)
            candidates.append((rank, module, place))
    masks = [[False] * len(values) for values in scores]
    for _, module, place in sorted(candidates)[:budget]:
        masks[module][place] = True
    return masks


class Scores:
    """Smoothed sensitivity and uncertainty of one module's entries, equations 8 to 10."""

    def __init__(self, factors: Factors, followed: Iterable[str] = ("E", "A", "B")) -> None:
        self.sensitivity = {name: np.zeros(factors[name].shape) for name in followed}
        self.uncertainty = {name: np.zeros(factors[name].shape) for name in followed}

    def update(self, factors: Factors, gradients: Factors, beta1: float, beta2: float) -> None:
        for name, smoothed in self.sensitivity.items():
            for entry in np.ndindex(smoothed.shape):
                now = abs(factors[name][entry] * gradients[name][entry])
                smoothed[entry] = beta1 * smoothed[entry] + (1 - beta1) * now
                spread = abs(now - smoothed[entry])
                before = self.uncertainty[name][entry]
                self.uncertainty[name][entry] = beta2 * before + (1 - beta2) * spread

    def of_triplet(self, i: int) -> float:
        """Equations 7 and 11."""

        def mean(name: str, entries: list[tuple[int, int]]) -> float:
            products = [self.sensitivity[name][e] * self.uncertainty[name][e] for e in entries]
            return float(sum(products)) / len(products)

        total = mean("E", [(i, 0)])
        if "A" in self.sensitivity:
            total += mean("A", [(i, j) for j in range(self.sensitivity["A"].shape[1])])
            total += mean("B", [(j, i) for j in range(self.sensitivity["B"].shape[0])])
        return total


@dataclass(frozen=True)
class Outcome:
    """After one call, for every module, over the triplets it had at the start."""

    masks: list[list[bool]]
    left: list[list[int]]
    """Triplets whose tensors are still there."""
    scores: list[Scores]


def allocation(steps: Iterable[Step], rules: Rules) -> Iterator[Outcome]:
    """Plays the allocation over ``steps``, counted from 1; the modules have one initial rank."""
    followed = ("E",) if rules.score == "lambda" else ("E", "A", "B")
    scores: list[Scores] = []
    masks: list[list[bool]] = []
    left: list[list[int]] = []
    for step, (factors, gradients) in enumerate(steps, 1):
        if step == 1:
            scores = [Scores(one, followed) for one in factors]
            masks = [[True] * len(one["E"]) for one in factors]
            left = [list(range(len(one["E"]))) for one in factors]
        finite = all(np.isfinite(array).all() for one in gradients for array in one.values())
        if finite and step < rules.final_step:
            for one, weight, gradient in zip(scores, factors, gradients, strict=True):
                one.update(weight, gradient, rules.beta1, rules.beta2)
        if rules.allocates(step):
            modules = range(len(masks))
            found = [[scores[m].of_triplet(i) for i in left[m]] for m in modules]
            active = [[masks[m][i] for i in left[m]] for m in modules]
            chosen = best(found, active, rules.budget(step))
            masks = [[False] * len(mask) for mask in masks]
            for m in modules:
                for i, is_kept in zip(left[m], chosen[m], strict=True):
                    masks[m][i] = is_kept
            if rules.recovery == "none":
                left = [[i for i, is_kept in enumerate(mask) if is_kept] for mask in masks]
        yield Outcome([list(mask) for mask in masks], [list(kept) for kept in left], scores)
