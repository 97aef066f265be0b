"""Which trials are padded to one rank together: few large products, or less padding.

Every stack has operations of its own in every layer, and every operation has a cost that does not
depend on its size; every trial computes as if it had the largest rank of its stack.
"""

from __future__ import annotations

from collections.abc import Sequence

from rsauto.adapters.low_rank import num_operations

OPERATIONS_PER_LAYER = 10
"""Of a stack, forward and backward, and what cuts batches for it."""

OVERHEAD_FLOPS = {"cpu": 8e5, "cuda": 1.6e8, "mps": 1.6e8}
"""Floating-point operations in the time that one takes whatever its size: about 8 microseconds, at
100 GFLOP/s of a CPU, and at 20 TFLOP/s on a GPU's small products.

Measured on one core of a CPU: equal ranks in 2, 4 and 8 stacks instead of one cost 55 to 114
microseconds for every further stack and layer, with Python, autograd, norms and optimizer. Those
of a GPU are no measurements."""

STEP_TOKENS = 40
"""Tokens whose products cost as much as a step does beside them: zeroing, norms, clipping and AdamW
take about 3 nanoseconds for every number of A and B, which is 240 operations at 80 GFLOP/s, and a
token takes 6. Measured on one core by what padding from 16 to 64 costs at 16 and at 64 tokens."""


def stacks(
    ranks: Sequence[int], shapes: Sequence[tuple[int, int]], tokens: int, device_type: str
) -> list[list[int]]:
    """`buckets` for trials that adapt layers of ``shapes``, (d_in, d_out), each with ``tokens``.

    What is planned and what is trained must be cut alike, or a pack would need more than predicted.
    """
    passed = tokens + STEP_TOKENS
    return buckets(
        ranks,
        flops_per_rank=sum(num_operations("factors", passed, *shape, rank=1) for shape in shapes),
        num_layers=len(shapes),
        device_type=device_type,
    )


def buckets(
    ranks: Sequence[int], *, flops_per_rank: float, num_layers: int, device_type: str
) -> list[list[int]]:
    """Indices of the trials of every stack, so that the step costs least; smallest ranks first.

    ``ranks`` are those of the trials, ``flops_per_rank`` what one rank of one trial costs in all
    layers together, its step included, see `STEP_TOKENS`. Neighbours in rank belong together, so
    the best cut is found exactly, by dynamic programming.
    """
    order = sorted(range(len(ranks)), key=lambda index: ranks[index])
    overhead = OVERHEAD_FLOPS.get(device_type, OVERHEAD_FLOPS["cuda"])
    start = overhead * OPERATIONS_PER_LAYER * num_layers
    best: list[tuple[float, list[list[int]]]] = [(0.0, [])]
    for end in range(1, len(order) + 1):
        padded = ranks[order[end - 1]]
        choices = [
            (cost + start + (end - begin) * padded * flops_per_rank, [*cuts, order[begin:end]])
            for begin, (cost, cuts) in enumerate(best)
        ]
        best.append(min(choices, key=lambda choice: choice[0]))
    return best[-1][1]
