"""What the meter sees, and what the model of CUDA's caching allocator reserves."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from rsauto.memory.allocator import reserved_bytes
from rsauto.memory.measure import PeakMeter

CPU = torch.device("cpu")


def test_meter_sees_frees_of_older_memory() -> None:
    model = nn.Linear(1000, 1000, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.weight.grad = torch.zeros(1000, 1000)
    meter = PeakMeter(CPU, model, optimizer)
    assert meter.peak_bytes is None
    with meter.watch(heavy=False):
        torch.empty(10**7)
    assert meter.peak_bytes is None
    with meter.watch():
        optimizer.zero_grad()
        scratch = torch.empty(1_250_000)
    # Weight and old gradient, 4 MB each, or weight and scratch, 5 MB, but never all three.
    assert meter.peak_bytes == 9_000_000
    del scratch


def test_watching_leaves_nothing_behind() -> None:
    model = nn.Linear(100, 100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    meter = PeakMeter(CPU, model, optimizer)
    peaks = set()
    for _ in range(20):
        optimizer.zero_grad()
        with meter.watch():
            model(torch.ones(10, 100)).sum().backward()
        peaks.add(meter.peak_bytes)
    assert len(peaks) == 1
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is torch.profiler.profile]


@pytest.mark.parametrize(
    "changes, reserved",
    [
        ([(0, 512)], 2),
        ([(0, 2**20), (1, 2**20), (2, 512)], 4),
        ([(0, 2 * 2**20)], 20),
        ([(0, 11 * 2**20 + 512)], 12),
        # Freed neighbours merge, so that the third request reuses the segment.
        ([(0, 9 * 2**20), (1, 9 * 2**20), (0, -9 * 2**20), (1, -9 * 2**20), (2, 20 * 2**20)], 20),
        # A hole between two live blocks is too small for the fourth request.
        ([(0, 6 * 2**20), (1, 6 * 2**20), (2, 6 * 2**20), (1, -6 * 2**20), (3, 9 * 2**20)], 40),
    ],
)
def test_reserved_memory_follows_the_caching_allocator(
    changes: list[tuple[int, int]], reserved: int
) -> None:
    """Worked out by hand from c10/cuda/CUDACachingAllocator, in MiB."""
    assert reserved_bytes(changes) == reserved * 2**20
