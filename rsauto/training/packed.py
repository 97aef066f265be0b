"""Several trials in one forward and one backward pass over one frozen base, each as if alone.

Every trial keeps its own data order, learning rate, clipping and step; trials join and leave
between steps. Trials of one seed see the same rows at the same step whenever they run, so that what
a trial gives does not depend on who else is in the pack, but for rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor

from rsauto.adapters.export import export_lora
from rsauto.adapters.lora import remove_adapter
from rsauto.data import Batch, Example, collate
from rsauto.memory.measure import PeakMeter
from rsauto.packing.model import Norms, PackedModel
from rsauto.packing.optimizer import PackedOptimizer
from rsauto.packing.rows import require_rows
from rsauto.packing.tensors import TrialTensors, write
from rsauto.records import TrialSpec
from rsauto.training.evaluate import Evaluation, evaluate_trials, watching
from rsauto.training.loop import Diverged, with_general_loss
from rsauto.training.loss import count_targets_of_trials, cross_entropy_of_trials
from rsauto.training.member import Advance, Member
from rsauto.training.out_of_memory import NO_ROOM, OutOfMemory, told
from rsauto.training.trial import Bench, put_on_adapter

T = TypeVar("T")


class Pack:
    """Trials that are trained together. Use as a context manager; the base is left as it was.

    with Pack(bench, optimizer="adamw", rows=8) as pack:
        pack.admit(spec)
        while pack.members:
            for advance in pack.advance():
                if advance.error or advance.member.is_finished:
                    pack.release(advance.member)
    """

    def __init__(
        self, bench: Bench, *, optimizer: PackedOptimizer, rows: int, tokens: int | None = None
    ) -> None:
        """``rows`` is the micro-batch of every trial, ``tokens`` what it has on average.

        By the latter ranks are put together; None counts those of the first batches.
        """
        self.bench = bench
        self.rows = rows
        self._tokens = tokens
        self.members: list[Member] = []
        """Trials that are trained, in the order in which they came."""
        self.parked: list[Member] = []
        """Trials that the device had no room for any more; they go on where they stopped."""
        self.capacity: int | None = None
        """Most trials at once, learnt from running out of memory; None where that never was."""
        self._model = PackedModel(bench.model, optimizer)
        self._seated: list[Member] = []
        """Members in the order of a batch's rows."""
        self._checked: set[str] = set()
        """Layers that are known to see rows in order."""
        self._meter: PeakMeter | None = None
        self._heaviest = self._largest = 0
        """Tokens of the largest training batch, and of the longest evaluated rows, so far."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._model.unseat()
        except NO_ROOM as error:  # for copies on the host; the base is left as it was all the same
            self._model.clear()
            told(error)

    @property
    def has_room(self) -> bool:
        """Whether another trial may join, as far as running out of memory has taught."""
        return not self.parked and (self.capacity is None or len(self.members) < self.capacity)

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory of the device so far, None before the first full step."""
        return None if self._meter is None else self._meter.peak_bytes

    def admit(self, spec: TrialSpec) -> Member:
        """Takes in a trial, which begins at its own first step.

        Raises OutOfMemory, NotPackableError where the model does not let trials share a batch, and
        ValueError for a trial of another optimizer or batch size.
        """
        self._require_alike(spec)
        spec = replace(spec, micro_batch_size=self.rows)
        with self._model.without_layers():
            try:
                adapted = put_on_adapter(self.bench, spec)
                try:
                    member = Member(self.bench.data, spec, adapted)
                finally:
                    remove_adapter(adapted)
                self._require_rows({key.module for key in member.tensors.values})
            except NO_ROOM as error:
                raise told(error) from None
        self.members.append(member)
        return member

    def release(self, member: Member) -> None:
        """Lets a trial go, finished or not; those that were parked come back in its place."""
        self.members = [other for other in self.members if other is not member]
        self.parked = [other for other in self.parked if other is not member]
        while self.parked and len(self.members) < (self.capacity or math.inf):
            self.members.append(self.parked.pop(0))

    def hold(self, member: Member) -> None:
        """Lets a member stand still, on the host, until it is resumed or released."""
        self.release(member)

    def resume(self, member: Member) -> None:
        """Lets a member that was held go on where it stopped."""
        self.members.append(member)

    def advance(self) -> list[Advance]:
        """One optimizer step of every member, and the evaluations that are due after it.

        Out of memory halves the pack: those that came last are parked as they are. Only a trial
        that is alone is told that it ran out of memory.
        """
        if not self.members:
            return []
        begin = time.perf_counter()
        try:
            losses, norms = self._with_less_until_it_fits(self._step)
        except OutOfMemory as error:
            return [Advance(self.members[0], error=error)]
        seconds = (time.perf_counter() - begin) / len(self._seated)
        sound = [n for n, norm in enumerate(norms) if math.isfinite(norm.total + losses[n])]
        due = [self._seated[n] for n in sound if self._seated[n].evaluates_next]
        found = self._evaluated(due)
        if len(self._model.trials) < len(self._seated):
            self._model.unseat()  # some had to be evaluated apart
        steps = zip(self._seated, losses, norms, strict=True)
        return [self._advanced(*step, seconds, found.get(step[0])) for step in steps]

    def save(self, member: Member, folder: Path, card: str) -> int:
        """Writes the adapter as plain LoRA of scale 1; returns its bytes. Raises OutOfMemory."""
        try:
            return self._saved(member, folder, card)
        except NO_ROOM as error:
            full = told(error)
        if not self._model.trials:
            raise full
        self._model.unseat()  # an adapter of its own may need the room
        return self.save(member, folder, card)

    def _saved(self, member: Member, folder: Path, card: str) -> int:
        now = self._model.snapshot(member.tensors)
        with self._model.without_layers():
            adapted = put_on_adapter(self.bench, member.spec)
            try:
                write(now, adapted)
                name = self.bench.base_name
                return export_lora(adapted, folder, base_name=name, card=card).num_bytes
            finally:
                remove_adapter(adapted)

    # ------------------------------------------------------------------ a step

    def _step(self) -> tuple[list[float], list[Norms]]:
        """Losses and gradient norms of all members, in the order of their rows."""
        self._seat()
        model, members = self._model, self._seated
        with watching(self._meter, self._is_heaviest()):
            losses = self._accumulate_gradients()
            norms = model.gradient_norms()
            model.scale_gradients(
                [_clip(n.total, m.spec.max_grad_norm) for n, m in zip(norms, members, strict=True)]
            )
            model.step(
                [member.rates() for member in members],
                [member.spec.weight_decay for member in members],
                [member.steps_done for member in members],
            )
        return losses, norms

    def _accumulate_gradients(self) -> list[float]:
        """Backward over one global batch of every member; their mean losses."""
        members, device = self._seated, self.bench.device
        parts = zip(*(member.next_batches for member in members), strict=True)
        batches = [self._batch(rows) for rows in parts]
        of_parts = [count_targets_of_trials(batch.labels, len(members)) for batch in batches]
        counts = [sum(counts) for counts in zip(*of_parts, strict=True)]
        num_targets = torch.tensor(counts, dtype=torch.float32, device=device)
        total = torch.zeros(len(members), device=device)
        self._model.zero_gradients()
        if not self._model.base.training:
            self._model.base.train()
        for batch in batches:
            losses = self._losses(batch.to(device)) / num_targets
            total += losses.detach()
            losses.sum().backward()  # trials do not meet in it
        return [float(loss) for loss in total.tolist()]

    def _batch(self, rows_of_each: Sequence[Sequence[int]]) -> Batch:
        """One micro-batch of every member, side by side; rows that several see are padded once."""
        rows = [row for rows in rows_of_each for row in rows]
        places = {row: place for place, row in enumerate(dict.fromkeys(rows))}
        train = self.bench.data.train
        batch = collate([train[row] for row in places], self.bench.data.pad_token_id)
        return batch.rows(torch.tensor([places[row] for row in rows]))

    def _losses(self, batch: Batch) -> Tensor:
        """Summed cross-entropy of every member that takes part."""
        return cross_entropy_of_trials(
            self._logits(batch), batch.labels, self._model.seating.num_trials
        )

    def _logits(self, batch: Batch) -> Tensor:
        self._model.seating.num_rows, self._model.seating.length = batch.input_ids.shape
        logits: Tensor = self._model.base(**batch.inputs()).logits
        return logits

    # ------------------------------------------------------------------ an evaluation

    def _evaluated(self, members: Sequence[Member]) -> dict[Member, Evaluation | OutOfMemory]:
        """Every member's evaluation, in fewer at a time where the device has no room for all."""
        if not members:
            return {}
        try:
            self._choose([member.tensors for member in members])
            return dict(zip(members, self._evaluations(len(members)), strict=True))
        except NO_ROOM as error:
            full = told(error)
        finally:
            self._model.choose(None)
        if len(members) > 1:
            middle = len(members) // 2
            return self._evaluated(members[:middle]) | self._evaluated(members[middle:])
        if len(self._model.trials) > 1:
            self._model.unseat()  # the tensors of the others may be what takes the room
            return self._evaluated(members)
        return {members[0]: full}

    def _choose(self, trials: Sequence[TrialTensors]) -> None:
        """Lets some trials take part in what follows; where they are not seated, only they are."""
        if not {id(t) for t in trials} <= {id(t) for t in self._model.trials}:
            self._model.seat(trials, tokens=1)
        self._model.choose(trials)

    def _evaluations(self, num_trials: int) -> list[Evaluation]:
        """Of the trials that are chosen."""
        data = self.bench.data
        found = self._on(data.validation, num_trials)
        if not data.general:
            return found
        general = [e.eval_loss for e in self._on(data.general, num_trials)]
        return [
            with_general_loss(one, loss, self.bench.untouched_general_loss)
            for one, loss in zip(found, general, strict=True)
        ]

    def _on(self, examples: Sequence[Example], num_trials: int) -> list[Evaluation]:
        self._model.base.eval()
        size = num_trials * max(len(example.input_ids) for example in examples)
        is_heaviest, self._largest = size > self._largest, max(size, self._largest)
        return evaluate_trials(
            self._logits,
            examples,
            num_trials=num_trials,
            batch_size=self.rows,
            pad_token_id=self.bench.data.pad_token_id,
            device=self.bench.device,
            meter=self._meter if is_heaviest else None,
        )

    # ------------------------------------------------------------------ who takes part

    def _require_alike(self, spec: TrialSpec) -> None:
        sizes = {member.spec.batch_size for member in (*self.members, *self.parked)}
        if spec.optimizer != self._model.optimizer:
            raise ValueError(
                f"optimizer: {spec.optimizer!r} in a pack of {self._model.optimizer!r}. Trials of "
                "a pack have one optimizer."
            )
        if sizes - {spec.batch_size}:
            raise ValueError(
                f"batch_size: {spec.batch_size} beside trials of {min(sizes)}. Trials of a pack "
                "have one batch size."
            )

    def _require_rows(self, names: set[str]) -> None:
        unknown = names - self._checked
        if unknown:
            shortest = sorted(self.bench.data.train, key=lambda row: len(row.input_ids))
            batch = collate(shortest[:2] * 2, self.bench.data.pad_token_id)  # there may be one only
            batch = batch.rows(torch.arange(2)).to(self.bench.device)
            require_rows(self.bench.model, unknown, batch.inputs())
            self._checked |= unknown

    def _seat(self) -> None:
        """Seats the members, where others are seated."""
        wanted = [member.tensors for member in self.members]
        if {id(t) for t in wanted} == {id(t) for t in self._model.trials}:
            return  # nobody came or went since the last step
        self._model.seat(wanted, self._tokens or self._first_tokens())
        of_tensors = {id(member.tensors): member for member in self.members}
        self._seated = [of_tensors[id(tensors)] for tensors in self._model.trials]
        for member in self.members:
            member.pack_size = max(member.pack_size, len(self.members))
        if self._meter is None:
            self._meter = PeakMeter(self.bench.device, self.bench.model, None, self._model.tensors)

    def _first_tokens(self) -> int:
        lengths = [member.tokens[0] for member in self.members]
        return max(1, sum(lengths) * self.rows // (len(lengths) * self.members[0].spec.batch_size))

    def _with_less_until_it_fits(self, step: Callable[[], T]) -> T:
        """What ``step`` gives, with half of the members as often as the device has no room."""
        while True:
            try:
                return step()
            except NO_ROOM as error:
                full = told(error)
            if len(self.members) == 1:
                raise full
            self.capacity = len(self.members) // 2
            self.parked = [*self.members[self.capacity :], *self.parked]
            self.members = self.members[: self.capacity]
            self._model.unseat()

    def _advanced(
        self,
        member: Member,
        loss: float,
        norms: Norms,
        seconds: float,
        found: Evaluation | OutOfMemory | None,
    ) -> Advance:
        if isinstance(found, OutOfMemory):
            return Advance(member, error=found)
        try:
            point = member.advance(loss, norms, seconds, found)
        except Diverged as error:
            return Advance(member, error=error)
        if member.spec.allocation is not None:
            member.rank_pattern = self._model.ranks(member.tensors)
            member.set_adapter_weights(self._model.num_adapter_weights(member.tensors))
        return Advance(member, point)

    def _is_heaviest(self) -> bool:
        """Whether the next step is the largest so far, and none of its trials the first."""
        if any(member.steps_done == 0 for member in self._seated):
            return False
        train = self.bench.data.train
        sizes = [
            len(self._seated)
            * self.rows
            * max(len(train[i].input_ids) for rows in part for i in rows)
            for part in zip(*(m.next_batches for m in self._seated), strict=True)
        ]
        heavier = max(sizes) > self._heaviest
        self._heaviest = max(self._heaviest, *sizes)
        return heavier


def _clip(norm: float, max_norm: float | None) -> float:
    """What gradients are multiplied by, as in `clip_gradients`."""
    if max_norm is None or not math.isfinite(norm):
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))
