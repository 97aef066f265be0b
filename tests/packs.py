"""Trials in a pack, and the same trials one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rsauto.packing.optimizer import PackedOptimizer
from rsauto.packing.stack import Stack
from rsauto.records import StepPoint, TrialSpec
from rsauto.training.loop import Diverged
from rsauto.training.member import Member
from rsauto.training.packed import Pack
from rsauto.training.trial import Bench, OutOfMemory, Trial


class Unmetered:
    """Instead of the profiler, which costs more than these trials do."""

    peak_bytes = None

    def __init__(self, *_: object) -> None:
        pass

    def watch(self, heavy: bool = True) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.fixture
def unmetered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsauto.training.trial.PeakMeter", Unmetered)
    monkeypatch.setattr("rsauto.training.packed.PeakMeter", Unmetered)
    # After every trial alone; there is nothing to free that would be missed.
    monkeypatch.setattr("rsauto.training.trial.gc.collect", lambda: 0)


@dataclass
class Run:
    """What one trial gave."""

    points: list[StepPoint] = field(default_factory=list)
    patterns: list[dict[str, int] | None] = field(default_factory=list)
    """Rank of every module after each step."""
    flops: float = 0.0
    error: Diverged | OutOfMemory | None = None
    member: Member | None = None

    @property
    def numbers(self) -> list[tuple[float, ...]]:
        """Of every step: loss, gradient norm, rate, tokens, and all of an evaluation."""
        found = []
        for p in self.points:
            evaluation = p.evaluation
            of_evaluation: tuple[float, ...] = ()
            if evaluation is not None:
                means = (evaluation.eval_loss, evaluation.train_loss, evaluation.grad_norm)
                of_evaluation = (*means, *evaluation.metrics.values())
            found.append((p.train_loss, p.grad_norm, p.learning_rate, p.tokens, *of_evaluation))
        return found

    @property
    def losses(self) -> list[float]:
        return [p.train_loss for p in self.points]


def alone(bench: Bench, spec: TrialSpec, folder: Path | None = None) -> Run:
    """One trial as `rsauto.training.trial` runs it."""
    run = Run()
    with Trial(bench, spec) as trial:
        try:
            for point in trial.steps():
                run.points.append(point)
                run.patterns.append(trial.rank_pattern)
        except Diverged as error:
            run.error = error
        run.flops = trial.flops
        if folder is not None:
            trial.save(folder, "card")
    return run


def packed(
    bench: Bench,
    specs: Sequence[TrialSpec],
    *,
    rows: int = 8,
    optimizer: PackedOptimizer = "adamw",
    begins: Sequence[int] | None = None,
    leaves: dict[int, int] | None = None,
    save: Callable[[int], Path] | None = None,
    watch: Callable[[Pack], None] | None = None,
) -> list[Run]:
    """Trials in one pack, each admitted at its step of the pack, or all at once.

    ``leaves`` has after which of its steps a trial is released unfinished. ``save`` gives the
    folder of a trial that is finished; ``watch`` is called after every step.
    """
    runs = [Run() for _ in specs]
    admitted: dict[int, int] = {}
    waiting = sorted(range(len(specs)), key=lambda n: 0 if begins is None else begins[n])
    now = 0
    with Pack(bench, optimizer=optimizer, rows=rows) as pack:
        while waiting or pack.members:
            while waiting and (begins is None or begins[waiting[0]] <= now):
                number = waiting.pop(0)
                runs[number].member = member = pack.admit(specs[number])
                admitted[id(member)] = number
            for advance in pack.advance():
                number, member = admitted[id(advance.member)], advance.member
                run = runs[number]
                run.error = advance.error
                if advance.point is not None:
                    run.points.append(advance.point)
                    run.patterns.append(member.rank_pattern)
                run.flops = member.flops
                if save is not None and member.is_finished:
                    pack.save(member, save(number), "card")
                left = (leaves or {}).get(number) == member.steps_done
                if advance.error or member.is_finished or left:
                    pack.release(member)
            if watch is not None:
                watch(pack)
            now += 1
    return runs


def drain(pack: Pack, members: Sequence[Member], runs: Sequence[Run]) -> None:
    """Trains until the pack is empty; the points and the error of each member go to its run."""
    while pack.members:
        for advance in pack.advance():
            run = runs[members.index(advance.member)]
            run.error = advance.error
            if advance.point is not None:
                run.points.append(advance.point)
            if advance.error or advance.member.is_finished:
                pack.release(advance.member)


def assert_equal(found: Run, expected: Run, tolerance: float = 1e-5) -> None:
    """All that a trial reports, its errors and patterns too; losses to an absolute tolerance."""
    assert str(found.error) == str(expected.error)
    assert len(found.points) == len(expected.points)
    assert found.patterns == expected.patterns
    for step, (ours, theirs) in enumerate(zip(found.numbers, expected.numbers, strict=True), 1):
        assert ours == pytest.approx(theirs, abs=tolerance, rel=tolerance), f"step {step}"
    assert found.flops == pytest.approx(expected.flops, rel=1e-9)


def bits(run: Run) -> list[tuple[float, ...]]:
    """To be compared for equality."""
    return run.numbers


def stacks(pack: Pack) -> list[Stack]:
    return pack._model.seating.stacks


def pads(stack: Stack) -> Tensor:
    """All numbers of a stack's buffers that belong to no trial, whatever the field."""
    found = []
    for row, shapes in enumerate(stack.shapes):
        for group in stack.groups.values():
            is_pad = torch.ones(group.width, dtype=torch.bool)
            for key in group.shapes:
                if key not in shapes:
                    continue
                begin = group.begin(key)
                whole = torch.Size(group.shapes[key])
                own = is_pad[begin : begin + whole.numel()].view(whole)
                own[tuple(slice(0, size) for size in shapes[key])] = False
            found += [buffer[row][is_pad].float() for buffer in group.buffers.values()]
    return torch.cat(found)
