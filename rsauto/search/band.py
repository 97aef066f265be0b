"""A narrow band of learning rates around the law by which the best one moves with rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rsauto.records import TrialSpec
from rsauto.scaling import transferred_learning_rate


@dataclass(frozen=True, slots=True)
class Band:
    """Learning rates around the law that a study's trials have shown."""

    rate: float
    """The best one at `rank`."""
    rank: int
    exponent: float
    half_octaves: float

    def centre(self, rank: int) -> float:
        return transferred_learning_rate(self.rate, self.rank, rank, self.exponent)

    def offset(self, spec: TrialSpec) -> float:
        """Octaves of a trial's learning rate above the law."""
        return math.log2(spec.learning_rate / self.centre(spec.rank))
