"""Which trials fit the device together: the planner's prediction of a pack, before it is tried."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from rsauto.memory.product import adapted_shapes, mean_tokens
from rsauto.packing.buckets import stacks
from rsauto.records import TrialSpec
from rsauto.search.setup import Setup, device_bytes, planned


def pack_budget_bytes(setup: Setup) -> int:
    """Bytes that packs may use: a trial's unless more is allowed, never more than there is."""
    budget = setup.config.pack_memory_budget
    asked = setup.memory_budget_bytes
    if budget is not None:
        asked = max(asked, device_bytes(setup.device) if budget == "auto" else budget)
    return min(asked, device_bytes(setup.device))


def pack_rows(setup: Setup, specs: Sequence[TrialSpec]) -> int:
    """The micro-batch of every trial: the largest at which the smallest of them fits alone.

    A pack saves time where a pass has few tokens, so a batch is not cut to have more trials.
    """
    smallest = min(specs, key=lambda spec: spec.rank)
    found = setup.planner.largest_micro_batch(
        smallest.init_rank or smallest.rank,
        memory_budget_bytes=pack_budget_bytes(setup),
        batch_size=smallest.batch_size,
        micro_batch_size=setup.config.training.micro_batch_size,
        **planned(smallest),
    )
    return 1 if found is None else found.micro_batch_size


def pack_size(setup: Setup, specs: Sequence[TrialSpec], rows: int, most: int) -> int:
    """How many of the smallest rank fit together, up to ``most``."""
    cheapest = [min(specs, key=lambda spec: spec.rank)] * most
    return next((n for n in range(most, 1, -1) if fits(setup, cheapest[:n], rows)), 1)


def fits(setup: Setup, specs: Sequence[TrialSpec], rows: int) -> bool:
    """Whether these trials, and no others, fit together."""
    budget = pack_budget_bytes(setup)
    most = setup.config.packing.trials
    return (
        # As many as there may be of each is what has been traced already, and more than enough.
        needed_bytes(setup, specs, rows, max(most, len(specs))) <= budget
        or needed_bytes(setup, specs, rows, len(specs)) <= budget
    )


def needed_bytes(setup: Setup, specs: Sequence[TrialSpec], rows: int, size: int) -> float:
    """What a budget must hold for a pack of ``size`` trials, with ranks in the shares of these.

    The base and its activations depend on the number of trials alone, and everything else is a sum
    over them; so a pack of several ranks needs at most the mean of what packs of each rank alone
    need, where all trials are of that rank: a maximum of sums is never above the sum of maxima.
    """
    ranks = _padded_ranks(setup, specs, rows)
    each = [_of_equals(setup, s, r, rows, size) for s, r in zip(specs, ranks, strict=True)]
    return sum(each) / len(each)


def tokens_of(setup: Setup, batch_size: int, rows: int) -> int:
    """Mean tokens of a trial's micro-batch, by which its stack is chosen, here and in the pack."""
    lengths = [len(example.input_ids) for example in setup.data.train]
    return mean_tokens(lengths, batch_size, rows)


def _padded_ranks(setup: Setup, specs: Sequence[TrialSpec], rows: int) -> list[int]:
    """The rank that each trial has memory for: the largest of its stack."""
    ranks = [spec.init_rank or spec.rank for spec in specs]
    shapes = adapted_shapes(replace(setup.planner.kind, **planned(specs[0])))
    tokens = tokens_of(setup, specs[0].batch_size, rows)
    cut = stacks(ranks, shapes, tokens, setup.device.type)
    largest = {index: max(ranks[n] for n in stack) for stack in cut for index in stack}
    return [largest[index] for index in range(len(ranks))]


def _of_equals(setup: Setup, spec: TrialSpec, rank: int, rows: int, size: int) -> float:
    """A pack of ``size`` such trials. Only powers of two are traced: between two of them the peak,
    a maximum of straight lines in the size, lies below the straight line through both."""
    low = 1 << (size.bit_length() - 1)
    below = _traced(setup, spec, rank, rows, low)
    if low == size:
        return below
    return below + (_traced(setup, spec, rank, rows, 2 * low) - below) * (size - low) / low


def _traced(setup: Setup, spec: TrialSpec, rank: int, rows: int, size: int) -> float:
    prediction = setup.planner.predict(
        rank,
        batch_size=spec.batch_size,
        micro_batch_size=rows,
        **planned(spec) | {"pack_size": size},
    )
    if prediction.estimated:
        return math.inf  # the closed form is for a trial alone
    return float(setup.planner.needed_bytes(prediction))
