"""What fits a memory budget: the largest micro-batch at a rank, and the largest rank.

Torch is not needed for what was traced before.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

from rsauto.devices import outside_bytes as outside_bytes_of
from rsauto.memory.kinds import (
    PlannedMethod,
    PlannedOptimizer,
    Prediction,
    Score,
    StepKind,
    StepSize,
    Targets,
)
from rsauto.memory.profiles import Profiles
from rsauto.records import ADALORA_METHODS, ProductOrder, RankPattern
from rsauto.scaling import initial_rank

if TYPE_CHECKING:
    from rsauto.memory.sharded import ShardedBase

MicroBatch = int | Literal["auto"]

ALLOWANCE = 0.02
"""Share added before a prediction is compared to the budget: kernels' own scratch is not seen."""


class TrialSettings(TypedDict, total=False):
    """What a trial may change of the planner's kind of step."""

    method: PlannedMethod
    target_modules: Targets
    rank_pattern: RankPattern | None
    product_order: ProductOrder
    score: Score
    orth_reg: bool
    optimizer: PlannedOptimizer
    clip: bool
    pack_size: int


class MemoryPlanner:
    """Predicts the memory of trials on one model and dataset."""

    def __init__(
        self,
        kind: StepKind,
        *,
        train_lengths: Sequence[int],
        eval_length: int,
        profiles: Profiles | None = None,
        allowance: float = ALLOWANCE,
        outside_bytes: int | None = None,
        init_ratio: float = 1.0,
        sharded_base: ShardedBase | None = None,
    ) -> None:
        """`kind` says what is trained; its optimizer, layers and accumulation are replaced by what
        is asked for. `train_lengths` are the tokens of the training sequences, or of the longest
        ones; evaluation runs in batches of micro_batch_size sequences.

        `outside_bytes` is what CUDA keeps outside of the allocator; None takes it for an unknown
        card, and nothing on a CPU, where only tensors count. `init_ratio` is AdaLoRA's initial rank
        over the one that is asked for. `sharded_base` is given where a device holds a part of it.
        """
        if kind.device_type not in ("cpu", "cuda"):
            raise ValueError(f"device_type must be 'cpu' or 'cuda', but got {kind.device_type!r}.")
        self.kind = kind
        self.allowance = allowance
        self._lengths = sorted(train_lengths, reverse=True)
        self._eval_length = eval_length
        self._profiles = profiles or Profiles()
        if outside_bytes is None:
            outside_bytes = outside_bytes_of(None) if kind.device_type == "cuda" else 0
        self.outside_bytes = outside_bytes
        self.init_ratio = init_ratio
        self._sharded_base = sharded_base

    def initial_rank(self, rank: int, method: PlannedMethod | None = None) -> int:
        """Of every module at the start, where a trial of `rank` needs most; rounded up.

        Of the planner's own method unless told otherwise; for all but our AdaLoRA it is `rank`.
        """
        allocates = (method or self.kind.method) in ADALORA_METHODS
        return initial_rank(rank, self.init_ratio) if allocates else rank

    def changed(self, kind: StepKind, length: int | None = None) -> MemoryPlanner:
        """A planner of another kind of step, whose longest sequences have `length` tokens.

        Evaluation has sequences as long where it had, or else none that are longer than before.
        """
        longest = self._lengths[0]
        evaluated = self._eval_length
        if length is not None:
            evaluated = length if evaluated == longest else min(evaluated, length)
        return MemoryPlanner(
            kind,
            train_lengths=self._lengths if length in (None, longest) else [length],
            eval_length=evaluated,
            profiles=self._profiles,
            allowance=self.allowance,
            outside_bytes=self.outside_bytes,
            init_ratio=self.init_ratio,
            sharded_base=self._sharded_base,
        )

    def with_allowance(self, allowance: float) -> MemoryPlanner:
        """The same planner, with another share added to what it predicts."""
        changed = copy.copy(self)
        changed.allowance = allowance
        return changed

    def predict(
        self,
        rank: int,
        *,
        batch_size: int,
        micro_batch_size: int,
        **settings: Unpack[TrialSettings],
    ) -> Prediction:
        """Memory at `rank` with `batch_size` sequences a step, `micro_batch_size` at a time."""
        steps = self._steps(
            rank,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            **settings,
        )
        found = [self._profiles.predict(kind, size) for kind, size in steps]
        highest = max(found, key=lambda prediction: prediction.peak_bytes)
        reserved = max(one.reserved_bytes for one in found)
        order = settings.get("product_order", self.kind.product_order)
        whole = replace(highest, rank=rank, reserved_bytes=reserved, product_order=order)
        return whole if self._sharded_base is None else self._sharded_base.apply(whole)

    def fits(
        self,
        rank: int,
        *,
        memory_budget_bytes: int,
        batch_size: int,
        micro_batch_size: int,
        **settings: Unpack[TrialSettings],
    ) -> bool:
        """Whether `predict` needs no more than the budget; much faster where that is all."""
        # The most that may be reserved, so that `needed_bytes` of it is within the budget.
        free = memory_budget_bytes - self.outside_bytes
        limit = math.ceil((free + 1) / (1 + self.allowance)) - 1
        if self._sharded_base is not None:
            limit += self._sharded_base.freed_bytes
        steps = self._steps(
            rank,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            **settings,
        )
        return all(self._profiles.fits(kind, size, limit) for kind, size in steps)

    def _steps(
        self,
        rank: int,
        *,
        batch_size: int,
        micro_batch_size: int,
        **settings: Unpack[TrialSettings],
    ) -> list[tuple[StepKind, StepSize]]:
        """The micro-batches that may need most.

        A batch in parts is cut longest first, so only the first part, before which there are no
        gradients, can have the longest sequence.
        """
        if rank < 1:
            raise ValueError(f"rank must be at least 1, but got {rank=}.")
        if micro_batch_size < 1 or batch_size % micro_batch_size:
            raise ValueError(
                f"micro_batch_size must divide batch_size, but got {micro_batch_size=} and "
                f"{batch_size=}. Use one of {divisors(batch_size)}."
            )
        kind = replace(
            self.kind,
            accumulate=False,
            padded=self.kind.padded and micro_batch_size > 1,
            **settings,
        )
        initial = self.initial_rank(rank, kind.method)
        size = StepSize(initial, micro_batch_size, self._lengths[0], self._eval_length)
        if micro_batch_size == batch_size:
            return [(kind, size)]
        second = size._replace(train_length=self._second_length(batch_size, micro_batch_size))
        later = (replace(kind, accumulate=True), second)
        # As long, and with gradients from the start, it needs at least what the first needs.
        return [later] if second == size else [(kind, size), later]

    def _second_length(self, batch_size: int, micro_batch_size: int) -> int:
        """The longest sequence that a second micro-batch can have."""
        if len(self._lengths) < batch_size:
            return self._lengths[0]  # rows come more than once, or only the longest is known
        return self._lengths[micro_batch_size]

    def needed_bytes(self, prediction: Prediction) -> int:
        """What a budget must hold: reserved memory, an allowance, and CUDA's own on CUDA.

        On a CPU only tensors count, not the interpreter and its libraries.
        """
        return self.outside_bytes + int(prediction.reserved_bytes * (1 + self.allowance))

    def largest_micro_batch(
        self,
        rank: int,
        *,
        memory_budget_bytes: int,
        batch_size: int,
        micro_batch_size: MicroBatch = "auto",
        **settings: Unpack[TrialSettings],
    ) -> Prediction | None:
        """The prediction for the largest micro-batch that fits the budget, None if none does.

        "auto" chooses among the divisors of `batch_size`, so that gradient accumulation holds the
        global batch; a number allows only itself.
        """

        def fitting(size: int) -> bool:
            return self.fits(
                rank,
                memory_budget_bytes=memory_budget_bytes,
                batch_size=batch_size,
                micro_batch_size=size,
                **settings,
            )

        chosen = _largest_micro_batch(batch_size, micro_batch_size, fitting)
        if chosen is None:
            return None
        return self.predict(rank, batch_size=batch_size, micro_batch_size=chosen, **settings)

    def largest_or_smallest(
        self,
        rank: int,
        *,
        memory_budget_bytes: int | None,
        batch_size: int,
        micro_batch_size: MicroBatch,
    ) -> Prediction:
        """At the largest micro-batch that fits, or at the smallest allowed where none does.

        Without a budget "auto" is the whole batch.
        """
        if micro_batch_size != "auto":
            size = micro_batch_size
        elif memory_budget_bytes is None:
            size = batch_size
        else:
            found = self.largest_micro_batch(
                rank, memory_budget_bytes=memory_budget_bytes, batch_size=batch_size
            )
            if found is not None:
                return found
            size = 1
        return self.predict(rank, batch_size=batch_size, micro_batch_size=size)

    def largest_rank(
        self,
        *,
        memory_budget_bytes: int,
        batch_size: int,
        micro_batch_size: MicroBatch = "auto",
        known: Mapping[int, bool] | None = None,
        **settings: Unpack[TrialSettings],
    ) -> int:
        """The largest rank that fits with any allowed micro-batch; 0 when not even rank 1 does.

        `known` tells of some ranks whether they fit, which need not be looked at again. Raises
        ValueError for a rank pattern, whose memory the rank says nothing about.
        """
        if settings.get("rank_pattern", self.kind.rank_pattern) is not None:
            raise ValueError("a rank pattern fits or does not; it has no largest rank")

        def fits(rank: int) -> bool:
            def fitting(size: int) -> bool:
                return self.fits(
                    rank,
                    memory_budget_bytes=memory_budget_bytes,
                    batch_size=batch_size,
                    micro_batch_size=size,
                    **settings,
                )

            return _largest_micro_batch(batch_size, micro_batch_size, fitting) is not None

        fitting = max((rank for rank, does in (known or {}).items() if does), default=0)
        too_large = min(
            (rank for rank, does in (known or {}).items() if not does and rank > fitting),
            default=0,
        )
        if not too_large:
            too_large = max(1, 2 * fitting)
            while fits(too_large):  # ends: memory grows with the rank without bound
                fitting, too_large = too_large, 2 * too_large
        return _largest_true(fits, fitting, too_large)


def _largest_true(condition: Callable[[int], bool], true: int, false: int) -> int:
    """The largest number for which a condition holds that holds at `true` and not at `false`."""
    while false - true > 1:
        middle = (true + false) // 2
        true, false = (middle, false) if condition(middle) else (true, middle)
    return true


def _largest_micro_batch(
    batch_size: int, micro_batch_size: MicroBatch, fits: Callable[[int], bool]
) -> int | None:
    """The largest allowed micro-batch that fits, found by halves."""
    if micro_batch_size != "auto":
        return micro_batch_size if fits(micro_batch_size) else None
    *smaller, whole = divisors(batch_size)
    # The whole batch stands apart: without accumulation it may need less than a part of it.
    if fits(whole):
        return whole
    index = _largest_true(lambda index: fits(smaller[index]), -1, len(smaller))
    return None if index < 0 else smaller[index]


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]
