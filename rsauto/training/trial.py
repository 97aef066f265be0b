"""One trial from beginning to end: adapter on, train, measure, save, adapter off.

The base model is loaded once and shared by all trials of a process; an adapter is put on it for
the length of one trial and taken off again, also when the trial fails.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from transformers import PreTrainedModel

from rsauto.adapters.adalora import add_adalora, allocator_of
from rsauto.adapters.export import export_lora
from rsauto.adapters.head import initialise_head
from rsauto.adapters.lora import add_adapter, remove_adapter, trainable_parameters
from rsauto.adapters.optimizers import build_optimizer
from rsauto.data import Example, TokenisedData
from rsauto.errors import InputError
from rsauto.memory.measure import PeakMeter
from rsauto.records import ActivationMoments, EvalPoint, StepPoint, TrialSpec
from rsauto.training.checkpoints import Progress, Snapshot, restore, restore_moments, snapshot
from rsauto.training.evaluate import Evaluation, evaluate
from rsauto.training.flops import training_flops
from rsauto.training.log import Log
from rsauto.training.loop import Done, evaluate_all, train
from rsauto.training.moments import activation_moments
from rsauto.training.out_of_memory import NO_ROOM, told
from rsauto.training.out_of_memory import OutOfMemory as OutOfMemory
from rsauto.training.out_of_memory import is_out_of_memory as is_out_of_memory
from rsauto.training.spread import ALONE, Spread


@dataclass(frozen=True)
class Bench:
    """What every trial of a process shares."""

    model: PreTrainedModel
    """Frozen, on its device, without an adapter."""
    base_name: str
    data: TokenisedData
    device: torch.device
    fresh_parameters: tuple[str, ...] = ()
    """Of a classifier's head: not in the checkpoint, drawn anew by every trial from its seed."""
    untouched_general_loss: float | None = None
    """The model's loss on `data.general` as it is."""
    spread: Spread = ALONE
    """The processes that train every trial together."""


class Trial:
    """A trial being run. Use as a context manager; the adapter is removed at the end.

    with Trial(bench, spec) as trial:
        for point in trial.steps():
            ...
        trial.save(folder, card)
    """

    def __init__(self, bench: Bench, spec: TrialSpec, begun: Snapshot | None = None) -> None:
        """``begun`` is how far an earlier process came with the very same trial, which alone goes
        on from there."""
        before = Progress() if begun is None else begun.progress
        self.bench = bench
        self.spec = spec
        self.started_at = before.started_at or datetime.now(UTC).isoformat(timespec="seconds")
        self.curve: list[EvalPoint] = list(before.curve)
        self.log = Log(spec.logging_steps, before.log, before.since_log)
        self.moments: list[ActivationMoments] = list(before.moments)
        self.last: StepPoint | None = before.last
        self.train_seconds = before.train_seconds
        """Wall time in optimizer steps, evaluation and the caller's own time excluded."""
        self.flops = before.flops
        """Floating-point operations of the steps done so far, see `training_flops`."""
        self._begun = begun
        self._peak_before = before.measured_peak_bytes
        self._since_evaluation: list[StepPoint] = list(before.since_evaluation)
        self._adapted: PeftModel | None = None
        self._meter: PeakMeter | None = None
        self._highest_peak: int | None = None
        """Peak memory of the fullest device, as of the last evaluation."""
        self._is_awaited = False
        """Whether the other processes wait to hear whether the trial goes on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_awaited:
            self.bench.spread.goes_on(False)
        if self._adapted is not None:
            remove_adapter(self._adapted)
            self._adapted = None
        gc.collect()
        clear_device_cache()

    def steps(self) -> Iterator[StepPoint]:
        """Trains, yielding after every optimizer step. Raises Diverged and OutOfMemory.

        Where the trial is spread, the other processes are told of it and do the same steps.
        """
        spread = self.bench.spread
        try:
            spread.tell(self.spec)
            spread.together(self._prepare)
            for point in self._counted():
                self._since_evaluation.append(point)
                self.log.add(point)
                if point.evaluation is not None:
                    self.curve.append(point.evaluation)
                    self._measure_moments(point.step)
                    self._since_evaluation = []
                    self._compare_peaks()
                self._is_awaited = True
                yield point
                self._is_awaited = False
                if not spread.goes_on(True):
                    return
        except NO_ROOM as error:
            raise told(error) from None

    def _prepare(self) -> None:
        """Puts the adapter on and builds what trains it."""
        adapted = self._put_on_adapter()
        if self._begun is not None:
            restore(adapted, self._begun)
        self._optimizer = build_optimizer(
            adapted,
            name=self.spec.optimizer,
            learning_rate=self.spec.learning_rate,
            lr_ratio=self.spec.lr_ratio,
            weight_decay=self.spec.weight_decay,
            head_learning_rate=self.spec.head_learning_rate,
            lambda_lr_ratio=self.spec.lambda_lr_ratio,
        )
        if self._begun is not None:
            restore_moments(adapted, self._optimizer, self._begun)
        allocator = allocator_of(adapted) if self.spec.allocation is not None else None
        if allocator is not None:
            allocator.has_buckets = False
        kept = allocator.tensors if allocator is not None else None
        self._meter = PeakMeter(self.bench.device, adapted, self._optimizer, kept)
        self._allocator = allocator

    def _counted(self) -> Iterator[StepPoint]:
        """The steps, with what they cost."""
        assert self._adapted is not None
        points = train(
            self._adapted,
            self._optimizer,
            self.bench.data,
            self.spec,
            device=self.bench.device,
            meter=self._meter,
            untouched_general_loss=self.bench.untouched_general_loss,
            allocate=self._allocate,
            spread=self.bench.spread,
            done=Done(
                steps=0 if self.last is None else self.last.step,
                losses=tuple(point.train_loss for point in self._since_evaluation),
                norms=tuple(point.grad_norm for point in self._since_evaluation),
            ),
        )
        flops_per_token = training_flops(self._adapted, 1)
        shrinks = self.spec.allocation is not None and self.spec.allocation.recovery == "none"
        for point in points:
            self.flops += flops_per_token * (point.tokens - self._num_tokens)
            if shrinks:
                flops_per_token = training_flops(self._adapted, 1)
            self.last = point
            self.train_seconds += point.seconds
            yield point

    def _allocate(self, step: int) -> None:
        if self._allocator is not None:
            self._allocator.update_and_allocate(step, self._optimizer)

    def _measure_moments(self, step: int) -> None:
        """On the first of the validation rows, as many as a step trains on, one at a time: their
        backward pass then needs no more than that of a step."""
        if not self.spec.activation_moments:
            return
        assert self._adapted is not None
        data = self.bench.data
        found = activation_moments(
            self._adapted,
            data.validation[: self.spec.batch_size],
            step=step,
            batch_size=1,
            pad_token_id=data.pad_token_id,
            device=self.bench.device,
        )
        self.moments.append(found)

    def _compare_peaks(self) -> None:
        if self.bench.spread.size > 1:
            peaks = self.bench.spread.together(self._own_peak_bytes)
            self._highest_peak = max((p for p in peaks if p is not None), default=None)

    def _own_peak_bytes(self) -> int | None:
        own = self._meter.peak_bytes if self._meter is not None else None
        known = [peak for peak in (own, self._peak_before) if peak is not None]
        return max(known, default=None)

    def snapshot(self) -> Snapshot:
        """The trial as it is between two steps, from which another process can go on."""
        assert self._adapted is not None, "a trial is kept while it is open"
        progress = Progress(
            started_at=self.started_at,
            last=self.last,
            since_evaluation=tuple(self._since_evaluation),
            curve=tuple(self.curve),
            log=tuple(self.log.points),
            since_log=tuple(self.log.since),
            moments=tuple(self.moments),
            train_seconds=self.train_seconds,
            flops=self.flops,
            measured_peak_bytes=self.measured_peak_bytes,
        )
        return snapshot(self._adapted, self._optimizer, progress)

    def evaluate(self, examples: Sequence[Example], batch_size: int) -> Evaluation:
        """Of rows that the trial has no part in. Raises OutOfMemory."""
        assert self._adapted is not None, "a trial is evaluated while it is open"
        pad, device = self.bench.data.pad_token_id, self.bench.device
        try:
            return evaluate(
                self._adapted, examples, batch_size=batch_size, pad_token_id=pad, device=device
            )
        except NO_ROOM as error:
            raise told(error) from None

    def save(self, folder: Path, card: str) -> int:
        """Writes the adapter as plain LoRA of scale 1; returns its bytes. Raises OutOfMemory."""
        assert self._adapted is not None, "a trial is saved while it is open, after training"
        base_name = self.bench.base_name
        try:
            return export_lora(self._adapted, folder, base_name=base_name, card=card).num_bytes
        except NO_ROOM as error:
            raise told(error) from None

    @property
    def measured_peak_bytes(self) -> int | None:
        """Peak memory of the device so far, None before the first full step.

        Of several devices that of the fullest, as of the last evaluation.
        """
        if self.bench.spread.size > 1:
            return self._highest_peak
        return self._own_peak_bytes()

    @property
    def num_trainable_params(self) -> int | None:
        if self._adapted is None:
            return None
        return sum(p.numel() for p in trainable_parameters(self._adapted).values())

    @property
    def rank_pattern(self) -> dict[str, int] | None:
        """Rank of each module as it is now, None where all have the same by design."""
        if self.spec.rank_pattern is not None:
            return dict(self.spec.rank_pattern)
        if self._adapted is None or self.spec.allocation is None:
            return None
        return allocator_of(self._adapted).rank_pattern

    @property
    def _num_tokens(self) -> int:
        return 0 if self.last is None else self.last.tokens

    def _put_on_adapter(self) -> PeftModel:
        self._adapted = put_on_adapter(self.bench, self.spec)
        self._adapted.to(self.bench.device)
        return self._adapted


def put_on_adapter(bench: Bench, spec: TrialSpec) -> PeftModel:
    """The bench's model with the spec's adapter as training begins, drawn from the spec's seed."""
    torch.manual_seed(spec.seed)
    initialise_head(bench.model, bench.fresh_parameters)
    add = add_adapter if spec.allocation is None else add_adalora
    return add(bench.model, spec)


@dataclass(frozen=True, slots=True)
class Untouched:
    """What the other processes are told to do in `untouched`."""

    batch_size: int
    seed: int


def untouched(bench: Bench, batch_size: int, seed: int = 0) -> Evaluation:
    """The base model as it is, evaluated; what its head lacks is drawn from the seed.

    Raises InputError where it refuses the data.
    """
    bench.spread.tell(Untouched(batch_size, seed))
    torch.manual_seed(seed)
    initialise_head(bench.model, bench.fresh_parameters)
    try:
        return evaluate_all(
            bench.model, bench.data, batch_size=batch_size, device=bench.device, spread=bench.spread
        )
    except ValueError as error:
        raise InputError(
            f"model.name: {type(bench.model).__name__} cannot run on the data as they are "
            f"tokenised: {error} Choose another architecture, or a tokenizer that suits it."
        ) from error
