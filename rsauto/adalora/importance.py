"""How important each triplet of a module is (AdaLoRA, arXiv:2303.10512, section 3.2).

Notation
    A, E, B        the factors Q (r x d_in), lambda (r x 1) and P (d_out x r), in PEFT's letters
    sensitivity    I(w) = |w dL/dw|, equation 8, smoothed: I_t = b1 I_{t-1} + (1 - b1) I(w)
    uncertainty    U_t = b2 U_{t-1} + (1 - b2) |I(w) - I_t|, equation 10
    importance     s(w) = I_t U_t, equation 11; of triplet i: s(lambda_i) + the mean of s over the
                   entries of its row of Q + the mean over its column of P, equation 7
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Score = Literal["full", "lambda"]
Factor = Literal["A", "E", "B"]

SCORED: dict[Score, tuple[Factor, ...]] = {"full": ("E", "A", "B"), "lambda": ("E",)}
"""The factors whose entries are followed. lambda alone needs no state for each entry of P and Q:
the update of Delta W is linear in each factor, so the signed sums of w dL/dw over a triplet's row
of Q, its column of P, and its lambda are equal; the full score differs only by taking magnitudes
before the mean."""

RANK_DIM: dict[Factor, int] = {"A": 0, "E": 0, "B": 1}
"""Along which dimension a factor's triplets lie."""


@dataclass
class Importance:
    """Smoothed sensitivity and uncertainty of one module's factors, float32, each in its shape."""

    sensitivity: dict[Factor, Tensor] = field(default_factory=dict)
    uncertainty: dict[Factor, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def update(
        self,
        factors: Mapping[Factor, Tensor],
        gradients: Mapping[Factor, Tensor],
        beta1: float,
        beta2: float,
    ) -> None:
        """One step of both averages, which start at zero; the gradients must be finite."""
        for name, weight in factors.items():
            if name not in self.sensitivity:
                self.sensitivity[name] = torch.zeros_like(weight, dtype=torch.float32)
                self.uncertainty[name] = torch.zeros_like(weight, dtype=torch.float32)
            for table in (self.sensitivity, self.uncertainty):
                table[name] = table[name].to(weight.device)  # a checkpoint is read elsewhere
            smoothed = self.sensitivity[name]
            now = torch.mul(weight.float(), gradients[name].float()).abs_()
            smoothed.lerp_(now, 1 - beta1)
            self.uncertainty[name].lerp_(now.sub_(smoothed).abs_(), 1 - beta2)

    @torch.no_grad()
    def of_triplets(self) -> Tensor:
        """Importance of every triplet, (r,), float32."""
        scores = [self._mean_score(name) for name in self.sensitivity]
        return torch.stack(scores).sum(dim=0)

    def _mean_score(self, name: Factor) -> Tensor:
        """Mean of s(w) over a factor's entries of each triplet."""
        entries = 1 - RANK_DIM[name]
        pair = self.sensitivity[name], self.uncertainty[name]
        total: Tensor = torch.linalg.vecdot(*pair, dim=entries)
        return total / pair[0].shape[entries]

    def keep(self, index: Tensor) -> None:
        """Drops all triplets but those of ``index``."""
        for table in (self.sensitivity, self.uncertainty):
            for name, tensor in table.items():
                table[name] = tensor.index_select(RANK_DIM[name], index.to(tensor.device))

    def tensors(self) -> Iterator[Tensor]:
        """Everything kept from step to step."""
        yield from self.sensitivity.values()
        yield from self.uncertainty.values()
