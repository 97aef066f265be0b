"""A frozen base model that trains several trials at once.

Trials are seated in stacks, by rank; whoever joins or leaves, all are seated anew. Between times
their tensors are on the host, so that a device without room loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rsauto.adapters.optimizers import GROUP_NAMES, GroupName
from rsauto.packing.allocation import StackAllocation, importance_fields, way_of
from rsauto.packing.buckets import stacks
from rsauto.packing.layers import PackedHead, PackedLinear, Seating
from rsauto.packing.optimizer import STATES, PackedOptimizer, step
from rsauto.packing.stack import Stack, at_least_float32
from rsauto.packing.tensors import TrialTensors, group_of, num_weights


class Norms(NamedTuple):
    """Of one trial's gradients."""

    mean: float
    """Frobenius norm of a tensor, mean over all."""
    total: float
    """Global L2 norm."""


class PackedModel:
    """The base with the trials that are seated."""

    def __init__(self, base: PreTrainedModel, optimizer: PackedOptimizer) -> None:
        """``base`` is frozen and on its device; it is left as it was after `unseat`."""
        self.base = base
        self.optimizer = optimizer
        self.device = next(base.parameters()).device
        self.seating = Seating()
        self.tables: list[list[TrialTensors]] = []
        """The trials of every stack, in the order of their rows."""
        self._allocations: list[StackAllocation | None] = []
        self._replaced: dict[str, nn.Module] = {}

    @property
    def trials(self) -> list[TrialTensors]:
        """Those that are seated, in the order of a batch's rows."""
        return [trial for table in self.tables for trial in table]

    def seat(self, trials: Sequence[TrialTensors], tokens: int) -> None:
        """Seats ``trials`` and nobody else; each brings about ``tokens`` tokens to a batch.

        Should the device have no room, nobody is seated and nothing is lost.
        """
        self.unseat()
        tables = self._tables(trials, tokens)
        try:
            for table in tables:
                stack = Stack(table, self._fields(table[0]), self.device)
                self.seating.stacks.append(stack)
                allocates = table[0].config is not None
                self._allocations.append(StackAllocation(stack, table) if allocates else None)
        except BaseException:
            self.clear()
            raise
        self.tables = tables
        for trial in self.trials:
            trial.fields = {}
        self.seating.seat()
        self._put_on()

    def unseat(self) -> None:
        """Gives every trial its tensors back, and the base its layers."""
        for trial in self.trials:
            now = self.snapshot(trial)
            trial.fields, trial.gamma = now.fields, now.gamma
            trial.alive, trial.active = now.alive, now.active
            trial.ranks, trial.num_alive = now.ranks, now.num_alive
        self.clear()

    def clear(self) -> None:
        """Gives the base its layers; what the trials have learnt while seated is lost.

        Needs no memory, so that a base without room for copies is still left as it was.
        """
        self._take_off()
        self.tables, self._allocations = [], []
        self.seating.stacks = []

    def snapshot(self, trial: TrialTensors) -> TrialTensors:
        """A trial's tensors as they are now, on the host."""
        seat = self._seat_of(trial)
        if seat is None:
            return trial
        index, row = seat
        stack, allocation = self.seating.stacks[index], self._allocations[index]
        now = TrialTensors(stack.row(row), stack.gamma[row], trial.config)
        if allocation is not None:
            now.alive, now.active = allocation.masks(row)
            now.ranks, now.num_alive = allocation.ranks[row], allocation.num_alive[row]
        return now

    @contextmanager
    def without_layers(self) -> Iterator[PreTrainedModel]:
        """The base as it was, for as long as an adapter is put on it."""
        was_on = bool(self._replaced)
        self._take_off()
        try:
            yield self.base
        finally:
            if was_on:
                self._put_on()

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is kept of the trials that are seated."""
        for stack in self.seating.stacks:
            for group in stack.groups.values():
                yield from group.buffers.values()

    # ------------------------------------------------------------------ a step

    def zero_gradients(self) -> None:
        for stack in self.seating.stacks:
            stack.zero_gradients()

    def gradient_norms(self) -> list[Norms]:
        """Of every trial, in the order of its rows."""
        found = []
        for index, stack in enumerate(self.seating.stacks):
            norms = torch.cat([g.gradient_norms() for g in stack.groups.values()], dim=1)
            counts = [self._num_tensors(index, row) for row in range(stack.size)]
            mean = norms.sum(dim=1) / torch.tensor(counts, device=norms.device)
            found.append(torch.stack([mean, torch.linalg.vector_norm(norms, dim=1)], dim=1))
        together = torch.cat(found) if len(found) > 1 else found[0]
        return [Norms(mean, total) for mean, total in together.tolist()]  # one transfer

    @torch.no_grad()
    def scale_gradients(self, factors: Sequence[float]) -> None:
        """Multiplies every trial's gradients by a factor of its own."""
        if all(factor == 1.0 for factor in factors):
            return
        begin = 0
        for stack in self.seating.stacks:
            own = factors[begin : begin + stack.size]
            begin += stack.size
            for group in stack.groups.values():
                wide = at_least_float32(group.gradients.dtype)
                group.gradients.mul_(torch.tensor(own, dtype=wide, device=self.device).view(-1, 1))

    def step(
        self,
        rates: Sequence[Mapping[GroupName, float]],
        weight_decay: Sequence[float],
        steps_done: Sequence[int],
    ) -> None:
        """One optimizer step of every trial; then AdaLoRA places its rank."""
        for placing in filter(None, self._allocations):
            placing.add_orthogonality()  # needs memory, so before anything is changed
        steps = [done + 1 for done in steps_done]
        counts = torch.tensor(steps, dtype=torch.float32, device=self.device)
        begin = 0
        with _made_once():
            for stack, allocation in zip(self.seating.stacks, self._allocations, strict=True):
                rows = slice(begin, begin + stack.size)
                begin += stack.size
                step(
                    stack,
                    self.optimizer,
                    rates=rates[rows],
                    weight_decay=weight_decay[rows],
                    counts=counts[rows],
                )
                if allocation is not None:
                    allocation.after_step(steps[rows])

    def choose(self, trials: Sequence[TrialTensors] | None) -> None:
        """Lets only some trials take part in what follows, or all again."""
        if trials is None:
            self.seating.seat()
            return
        chosen = {id(trial) for trial in trials}
        self.seating.seat(
            [[row for row, t in enumerate(table) if id(t) in chosen] for table in self.tables]
        )

    # ------------------------------------------------------------------ about one trial

    def ranks(self, trial: TrialTensors) -> dict[str, int]:
        """AdaLoRA: active triplets of every adapted layer as it is now."""
        seat = self._seat_of(trial)
        if seat is None:
            return trial.ranks
        allocation = self._allocations[seat[0]]
        return {} if allocation is None else dict(allocation.ranks[seat[1]])

    def num_adapter_weights(self, trial: TrialTensors) -> int:
        """Numbers in A and B of all layers, without those of triplets that are gone for good."""
        seat = self._seat_of(trial)
        if seat is None:
            return trial.num_adapter_weights
        index, row = seat
        allocation = self._allocations[index]
        num_alive = {} if allocation is None else allocation.num_alive[row]
        return num_weights(self.seating.stacks[index].shapes[row], num_alive)

    # ------------------------------------------------------------------ inside

    def _tables(self, trials: Sequence[TrialTensors], tokens: int) -> list[list[TrialTensors]]:
        """Trials by stack. Those of one stack are of one kind."""
        kinds = [_kind(trial) for trial in trials]
        found = []
        for kind in dict.fromkeys(kinds):
            same = [trial for trial, own in zip(trials, kinds, strict=True) if own == kind]
            shapes = [self._shape(name) for name in dict.fromkeys(n for t in same for n in t.gamma)]
            cut = stacks([_rank(trial) for trial in same], shapes, tokens, self.device.type)
            found += [[same[index] for index in table] for table in cut]
        return found

    def _fields(self, trial: TrialTensors) -> dict[str, tuple[GroupName, ...]]:
        fields = dict.fromkeys(STATES[self.optimizer], GROUP_NAMES)
        if trial.config is not None:
            fields |= importance_fields(trial.config)
        return fields

    def _shape(self, name: str) -> tuple[int, int]:
        """(d_in, d_out) of a layer that is not replaced at the moment."""
        layer = self.base.get_submodule(name)
        return PackedLinear(layer, name, self.seating).shape

    def _put_on(self) -> None:
        adapted = dict.fromkeys(n for stack in self.seating.stacks for n in stack.modules)
        heads = dict.fromkeys(
            key.module
            for stack in self.seating.stacks
            for key in (stack.groups["head"].shapes if "head" in stack.groups else ())
        )
        for name in (*adapted, *heads):
            layer = self.base.get_submodule(name)
            self._replaced[name] = layer
            packed = PackedLinear if name in adapted else PackedHead
            self.base.set_submodule(name, packed(layer, name, self.seating))

    def _take_off(self) -> None:
        for name, layer in self._replaced.items():
            self.base.set_submodule(name, layer)
        self._replaced = {}

    def _seat_of(self, trial: TrialTensors) -> tuple[int, int] | None:
        """Stack and row, None where the trial is not seated."""
        for index, table in enumerate(self.tables):
            for row, other in enumerate(table):
                if other is trial:
                    return index, row
        return None

    def _num_tensors(self, index: int, row: int) -> int:
        stack, allocation = self.seating.stacks[index], self._allocations[index]
        if allocation is None:
            return len(stack.shapes[row])
        heads = sum(group_of(key) == "head" for key in stack.shapes[row])
        return heads + allocation.num_tensors(row)


def _kind(trial: TrialTensors) -> tuple[object, ...]:
    """What trials must have in common to lie in one buffer and be stepped alike.

    Those that adapt other layers would have room for both in it.
    """
    dtype = next(tensor.dtype for key, tensor in trial.values.items() if key.name == "A")
    return dtype, frozenset(trial.gamma), None if trial.config is None else way_of(trial.config)


def _rank(trial: TrialTensors) -> int:
    return max(len(tensor) for key, tensor in trial.values.items() if key.name == "A")


@contextmanager
def _made_once() -> Iterator[None]:
    """Around what changes the trials: where it fails in the middle it must not be tried again."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise RuntimeError(f"a step was made in part ({type(error).__name__})") from None
