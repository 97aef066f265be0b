"""The memory of a step as a function of its size, from two traces.

Every storage of a step has a size that is one term in the rank r, the micro-batch b and the lengths
s (training) and e (evaluation),

    c r^i b^j (s + a)^k (e + a)^l bytes,      exponents 0 to 2, a = 0 but for shifted labels

and two traces at sizes whose ratios are independent tell the exponents: a term must explain both
traces exactly, and only one can. The peak at any size is then the highest running sum of the
events, each rounded up as the allocator does,

    peak = max_n sum_{m <= n} round_up(size_m)

which in the rank is the upper envelope of straight lines (of parabolas for AdaLoRA), not a straight
line through two peaks: at low ranks the peak is where the loss is, at high ranks where backward
ends.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rsauto.memory.allocator import runs_within, smallest_limit_bytes, tolerance_bytes
from rsauto.memory.kinds import Prediction, StepSize

GRANULE_BYTES = {"cpu": 64, "cuda": 512}
"""Allocators round up to a multiple: c10's alignment on the CPU, kMinBlockSize on CUDA."""

Ints = npt.NDArray[np.int64]

_EXPONENTS = sorted(itertools.product((0, 1, 2), (0, 1), (0, 1, 2), (0, 1, 2)), key=sum)
"""Of rank, micro-batch and the two lengths; simpler terms first."""

PADDED_TO = 128
"""Tokens to which CUDA's attention kernels pad at most."""

_SHIFTS = (0, 1, -1, 2, -2)
"""Tokens by which a length may be off: labels are padded by one before they are shifted."""


class Event(Protocol):
    """One allocation (nbytes > 0) or free, as `rsauto.memory.recorder` records it."""

    @property
    def storage(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def tag(self) -> str: ...
    @property
    def phase(self) -> str: ...
    @property
    def operation(self) -> str: ...


class Trace(Protocol):
    """One traced step, as `rsauto.memory.trace` makes it."""

    @property
    def size(self) -> StepSize: ...
    @property
    def num_trainable_params(self) -> int: ...
    @property
    def linear_weights(self) -> tuple[int, int]: ...
    @property
    def events(self) -> Sequence[Event]: ...


class OtherOperationsError(RuntimeError):
    """Two traces differ in more than sizes, so neither tells of any other size."""


@dataclass(frozen=True, slots=True)
class _Term:
    """c r^i b^j (s + shift)^k (e + shift)^l."""

    coefficient: float
    exponents: tuple[int, int, int, int]
    shift: int = 0


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """The events of one kind of step at every size it covers."""

    low: StepSize
    """Where it was traced; a length of zero stays zero."""
    high: StepSize
    step: int
    """Lengths that the traces tell of are multiples of it."""
    storages: Ints
    """(events,) the number of the storage that is allocated or freed."""
    signs: Ints
    """(events,) 1 for an allocation, -1 for a free."""
    terms: Ints
    """(events,) the row of the tables below that gives the event's size."""
    coefficients: npt.NDArray[np.float64]
    """(terms,)"""
    exponents: Ints
    """(terms, 4)"""
    shifts: Ints
    """(terms,)"""
    labels: Ints
    """(events, 3) rows of `words` that name tag, phase and operation."""
    words: tuple[str, ...]
    params: tuple[float, float]
    """Trainable parameters: (without rank, for each rank)."""
    frozen_linear_weights: int
    trainable_linear_weights: tuple[float, float]
    """(without rank, for each rank)."""

    @property
    def is_lasting(self) -> bool:
        """Whether it may be kept from process to process."""
        return True

    def covers(self, size: StepSize) -> bool:
        """Whether a step of `size` runs the same operations, as far as can be told without tracing.

        A single sequence is handled differently from several, and lengths on two sides of a window
        as well: only those between the traced ones are sure to run what was traced at both ends.
        Nor do the traces tell of a length that kernels may pad, or of a number that was the same
        in both.
        """
        alone = (size.micro_batch_size == 1) == (self.low.micro_batch_size == 1)
        batches = size.micro_batch_size == self.low.micro_batch_size or (
            self.low.micro_batch_size != self.high.micro_batch_size
        )
        return (
            alone
            and batches
            and all(
                wanted == low
                or (min(low, high) <= wanted <= max(low, high) and not wanted % self.step)
                for wanted, low, high in zip(size[2:], self.low[2:], self.high[2:], strict=True)
            )
        )

    def sizes(self, size: StepSize, granule: int) -> Ints:
        """(events,) bytes that each event allocates (positive) or frees, rounded to `granule`."""
        rank, batch, train, evaluation = (float(n) for n in size)
        of_rank, of_batch, of_train, of_eval = self.exponents.T
        exact = (
            self.coefficients
            * rank**of_rank
            * batch**of_batch
            * (train + self.shifts) ** of_train
            * (evaluation + self.shifts) ** of_eval
        )
        granules = np.ceil((exact - 0.01) / granule).astype(np.int64)
        rounded: Ints = (granules * granule)[self.terms] * self.signs
        return rounded

    def num_trainable_params(self, rank: int) -> int:
        """Trained numbers at `rank`, a classifier's head among them."""
        return round(self.params[0] + self.params[1] * rank)

    def flops_per_token(self, rank: int) -> float:
        """Of forward and backward, as `rsauto.training.flops` counts them."""
        trainable = self.trainable_linear_weights
        return 4.0 * self.frozen_linear_weights + 6.0 * (trainable[0] + trainable[1] * rank)

    def fits(self, size: StepSize, device_type: str, limit_bytes: int) -> bool:
        """Whether `predict` would have no more reserved than the limit; much faster."""
        sizes = self.sizes(size, GRANULE_BYTES[device_type])
        peak = int(sizes.cumsum().max())
        if device_type == "cpu" or peak > limit_bytes:
            return peak <= limit_bytes
        changes = self._changes(sizes)
        if not runs_within(changes, limit_bytes):
            return False
        # Near the limit the answer must be that of `predict`, which is found to a tolerance.
        return (
            runs_within(changes, limit_bytes - tolerance_bytes(limit_bytes))
            or smallest_limit_bytes(changes, peak) <= limit_bytes
        )

    def predict(self, size: StepSize, device_type: str) -> Prediction:
        """The peak at `size`, what it consists of, and what the allocator must reserve for it."""
        assert self.covers(size), f"{size} is not covered by traces at {self.low} and {self.high}"
        sizes = self.sizes(size, GRANULE_BYTES[device_type])
        in_use = sizes.cumsum()
        top = int(in_use.argmax())
        peak = reserved = int(in_use[top])
        if device_type == "cuda":
            reserved = smallest_limit_bytes(self._changes(sizes), peak)
        tags, phases, operations = self.labels.T
        by_tag = np.bincount(tags[: top + 1], weights=sizes[: top + 1], minlength=len(self.words))
        return Prediction(
            rank=size.rank,
            micro_batch_size=size.micro_batch_size,
            peak_bytes=peak,
            reserved_bytes=reserved,
            num_trainable_params=self.num_trainable_params(size.rank),
            flops_per_token=self.flops_per_token(size.rank),
            breakdown={self.words[i]: int(n) for i, n in enumerate(by_tag) if n},
            phase=self.words[phases[top]],
            operation=self.words[operations[top]],
        )

    def _changes(self, sizes: Ints) -> list[tuple[int, int]]:
        return list(zip(self.storages.tolist(), sizes.tolist(), strict=True))


def profile_from(low: Trace, high: Trace, device_type: str) -> StepProfile:
    """The profile that two traces of one kind of step tell, which will run on `device_type`.

    Raises OtherOperationsError where they run different operations, or where no term explains a
    storage of both.
    """
    _require_same_order(low, high)
    found: dict[tuple[int, int], int] = {}
    rows: list[_Term] = []
    terms = np.empty(len(low.events), dtype=np.int64)
    for number, (one, other) in enumerate(zip(low.events, high.events, strict=True)):
        pair = (abs(one.nbytes), abs(other.nbytes))
        if pair not in found:
            found[pair] = len(rows)
            rows.append(_term(pair, low.size, high.size))
        terms[number] = found[pair]
    words = _Words()
    ranks = (low.size.rank, high.size.rank)
    weights = (low.linear_weights, high.linear_weights)
    return StepProfile(
        low=low.size,
        high=high.size,
        step=PADDED_TO if device_type == "cuda" else 1,
        storages=np.array([e.storage for e in low.events], dtype=np.int64),
        signs=np.array([1 if e.nbytes >= 0 else -1 for e in low.events], dtype=np.int64),
        terms=terms,
        coefficients=np.array([row.coefficient for row in rows]),
        exponents=np.array([row.exponents for row in rows], dtype=np.int64),
        shifts=np.array([row.shift for row in rows], dtype=np.int64),
        labels=np.array([words.of(e) for e in low.events], dtype=np.int64),
        words=tuple(words.numbers),
        params=line(ranks, (low.num_trainable_params, high.num_trainable_params)),
        frozen_linear_weights=weights[0][0],
        trainable_linear_weights=line(ranks, (weights[0][1], weights[1][1])),
    )


def second_sizes(first: StepSize, device_type: str) -> Iterator[StepSize]:
    """Sizes to trace beside `first`, the most telling one first.

    What lies between the two is known then, so lengths go down to about a quarter. CUDA's kernels
    pad lengths: there only those that need no padding tell of others that need none. Should the
    operations differ, as on two sides of a window, lengths that hardly differ may help, and at last
    the rank and the micro-batch alone.
    """
    step = PADDED_TO if device_type == "cuda" else 1
    for train_share, eval_share in ((3 / 4, 5 / 8), (0.0, 0.0)):
        train_lengths = _shorter(first.train_length, train_share, step)
        eval_lengths = _shorter(first.eval_length, eval_share, step)
        yield from itertools.islice(_telling(first, train_lengths, eval_lengths), 1)
    yield from itertools.islice(_telling(first, [first.train_length], [first.eval_length]), 1)
    yield first._replace(rank=3 * first.rank)


def _telling(
    first: StepSize, train_lengths: Iterable[int], eval_lengths: Iterable[int]
) -> Iterator[StepSize]:
    """Sizes with these lengths that tell every term from every other."""
    batch = first.micro_batch_size
    batches = [1] if batch == 1 else [batch + 1, batch + 2, batch + 3]
    choices = itertools.product(train_lengths, eval_lengths, (3, 5, 7, 11, 13), batches)
    for train_length, eval_length, factor, micro_batch_size in choices:
        size = StepSize(factor * first.rank, micro_batch_size, train_length, eval_length)
        if _independent(first, size):
            yield size


def _shorter(length: int, share: float, step: int) -> list[int]:
    """Lengths a little below, first the one that is less by about `share`; above if none is left.

    A length that is no multiple of `step` stays as it is.
    """
    if length == 0 or length % step:
        return [length]
    least = max(1, int(length * share) // step) * step
    lengths = [length - least, length - 2 * least, length - 3 * least]
    return [n for n in lengths if n > 1] or [length + step, length + 2 * step]


def _independent(low: StepSize, high: StepSize) -> bool:
    """Whether no two terms grow alike; numbers that stay equal are left out."""
    changed = [index for index in range(4) if low[index] != high[index]]
    ratios = set()
    terms = {tuple(e[i] if i in changed else 0 for i in range(4)) for e in _EXPONENTS}
    for exponents in terms:
        one, other = _product(low, exponents), _product(high, exponents)
        divisor = math.gcd(one, other)
        ratios.add((one // divisor, other // divisor))
    return len(ratios) == len(terms)


def _product(size: StepSize, exponents: Sequence[int]) -> int:
    return math.prod(n**e for n, e in zip(size, exponents, strict=True) if e)


def _term(nbytes: tuple[int, int], low: StepSize, high: StepSize) -> _Term:
    """The simplest term that is `nbytes[0]` at `low` and `nbytes[1]` at `high`, exactly."""
    for shift, exponents in itertools.product(_SHIFTS, _EXPONENTS):
        if shift and exponents[2] + exponents[3] != 1:
            continue
        one, other = (_product(_moved(size, shift), exponents) for size in (low, high))
        if one and other and nbytes[0] * other == nbytes[1] * one:
            return _Term(nbytes[0] / one, exponents, shift)
    raise OtherOperationsError(
        f"a storage of {nbytes[0]} bytes at {low} and of {nbytes[1]} at {high} follows no term"
    )


def _moved(size: StepSize, shift: int) -> StepSize:
    return size._replace(
        train_length=size.train_length + shift, eval_length=size.eval_length + shift
    )


def line(ranks: tuple[int, int], values: tuple[int, int]) -> tuple[float, float]:
    """(constant, slope) of the straight line through two points."""
    slope = (values[1] - values[0]) / (ranks[1] - ranks[0])
    return values[0] - slope * ranks[0], slope


def _require_same_order(low: Trace, high: Trace) -> None:
    """What is allocated and freed when must agree; not how much, nor what it is taken for.

    Logits are told by their size, which something else may have at one size and not at another.
    """

    def order(trace: Trace) -> list[Any]:
        return [(e.storage, e.nbytes >= 0, e.phase, e.operation) for e in trace.events]

    if order(low) != order(high):
        raise OtherOperationsError(f"the step at {low.size} runs other operations than {high.size}")


class _Words:
    """Numbers for the names of tags, phases and operations, in order of appearance."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def of(self, event: Event) -> tuple[int, int, int]:
        tag, phase, operation = (
            self.numbers.setdefault(word, len(self.numbers))
            for word in (event.tag, event.phase, event.operation)
        )
        return tag, phase, operation
