"""The study, from the first default to the report: a generator of events that reads in order."""

from __future__ import annotations

import errno
import gc
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import optuna
import torch
from optuna.trial import TrialState

from rsauto.adapters.head import initialise_head
from rsauto.config import StudyConfig
from rsauto.data import fingerprint
from rsauto.environment import describe_environment
from rsauto.errors import AllTrialsFailedError, StudyInterrupted
from rsauto.records import Outcome, TrialRecord, TrialSpec
from rsauto.report.page import write_report
from rsauto.search.agenda import (
    may_prune,
    num_reserved,
    num_settled,
    opening_trial,
    reference_trial,
    refit_trial,
    seed_trials,
)
from rsauto.search.allowance import Allowance, allowance_after
from rsauto.search.events import (
    AllowanceRaised,
    Event,
    Planned,
    Searching,
    Stage,
    StudyEnded,
    TrialSettled,
    TrialStarted,
    TrialStep,
)
from rsauto.search.folder import StudyFolder
from rsauto.search.identity import claim, require_nothing_lost
from rsauto.search.ledger import Ledger, drop_stale_lock, open_storage
from rsauto.search.objective import Objective, constraints
from rsauto.search.publish import publish
from rsauto.search.sampler import Attempt, propose
from rsauto.search.setup import Objects, Setup, probes, set_up, with_allowance
from rsauto.search.write_up import infeasible_record, trial_card, trial_record
from rsauto.stop import StopFlag
from rsauto.training.evaluate import Evaluation
from rsauto.training.loop import Diverged
from rsauto.training.trial import Bench, OutOfMemory, Trial, untouched

KEPT_ADAPTERS = 6
"""Adapters kept while a study runs; an answer whose adapter is gone is trained again."""

_DISK_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG, errno.ENOENT,
}  # fmt: skip

Steps = Generator[Event, None, TrialRecord]


def study_events(
    config: StudyConfig,
    out: Path,
    *,
    storage: str | None = None,
    objects: Objects | None = None,
    stop: StopFlag | None = None,
) -> Iterator[Event]:
    """Runs or continues the study of ``config`` in the folder ``out``.

    Raises InputError or BudgetError (nothing was started), StudyInterrupted (the same call
    continues) or AllTrialsFailedError.
    """
    begin = time.monotonic()
    folder = StudyFolder(out)
    folder.check(config)
    stop = stop or StopFlag()
    yield Stage("reading model and data")
    setup = set_up(config, objects)
    yield Planned(setup)
    if storage is not None:
        open_storage(storage, folder.journal_file)  # a wrong URL is told before a folder is made
    if stop.requested:
        raise StudyInterrupted("Stopped before anything was started; the same command begins.")
    with folder.locked(), _disk_errors(folder):
        yield from StudyRun(setup, folder, storage, stop, begin).events()


class StudyRun:
    """One run of a study in this process, and the state its parts share."""

    def __init__(
        self,
        setup: Setup,
        folder: StudyFolder,
        storage: str | None,
        stop: StopFlag,
        begin: float,
    ) -> None:
        self.setup = setup
        self.config = setup.config
        self.folder = folder
        self.stop = stop
        self.begin = begin
        self.environment = folder.read_environment()
        self.num_failures = 0
        self.allowance = Allowance()
        if storage is None:
            drop_stale_lock(folder.journal_file)
        self.ledger = Ledger.open(open_storage(storage, folder.journal_file), self.config)
        fingerprints = {"model": setup.source.fingerprint, "data": setup.data.fingerprint}
        if setup.data.general:
            fingerprints["text of data.forgetting"] = fingerprint(setup.data.general)
        claim(self.ledger, self.config, fingerprints, folder.path)
        self.environment["fingerprints"] = fingerprints
        # Nobody else can be at a journal: this process holds its folder.
        self.num_orphans = self.ledger.recover_orphans(is_alone=storage is None)
        require_nothing_lost(folder, self.ledger)
        self.folder.write_config(self.config)

    def events(self) -> Iterator[Event]:
        """Everything from loading the model to the published adapters."""
        yield Stage("loading the model")
        self._stop_if_asked()
        bench = self._describe(self._bench())
        yield from self._raise_allowance()
        self._record_ranks_that_do_not_fit()
        yield Searching(num_settled(self.ledger.settled()), self.num_orphans)
        # What is alive now stays alive: collections after each trial then look at little else.
        gc.collect()
        gc.freeze()
        try:
            reason = yield from self._run_trials(bench)
        finally:
            gc.unfreeze()
        yield Stage("writing the report")
        publish(
            self.folder,
            self.config,
            self.ledger.records(),
            self.environment,
            lambda record: self._train_again(bench, record),
        )
        yield StudyEnded(self.folder.path, time.monotonic() - self.begin, reason)

    def _run_trials(self, bench: Bench) -> Generator[Event, None, str]:
        while True:
            self.folder.write_records(self.ledger.records())
            self._stop_if_asked()
            self._stop_if_failing()
            if num_settled(self.ledger.settled()) >= self.config.search.trials:
                return "every trial is done"
            limit = self.config.search.max_seconds
            if limit is not None and time.monotonic() - self.begin > limit:
                return f"the time limit of {limit:g} seconds was reached"
            if not self.setup.space.ranks:
                return "no rank fits the memory budget any more"
            begun = self.ledger.begin(self._next_spec)
            if begun is None:
                return "every point of the search space has been tried"
            record = yield from self._run_trial(bench, *begun)
            self.num_failures = self.num_failures + 1 if record.outcome == "failed" else 0
            yield TrialSettled(record, num_settled(self.ledger.settled()))
            yield from self._raise_allowance()

    def _raise_allowance(self) -> Iterator[Event]:
        """Learns from trials that needed more memory than predicted, those of earlier runs too."""
        found = allowance_after(
            (record for _, record in self.ledger.settled()), self.setup.planner.outside_bytes
        )
        if found.share > self.allowance.share:
            self.allowance = found
            self.setup = with_allowance(self.setup, found.share)
            yield AllowanceRaised(found, self.setup.space.ranks)

    def _next_spec(self) -> TrialSpec | None:
        """The next new trial, see `agenda`."""
        settled, space = self.ledger.settled(), self.setup.space
        reference = reference_trial(space, settled, self.objective.lower_is_better)
        if reference is not None:
            return reference
        opening = opening_trial(space, settled)
        if opening is not None:
            return opening
        refit = refit_trial(space, settled, self.objective.lower_is_better)
        seeds = seed_trials(
            space, settled, self.objective.lower_is_better, self.config.search.within
        )
        last = [refit, *seeds] if refit is not None else seeds
        remaining = self.config.search.trials - num_settled(settled)
        if last and remaining <= num_reserved(self.config):
            return last[0]
        # The sampler learns from settled trials, and keeps away from running ones.
        attempts = [Attempt(s, r, self.objective.told(r)) for s, r in settled]
        attempts += [Attempt(spec, None, None) for spec in self.ledger.unfinished_specs()]
        found = propose(space, attempts, self.config)
        return found or (last[0] if last else None)

    def _run_trial(self, bench: Bench, trial: optuna.Trial, spec: TrialSpec) -> Steps:
        prediction = self.setup.predict(spec)
        if prediction is None:
            return self._refuse(trial, spec)
        spec = replace(spec, micro_batch_size=prediction.micro_batch_size)
        yield TrialStarted(trial.number, spec, prediction)
        with Trial(bench, spec) as run:
            outcome, error = yield from self._train(trial, run)
            record = trial_record(trial.number, run, spec, prediction, outcome, error)
            if outcome == "complete":
                record = self._save(run, record)
            record = self._settle(trial, record)
        self._keep_adapters()
        return record

    def _train(
        self, trial: optuna.Trial, run: Trial
    ) -> Generator[Event, None, tuple[Outcome, str | None]]:
        """Runs the trial's steps; an error inside becomes its outcome."""
        points = run.steps()
        while True:
            try:
                point = next(points)
            except StopIteration:
                return "complete", None
            except OutOfMemory as full:
                return "oom", str(full)
            except Diverged as diverged:
                return "diverged", str(diverged)
            except Exception as bug:  # one faulty trial must not end the study
                return "failed", f"{type(bug).__name__}: {bug}"
            yield TrialStep(trial.number, run.spec, point, run.measured_peak_bytes)
            if self.stop.requested:
                self.ledger.abandon(trial, replace(run.spec, micro_batch_size=None))
                self._stop_if_asked()
            if point.evaluation is not None:
                trial.report(self.objective.value(point.evaluation), point.step)
                settled = self.ledger.settled()
                if may_prune(run.spec, point.step, settled) and trial.should_prune():
                    return "pruned", None

    def _save(self, run: Trial, record: TrialRecord) -> TrialRecord:
        card = trial_card(self.config, self.setup.source.name, record, self.setup.data)
        num_bytes = run.save(self.folder.adapter(record.number), card)
        return replace(record, adapter_bytes=num_bytes)

    def _refuse(self, trial: optuna.Trial, spec: TrialSpec) -> TrialRecord:
        """Settles a trial that does not fit the budget, without starting it."""
        smallest = self.setup.smallest_prediction(spec)
        return self._settle(trial, infeasible_record(trial.number, spec, smallest))

    def _settle(self, trial: optuna.Trial, record: TrialRecord) -> TrialRecord:
        """Tells the ledger how the trial ended; returns the record as it stands there."""
        spec = TrialSpec.from_json(trial.user_attrs["spec"])
        smallest = self.setup.smallest_prediction(spec)
        record = replace(
            record,
            memory_budget_bytes=self.setup.memory_budget_bytes,
            smallest_budget_bytes=self.setup.planner.needed_bytes(smallest),
        )
        state = TrialState.COMPLETE
        if record.outcome in ("pruned", "failed"):
            state = TrialState.PRUNED if record.outcome == "pruned" else TrialState.FAIL
        self.ledger.settle(
            trial, record, value=self.objective.told(record), state=state,
            constraints=constraints(record),
        )  # fmt: skip
        return record

    def _keep_adapters(self) -> None:
        """Keeps the adapters of the best trials so far, one of which may be the answer."""
        ranked = sorted(
            (value, record.number)
            for _, record in self.ledger.settled()
            if (value := self.objective.lower_is_better(record)) is not None
        )
        self.folder.keep_adapters([number for _, number in ranked[:KEPT_ADAPTERS]])

    def _train_again(self, bench: Bench, record: TrialRecord) -> None:
        """Trains a settled configuration once more, to get back an adapter that was not kept."""
        spec = next(s for s, r in self.ledger.settled() if r.number == record.number)
        spec = replace(spec, micro_batch_size=record.micro_batch_size)
        with Trial(bench, spec) as run:
            try:
                for _ in run.steps():
                    self._stop_if_asked()
            except (OutOfMemory, Diverged) as error:
                raise StudyInterrupted(
                    f"The adapter of trial {record.number} is no longer there, and training it "
                    f"again failed: {error}. The records are complete; try the same command again."
                ) from None
            self._save(run, record)

    # ---------------------------------------------------------------- before and around them

    def _bench(self) -> Bench:
        loaded = self.setup.load_model()
        return Bench(
            model=loaded.model,
            base_name=self.setup.source.name,
            data=self.setup.data,
            device=self.setup.device,
            fresh_parameters=loaded.fresh_parameters,
        )

    def _describe(self, bench: Bench) -> Bench:
        """Measures the untouched model once, and writes environment.json."""
        if "baseline" not in self.environment:
            spec = self.setup.space.middle(self.setup.space.ranks[0])
            prediction = self.setup.predict(spec)
            torch.manual_seed(self.config.training.seed)
            initialise_head(bench.model, bench.fresh_parameters)
            size = prediction.micro_batch_size if prediction else 1
            result = untouched(bench, size)
            general = {"forgetting": 0.0} if bench.data.general else {}
            self.environment["baseline"] = asdict(
                replace(result, metrics={**result.metrics, **general})
            )
        self.environment.update(
            describe_environment(bench.device),
            model=self.setup.source.name,
            memory_budget_bytes=self.setup.memory_budget_bytes,
            seed=self.config.training.seed,
            # Without the samples: a report is passed on, and rows of data are not for everyone.
            preflight={k: v for k, v in self.setup.preflight.to_json().items() if k != "samples"},
        )
        self.folder.write_environment(self.environment)
        baseline = Evaluation(**self.environment["baseline"])
        self.objective = Objective.of(self.config.search, baseline)
        return replace(bench, untouched_general_loss=baseline.metrics.get("general_loss"))

    def _record_ranks_that_do_not_fit(self) -> None:
        """One record for every rank of the space that the budget rules out, with what it needs."""
        known = {record.rank for _, record in self.ledger.settled()}
        fitting = self.setup.space.ranks
        for rank in self.config.search.ranks:
            if not fitting or rank in fitting or rank in known:
                continue
            spec = probes(self.setup, rank)[0]
            trial, spec = self.ledger.begin_new(spec)
            self._refuse(trial, spec)

    def _stop_if_asked(self) -> None:
        if self.stop.requested:
            self._write_unfinished_report()
            raise StudyInterrupted(
                f"Stopped. {num_settled(self.ledger.settled())} trials are kept in "
                f"{self.folder.path}; the same command continues."
            )

    def _stop_if_failing(self) -> None:
        """Failures of earlier runs do not count: what caused them may have been mended."""
        limit = self.config.search.max_failures
        if self.num_failures < limit:
            return
        settled = [r for _, r in self.ledger.settled() if r.outcome != "infeasible"]
        self._write_unfinished_report()
        message = f"{limit} trials in a row failed, the last with: {settled[-1].error}."
        if all(r.outcome == "failed" for r in settled):
            raise AllTrialsFailedError(f"{message} No trial gave a result.")
        raise StudyInterrupted(f"{message} The same command continues after it is mended.")

    def _write_unfinished_report(self) -> None:
        self.folder.write_records(self.ledger.records())
        write_report(self.folder.path)


@contextmanager
def _disk_errors(folder: StudyFolder) -> Iterator[None]:
    """A disk that refuses to be written ends the study, resumable, with one clear message."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRNOS:
            raise
        raise StudyInterrupted(
            f"{folder.path}: cannot be written: {error.strerror}. Settled trials are safe; make "
            "room or put the permissions right, and run the same command again."
        ) from None
