"""Which rows go where, and in which order: everything random about the data. Standard library only.

Orders must not change with the version of Python, numpy or torch, or a resumed study would train
on other batches. Python promises that of `random.Random(int).random()` alone, not of `shuffle` and
`sample`, so every order here is a sort by such numbers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence


def shuffled(num_items: int, generator: random.Random) -> list[int]:
    """0 .. num_items - 1 in random order."""
    keys = [generator.random() for _ in range(num_items)]
    return sorted(range(num_items), key=keys.__getitem__)


def stratified(order: Sequence[int], classes: Sequence[str]) -> list[int]:
    """The same indices so that every first part of them has each class in its share.

    `classes` has the class of every index. The k-th of the n of a class, from 0, comes at
    (k + 1/2) / n of the way; within a class the order stays. A class of one comes in the middle.
    """
    totals = Counter(classes)
    seen: Counter[str] = Counter()
    place: dict[int, float] = {}
    for index in order:
        name = classes[index]
        place[index] = (seen[name] + 0.5) / totals[name]
        seen[name] += 1
    return sorted(order, key=place.__getitem__)


def batch_plan(num_examples: int, batch_size: int, steps: int, seed: int) -> list[tuple[int, ...]]:
    """Indices of the examples of every step: `steps` tuples of exactly `batch_size`.

    Every epoch is a new order of all examples. A batch that an epoch cannot fill takes the rest
    from the next one, so no example is seen less often than another by more than one. With fewer
    examples than batch_size a batch holds some of them more than once. The first steps of a longer
    plan are the shorter plan.

    Raises ValueError unless num_examples and batch_size are at least 1 and steps is at least 0.
    """
    if num_examples < 1 or batch_size < 1 or steps < 0:
        raise ValueError(
            f"a batch plan needs at least one example and one sequence per step, "
            f"but got {num_examples=}, {batch_size=}, {steps=}"
        )
    generator = random.Random(seed)
    waiting: list[int] = []
    plan: list[tuple[int, ...]] = []
    for _ in range(steps):
        while len(waiting) < batch_size:
            waiting.extend(shuffled(num_examples, generator))
        plan.append(tuple(waiting[:batch_size]))
        del waiting[:batch_size]
    return plan


def micro_batches(indices: Sequence[int], micro_batch_size: int) -> list[tuple[int, ...]]:
    """The indices of one step in order, `micro_batch_size` at a time; the last may be shorter.

    Raises ValueError when micro_batch_size is below 1.
    """
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be at least 1, but got {micro_batch_size=}")
    return [
        tuple(indices[start : start + micro_batch_size])
        for start in range(0, len(indices), micro_batch_size)
    ]
