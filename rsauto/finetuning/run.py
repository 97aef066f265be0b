"""The training of a chosen point, from the study's model and data to the finished adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rsauto.data.held_out import HeldOut, held_out
from rsauto.errors import AllTrialsFailedError, BudgetError, InputError, StudyInterrupted
from rsauto.finetuning.out_folder import OutFolder
from rsauto.finetuning.request import Job
from rsauto.memory.kinds import Prediction
from rsauto.records import StepPoint, TrialRecord, TrialSpec
from rsauto.search.bench import load_bench
from rsauto.search.events import Stage, TrialStarted, TrialStep
from rsauto.search.folder import StudyFolder
from rsauto.search.identity import fingerprints_of
from rsauto.search.setup import Setup, planned, set_up_unrestricted
from rsauto.search.write_up import trial_card, trial_record
from rsauto.stop import StopFlag
from rsauto.training.checkpoints import (
    OtherAdapterError,
    Snapshot,
    checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from rsauto.training.evaluate import Evaluation
from rsauto.training.loop import Diverged
from rsauto.training.trial import Bench, OutOfMemory, Trial, untouched
from rsauto.units import bytes_text, value_text

CHECKPOINTS_OF_A_RUN = 10
"""Where no distance between them was asked for."""

SAME_LOSS = 5e-3
"""Relative difference of an untouched model's loss that other kernels and precisions can make."""


@dataclass(frozen=True)
class Ready:
    """Everything is read and planned; what comes next takes time."""

    spec: TrialSpec
    prediction: Prediction
    memory_budget_bytes: int
    test_source: str
    save_every: int
    steps_done: int
    """Of an earlier run that is continued."""
    training_id: str
    """The same for every run of one training."""


@dataclass(frozen=True)
class Remark:
    """Something to know about the run."""

    text: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written."""

    step: int


@dataclass(frozen=True)
class Finished:
    """The adapter is there; ``values`` are those of record.json."""

    values: dict[str, Any]
    was_finished: bool = False
    """By an earlier run."""


Event = Stage | Ready | Remark | TrialStarted | TrialStep | Saved | Finished


def training_events(job: Job, stop: StopFlag | None = None) -> Iterator[Event]:
    """Trains what the job says, or goes on with it.

    Raises InputError or BudgetError before anything is trained, StudyInterrupted where the same
    call continues, AllTrialsFailedError where the loss was no number any more.
    """
    folder = OutFolder(job.out)
    folder.check(job)
    if folder.is_finished:
        yield Finished(folder.finished(), was_finished=True)
        return
    yield Stage("reading model and data")
    setup = set_up_unrestricted(job.config)
    yield from _checked_fingerprints(job, fingerprints_of(setup))
    test = held_out(
        job.config.data,
        setup.source.tokenizer,
        has_token_types=setup.data.train[0].token_type_ids is not None,
    )
    with StudyFolder(job.out).locked("training"):
        if folder.is_finished:  # by another process, while this one read model and data
            yield Finished(folder.finished(), was_finished=True)
            return
        yield from _Run(job, folder, setup, test, stop or StopFlag()).events()


def _checked_fingerprints(job: Job, now: dict[str, str]) -> Iterator[Remark]:
    """Raises InputError for another model or other data than the study's."""
    before = job.study.environment.get("fingerprints")
    if not before:
        yield Remark(
            "the study does not say which model and data it was made with, so that they are the "
            "same cannot be checked"
        )
        return
    changed = _changed(before, now)
    if changed:
        raise InputError(
            f"{job.study.folder}: the {changed} changed since the study was made, so what it found "
            "need not hold. Put the same files back, set data.revision in its study.yaml, or run "
            "the study again."
        )


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which of the data differ, in words.

    A model whose files differ, such as one that was saved again, may still be the same: it is
    compared by what it does, see `checked_model`.
    """
    names = [name for name in now if name != "model"]
    return " and the ".join(name for name in names if before.get(name) != now[name])


def checked_model(job: Job, setup: Setup, bench: Bench, batch_size: int) -> Iterator[Remark]:
    """Raises InputError where the untouched model does not do what the study's did."""
    study = job.study.environment
    before = setup.source.in_todays_form(study.get("fingerprints", {})).get("model")
    if before in (None, setup.source.fingerprint):
        return
    expected = (study.get("baseline") or {}).get("eval_loss")
    found = untouched(bench, batch_size, job.config.training.seed).eval_loss
    if expected is None or not math.isclose(found, expected, rel_tol=SAME_LOSS):
        raise InputError(
            f"{job.study.folder}: the model changed since the study was made: untouched, its loss "
            f"on the validation rows is {found:.4f}, and was {value_text(expected)}. Put the same "
            "files back, set model.revision in its study.yaml, or run the study again."
        )
    yield Remark(
        "the files of the model are not those that the study was made with, or an earlier version "
        f"of rsauto made it; its loss without an adapter is the same, {found:.4f}"
    )


class _Run:
    """One run of a training, and what its parts share."""

    def __init__(
        self, job: Job, folder: OutFolder, setup: Setup, test: HeldOut, stop: StopFlag
    ) -> None:
        self.job, self.folder, self.setup, self.test, self.stop = job, folder, setup, test, stop
        spec = job.spec(job.steps(len(setup.data.train)))
        fingerprints = fingerprints_of(setup)
        begun = folder.begun()
        if begun is not None:
            folder.require_same(begun, job, spec)
            _require_same_inputs(folder, begun, fingerprints)
        self.prediction = self._predicted(spec, begun)
        self.spec = replace(
            spec,
            micro_batch_size=self.prediction.micro_batch_size,
            product_order=self.prediction.product_order,
        )
        known = None if begun is None else str(begun["id"])
        # Anew where it is continued: with a micro-batch that fits, it is continued with that one.
        self.training_id = str(folder.begin(job, self.spec, fingerprints, known)["id"])
        self.save_every = job.request.save_every or -(-spec.steps // CHECKPOINTS_OF_A_RUN)

    def events(self) -> Iterator[Event]:
        yield from self._read_last_checkpoint()
        yield Ready(
            spec=self.spec,
            prediction=self.prediction,
            memory_budget_bytes=self.setup.memory_budget_bytes,
            test_source=self.test.source,
            save_every=self.save_every,
            steps_done=self.kept.step if self.kept else 0,
            training_id=self.training_id,
        )
        self._stop_if_asked("nothing was trained")
        yield Stage("loading the model")
        bench = self._bench()
        yield from checked_model(self.job, self.setup, bench, self.prediction.micro_batch_size)
        self._stop_if_asked("nothing was trained")
        yield TrialStarted(self.job.record.number, self.spec, self.prediction)
        with Trial(bench, self.spec, self.kept) as run:
            try:
                yield from self._steps(run)
                yield Stage("evaluating")
                values = self._results(run)
            except Diverged as diverged:
                raise AllTrialsFailedError(
                    f"{self.folder.path}: the training diverged, {diverged}. Another --seed may do "
                    "better; a lower learning rate is another trial of the study."
                ) from None
            except OutOfMemory as full:
                raise BudgetError(self._out_of_memory(full)) from None
            except OtherAdapterError as error:
                raise InputError(
                    f"{self.folder.checkpoints}: cannot be continued: {error}. Remove the folder "
                    "to begin anew, or choose another --out."
                ) from None
        yield Finished(values)

    def _read_last_checkpoint(self) -> Iterator[Remark]:
        """Sets `kept` to the newest checkpoint that can be read, None where there is none."""
        self.kept: Snapshot | None = None
        left = checkpoints(self.folder.checkpoints)
        while left and self.kept is None:
            try:
                self.kept = read_checkpoint(left.pop())
            except ValueError as error:
                then = "going on from the one before" if left else "beginning anew"
                yield Remark(f"{error}; {then}")
        self.folder.cut_curve(self.kept.step if self.kept else 0)

    def _steps(self, run: Trial) -> Iterator[Event]:
        points = run.steps()
        for point in points:
            self.folder.add_point(point)
            yield TrialStep(self.job.record.number, self.spec, point, run.measured_peak_bytes)
            is_last = point.step == self.spec.steps
            if point.step % self.save_every == 0 or is_last or self.stop.requested:
                self._save(run, point)
                yield Saved(point.step)
            if not is_last:
                self._stop_if_asked(f"{point.step} of {self.spec.steps} steps are safe")

    def _save(self, run: Trial, point: StepPoint) -> None:
        try:
            write_checkpoint(self.folder.checkpoints, run.snapshot())
        except OSError as error:
            before = checkpoints(self.folder.checkpoints)
            safe = f"{before[-1].name} is safe" if before else "nothing is kept yet"
            raise StudyInterrupted(
                f"{self.folder.path}: the checkpoint of step {point.step} cannot be written: "
                f"{error.strerror}; {safe}. Make room or put the permissions right, and run the "
                "same command again."
            ) from None

    def _stop_if_asked(self, state: str) -> None:
        if self.stop.requested:
            raise StudyInterrupted(
                f"{self.folder.path}: stopped, {state}; the same command goes on."
            )

    def _bench(self) -> Bench:
        bench = load_bench(self.setup)
        if not self.setup.data.general:
            return bench
        baseline = self.job.study.environment.get("baseline") or {}
        loss = baseline.get("metrics", {}).get("general_loss")
        if loss is None:
            size = self.prediction.micro_batch_size
            loss = untouched(bench, size, self.spec.seed).metrics["general_loss"]
        return replace(bench, untouched_general_loss=loss)

    def _predicted(self, spec: TrialSpec, begun: dict[str, Any] | None) -> Prediction:
        """At the micro-batch this was begun with, or that the trial had, or the largest that fits.

        Raises BudgetError where none does.
        """
        asked = self.job.request
        found = None
        if asked.micro_batch_size is None and (begun or asked.memory_budget is None):
            before = TrialSpec.from_json(begun["spec"]) if begun else self.job.record
            found = _prediction_as_before(self.setup, spec, before)
        found = found or self.setup.predict(spec)
        if found is None:
            smallest = self.setup.smallest_prediction(spec)
            raise BudgetError(
                f"memory_budget: {bytes_text(self.setup.memory_budget_bytes)} is too little for "
                f"trial {self.job.record.number}, rank {spec.rank}, which needs "
                f"{bytes_text(self.setup.planner.needed_bytes(smallest))} at micro_batch_size "
                f"{smallest.micro_batch_size}. Raise it with --memory-budget, or choose a smaller "
                "rank with --rank."
            )
        return found

    def _out_of_memory(self, full: OutOfMemory) -> str:
        size = self.prediction.micro_batch_size
        smaller = f"--micro-batch-size {size // 2}, which continues" if size > 1 else "a lower rank"
        return (
            f"{self.folder.path}: out of memory at micro-batch {size}, which was predicted to fit: "
            f"{full}. Stop what else uses the device, or try {smaller}."
        )

    def _results(self, run: Trial) -> dict[str, Any]:
        """Evaluates on the test split, writes the adapter and the record."""
        test = self._tested(run)
        number, found = self.job.record.number, self.prediction
        record = replace(
            trial_record(number, run, self.spec, found, "complete", None),
            memory_budget_bytes=self.setup.memory_budget_bytes,
        )
        source, data = self.setup.source, self.setup.data
        measured = measured_values(test)
        card = trial_card(self.job.config, source.name, record, data, source.fingerprint, measured)
        record = replace(record, adapter_bytes=run.save(self.folder.adapter, card))
        values = finished_values(self.job, record, self.test, test)
        self.folder.finish(values)
        return values

    def _tested(self, run: Trial) -> Evaluation | None:
        if not self.test.examples:
            return None
        data = self.setup.data
        planned_length = max(data.train_length, data.validation_length)
        longest = max(len(example.input_ids) for example in self.test.examples)
        # Test rows may be longer than any that memory was planned for.
        size = self.prediction.micro_batch_size * planned_length // max(longest, planned_length)
        return run.evaluate(self.test.examples, max(1, size))


def _require_same_inputs(
    folder: OutFolder, begun: dict[str, Any], fingerprints: dict[str, str]
) -> None:
    changed = _changed(begun["fingerprints"], fingerprints)
    if changed:
        raise InputError(
            f"--out {folder.path}: the {changed} changed since this training was "
            "begun. Put the same files back, or choose another --out."
        )


def _prediction_as_before(
    setup: Setup, spec: TrialSpec, before: TrialSpec | TrialRecord
) -> Prediction | None:
    """At the micro-batch and in the order of operations of an earlier run, None if too much now."""
    if before.micro_batch_size is None:
        return None
    found = setup.planner.predict(
        spec.init_rank or spec.rank,
        batch_size=setup.rows_of_a_device(spec.batch_size)[0],
        micro_batch_size=before.micro_batch_size,
        **planned(spec) | {"product_order": before.product_order},
    )
    fits = setup.planner.needed_bytes(found) <= setup.memory_budget_bytes
    return replace(found, rank=spec.rank) if fits else None


def measured_values(test: Evaluation | None) -> dict[str, float]:
    """Numbers of an evaluation by their names, those that are finite."""
    values = {} if test is None else {"eval_loss": test.eval_loss, **test.metrics}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def finished_values(
    job: Job, record: TrialRecord, held: HeldOut, test: Evaluation | None
) -> dict[str, Any]:
    """What record.json holds: the trial's record, and under "test" what only this run measured."""
    found = None
    if test is not None:
        found = {"rows": len(held.examples), **measured_values(test)}
    return {**record.to_json(), "study": job.config.name, "test": found, "test_source": held.source}
