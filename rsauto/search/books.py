"""What trials share however they are run: the ledger they are settled in, the folder, the stop."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from rsauto.errors import StudyInterrupted
from rsauto.memory.kinds import Prediction
from rsauto.records import EvalPoint, Outcome, TrialRecord, TrialSpec
from rsauto.report.page import write_report
from rsauto.search.agenda import num_settled
from rsauto.search.attempts import Attempt
from rsauto.search.folder import StudyFolder
from rsauto.search.history import Settled
from rsauto.search.ledger import Ledger
from rsauto.search.objective import Objective, constraints
from rsauto.search.pruning import gives_up, is_harmful
from rsauto.search.setup import Setup
from rsauto.search.write_up import infeasible_record, trial_card
from rsauto.stop import StopFlag

KEPT_ADAPTERS = 6
"""Adapters kept while a study runs; an answer whose adapter is gone is trained again."""


class Ending(NamedTuple):
    """How a trial ends before its last step."""

    outcome: Outcome
    error: str | None = None


class Books:
    """Where the trials of one run of a study are written down."""

    def __init__(
        self,
        setup: Setup,
        folder: StudyFolder,
        ledger: Ledger,
        stop: StopFlag,
        *,
        has_report: bool = True,
    ) -> None:
        self.has_report = has_report
        self.setup = setup
        """As it is now: what is predicted may grow while the study learns."""
        self.folder = folder
        self.ledger = ledger
        self.stop = stop
        self.objective: Objective
        """Set once the untouched model has been measured."""

    def report(
        self, trial: Attempt, spec: TrialSpec, curve: list[EvalPoint], known: Settled
    ) -> Ending | None:
        """Tells Optuna the last point of a curve; how the trial ends there, None if it goes on.

        One that was given to another worker, because this one was taken for dead, ends, too.
        """
        harm = self.harm(curve)
        value = self.objective.value(curve[-1])
        try:
            # Optuna takes what is no number for a fault of whoever tells it.
            if math.isfinite(value):
                self.ledger.report(trial, value, curve[-1].step)
        except UpdateFinishedTrialError:
            return Ending("pruned")
        if harm is not None:
            return harm
        ends = gives_up(self.setup.config, self.objective, spec, curve, known)
        return Ending("pruned") if ends else None

    def harm(self, curve: list[EvalPoint]) -> Ending | None:
        """The end of a trial that has made the model worse than it was, or no number of it."""
        step, value = curve[-1].step, self.objective.value(curve[-1])
        if not math.isfinite(value):
            return Ending("diverged", f"step {step}: {self.objective.name} {value}")
        if not is_harmful(self.objective, curve):
            return None
        return Ending(
            "diverged",
            f"step {step}: validation loss {curve[-1].eval_loss:.4g}, the untouched "
            f"model's is {self.objective.untouched_loss:.4g}",
        )

    def refuse(self, trial: Attempt, spec: TrialSpec) -> TrialRecord:
        """Settles a trial that does not fit the budget, without starting it."""
        smallest = self.setup.smallest_prediction(spec)
        return self.settle(trial, infeasible_record(trial.number, spec, smallest))

    def settle(self, trial: Attempt, record: TrialRecord) -> TrialRecord:
        """Tells the ledger how the trial ended; returns the record as it stands there."""
        smallest: Prediction = self.setup.smallest_prediction(trial.begun.spec)
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

    def abandon(self, trial: Attempt) -> None:
        """Gives up a running trial without a result; it will be run again."""
        self.ledger.abandon(trial)

    def place_of(self, record: TrialRecord) -> tuple[Path, str]:
        """Folder and model card of a trial's adapter."""
        config, source, data = self.setup.config, self.setup.source, self.setup.data
        card = trial_card(config, source.name, record, data, source.fingerprint)
        return self.folder.adapter(record.number), card

    def keep_adapters(self) -> None:
        """Keeps the adapters of the best trials so far, one of which may be the answer."""
        entries = self.folder.adapter_entries()
        attempts = self.ledger.attempts()  # read after the entries: who was writing them is known
        ranked = sorted(
            (value, record.number)
            for _, record in attempts.settled
            if (value := self.objective.lower_is_better(record)) is not None
        )
        self.folder.remove_adapters(
            entries,
            kept=[number for _, number in ranked[:KEPT_ADAPTERS]],
            running=[attempt.number for attempt in attempts.in_state(TrialState.RUNNING)],
        )

    def stop_if_asked(self) -> None:
        """Raises StudyInterrupted once somebody has asked to stop."""
        if self.stop.requested:
            self.write_report()
            raise StudyInterrupted(self.stopped_message())

    def stopped_message(self) -> str:
        return (
            f"Stopped. {num_settled(self.ledger.settled())} trials are kept in "
            f"{self.folder.path}; the same command continues."
        )

    def write_report(self) -> None:
        """The records so far, and unless it is left for later the report of them."""
        self.folder.write_records(self.ledger.records())
        if self.has_report:
            write_report(self.folder.path)


class WorkersBooks(Books):
    """Those of a process that does not hold the study's folder: no report is its to write."""

    def stopped_message(self) -> str:
        return (
            "Stopped. The study goes on without this worker; what it was at is run again by "
            "another."
        )

    def write_report(self) -> None:
        pass


class AdapterFolder(StudyFolder):
    """A study's folder as a worker has it, or one that takes its place: for adapters alone."""

    def write_records(self, records: Iterable[TrialRecord]) -> None:
        pass
