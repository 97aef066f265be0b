"""The real peak memory of a trial. Shares no code with the prediction it is compared to.

CUDA's allocator keeps its own high-water mark. The CPU's keeps none, so there the heaviest steps
run under torch.profiler, which reports every allocation and free of the CPU allocator.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType, _ExtraFields_Allocation
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile


class PeakMeter:
    """Measures one trial, from its construction on. `optimizer` is the one that trains `model`.

    `kept` gives what else is kept from step to step, such as AdaLoRA's importance, or all that a
    pack of trials keeps, which has no optimizer.
    """

    def __init__(
        self,
        device: torch.device,
        model: nn.Module,
        optimizer: Optimizer | None,
        kept: Callable[[], Iterator[Tensor]] | None = None,
    ) -> None:
        self._device = device
        self._kept = kept
        self._model = model
        self._optimizer = optimizer
        self._peak_bytes: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def peak_bytes(self) -> int | None:
        """Highest number of bytes in use so far; None if nothing was watched on a CPU.

        On a CPU: the tensors of model, gradients and optimizer, and what the watched steps
        allocated on top; not what the rest of the process holds.
        """
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return self._peak_bytes

    @contextmanager
    def watch(self, heavy: bool = True) -> Iterator[None]:
        """Around an optimizer step or an evaluation; costs time on a CPU, so only if `heavy`.

        Heavy are the optimizer step with the longest micro-batch, but not the first step, which
        begins without optimizer states, and the longest evaluation batch.
        """
        if not heavy or self._device.type != "cpu":
            yield
            return
        # Kineto announces every start and stop on stderr unless told otherwise.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        residents = _Residents(self._tensors())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield
        peak = residents.num_bytes + _highest(residents.close() + _window_changes(profiler))
        self._peak_bytes = max(self._peak_bytes or 0, peak)

    def _tensors(self) -> Iterator[Tensor]:
        for parameter in self._model.parameters():
            # Of a sharded one only this process's part is here.
            yield getattr(parameter, "_local_tensor", parameter)
            if parameter.grad is not None:
                yield parameter.grad
        yield from self._model.buffers()
        yield from _quantisation_scales(self._model)
        states = {} if self._optimizer is None else self._optimizer.state
        for value in chain.from_iterable(s.values() for s in states.values()):
            if isinstance(value, Tensor):
                yield value
        if self._kept is not None:
            yield from self._kept()


def _quantisation_scales(model: nn.Module) -> Iterator[Tensor]:
    """What bitsandbytes keeps beside the weights, neither as parameters nor as buffers."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        for holder in (weight, getattr(module, "state", None)):
            scales = getattr(holder, "SCB", None)  # of 8 bit; moved at the first forward pass
            if isinstance(scales, Tensor):
                yield scales
        state = getattr(weight, "quant_state", None)  # of 4 bit; state2: the scales' own
        for part in (state, getattr(state, "state2", None)):
            yield from (v for v in getattr(part, "__dict__", {}).values() if isinstance(v, Tensor))


class _Change(NamedTuple):
    """Memory in use changes by `num_bytes`."""

    time_ns: int
    """Since 1970."""
    num_bytes: int


class _Residents:
    """Storages that are there when a window opens, each counted once, and when they are freed.

    The profiler is silent about frees of memory that was allocated before it started.
    """

    def __init__(self, tensors: Iterator[Tensor]) -> None:
        self.num_bytes = 0
        self._frees: list[_Change] = []
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in tensors:
            self._add(tensor.untyped_storage())

    def close(self) -> list[_Change]:
        """Stops watching; the frees so far."""
        self._watched.clear()
        return self._frees

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, num_bytes = storage.data_ptr(), storage.nbytes()
        if address in self._watched:
            return

        def freed(_: object) -> None:
            self._frees.append(_Change(time.time_ns(), -num_bytes))

        self._watched[address] = weakref.ref(storage, freed)
        self.num_bytes += num_bytes


def _window_changes(profiler: profile) -> list[_Change]:
    """Allocations on the CPU while the profiler ran, and their frees.

    Frees of addresses that were not allocated in the window are left out: the profiler may still
    know them from an earlier window, with a size that is no longer theirs.
    """
    changes: list[_Change] = []
    sizes: dict[int, int] = {}
    for start_ns, allocation in sorted(_allocations(profiler), key=lambda pair: pair[0]):
        if allocation.alloc_size > 0:
            sizes[allocation.ptr] = allocation.alloc_size
            changes.append(_Change(start_ns, allocation.alloc_size))
        elif allocation.ptr in sizes:
            changes.append(_Change(start_ns, -sizes.pop(allocation.ptr)))
    return changes


def _allocations(profiler: profile) -> Iterator[tuple[int, _ExtraFields_Allocation]]:
    """(time in ns since 1970, allocation or free) on the CPU, in no particular order."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            assert isinstance(fields, _ExtraFields_Allocation)
            if fields.device.type == "cpu":
                yield event.start_time_ns, fields


def _highest(changes: list[_Change]) -> int:
    """Highest running sum of the changes in the order of time, at least 0."""
    in_use = highest = 0
    for change in sorted(changes, key=lambda change: change.time_ns):
        in_use += change.num_bytes
        highest = max(highest, in_use)
    return highest
