"""The Optuna study as the ledger of record: every trial is written here before it counts.

Each trial carries its full `TrialSpec` and, once settled, its `TrialRecord`. trials.jsonl is
rebuilt from here, so a kill at any moment loses at most the trial that was running.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from rsauto.config import SearchConfig, StudyConfig
from rsauto.errors import InputError
from rsauto.records import TrialRecord, TrialSpec
from rsauto.search.history import History, history_of
from rsauto.search.space import STORED_DISTRIBUTIONS, stored_params

MEMORY, DIVERGENCE = "memory", "divergence"
"""Names of the constraints; a trial is feasible when every value is at most zero."""


class Ledger:
    """A study's trials in an Optuna storage."""

    def __init__(self, study: optuna.Study) -> None:
        self.study = study

    @classmethod
    def open(cls, storage: BaseStorage, config: StudyConfig) -> Ledger:
        """Creates the study or continues it."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(
            study_name=config.name,
            storage=storage,
            direction="minimize" if config.search.minimize else "maximize",
            # The driver proposes every trial itself (sampler.py); this one is never asked.
            sampler=optuna.samplers.RandomSampler(seed=0),
            pruner=build_pruner(config.search),
            load_if_exists=True,
        )
        return cls(study)

    def records(self) -> list[TrialRecord]:
        """Every settled or refused trial, by number."""
        return [record for _, record in self.settled()]

    def settled(self) -> list[tuple[TrialSpec, TrialRecord]]:
        """Every record together with the spec it came from, by number."""
        return [
            (
                TrialSpec.from_json(trial.user_attrs["spec"]),
                TrialRecord.from_json(trial.user_attrs["record"]),
            )
            for trial in self.study.get_trials(deepcopy=False)
            if "record" in trial.user_attrs and trial.state.is_finished()
        ]

    def history(self) -> History:
        """Every trial that was begun, in the order of its first attempt."""
        return history_of(
            [
                (
                    trial.number,
                    TrialSpec.from_json(trial.user_attrs["spec"]),
                    TrialRecord.from_json(trial.user_attrs["record"])
                    if "record" in trial.user_attrs and trial.state.is_finished()
                    else None,
                )
                for trial in self.study.get_trials(deepcopy=False)
                if "spec" in trial.user_attrs
            ]
        )

    def waiting_spec(self) -> TrialSpec | None:
        """Of the trial that `begin` would run again, None where there is none."""
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        specs = [t.user_attrs["spec"] for t in waiting if "spec" in t.user_attrs]
        return TrialSpec.from_json(specs[0]) if specs else None

    @property
    def lookahead(self) -> int | None:
        """How far proposals look ahead (see `history`), None before the first one."""
        found: int | None = self.study.user_attrs.get("lookahead")
        return found

    def set_lookahead(self, lookahead: int) -> None:
        """A study continued elsewhere asks what it would have asked here."""
        self.study.set_user_attr("lookahead", lookahead)

    def unfinished_specs(self) -> list[TrialSpec]:
        """Specs of trials that are running somewhere or waiting to be run again."""
        return [
            TrialSpec.from_json(trial.user_attrs["spec"])
            for trial in self.study.get_trials(
                deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)
            )
            if "spec" in trial.user_attrs
        ]

    def begin(
        self, propose: Callable[[], TrialSpec | None]
    ) -> tuple[optuna.Trial, TrialSpec] | None:
        """The next trial, marked as running by this process: one to be run again, or a new one.

        None when there is nothing to run again and ``propose`` has nothing more.
        """
        again = self._begin_again()
        if again is not None:
            return again
        spec = propose()
        return None if spec is None else self.begin_new(spec)

    def begin_new(self, spec: TrialSpec) -> tuple[optuna.Trial, TrialSpec]:
        """Starts a trial of ``spec``, whoever waits to be run again.

        It is added as a running one. Optuna's own way, to enqueue it and to ask, would give the
        oldest that waits, or leave it to another process.
        """
        token = uuid.uuid4().hex
        attributes = {"spec": spec.to_json(), "worker": this_worker(), "token": token}
        self.study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=stored_params(spec),
                distributions=dict(STORED_DISTRIBUTIONS),
                user_attrs=attributes,
            )
        )
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        own = next(trial for trial in running if trial.user_attrs.get("token") == token)
        return optuna.Trial(self.study, own._trial_id), spec

    def _begin_again(self) -> tuple[optuna.Trial, TrialSpec] | None:
        """The next trial that waits to be run again, None where there is none."""
        while self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            trial = self.study.ask(fixed_distributions=dict(STORED_DISTRIBUTIONS))
            if "spec" in trial.user_attrs:
                trial.set_user_attr("worker", this_worker())
                return trial, TrialSpec.from_json(trial.user_attrs["spec"])
            # Another process has taken it meanwhile, and Optuna has made an empty one.
            self.study.tell(trial, state=TrialState.FAIL)
        return None

    def settle(
        self,
        trial: optuna.Trial,
        record: TrialRecord,
        *,
        value: float | None,
        state: TrialState,
        constraints: dict[str, float],
    ) -> None:
        """Writes constraints, then the record, then finishes the trial.

        With the record written the trial is as good as settled: should the process die before
        the last write, `recover_orphans` makes it up.
        """
        for name, violation in constraints.items():
            trial.set_constraint(name, violation)
        value = value if state == TrialState.COMPLETE else None
        trial.set_user_attr("verdict", {"state": state.name, "value": value})
        trial.set_user_attr("record", record.to_json())
        self.study.tell(trial, value, state=state)

    def abandon(self, trial: optuna.Trial, spec: TrialSpec) -> None:
        """Gives up a running trial without a result and puts it back to be run again."""
        self._requeue(trial.number, spec)

    def recover_orphans(self, *, is_alone: bool = False) -> int:
        """Puts trials of processes that no longer live back to be run again; how many there were.

        An orphan is failed, not retried in place: a retried trial would inherit what the dead
        process had already reported. One whose record was already written is finished instead.
        Called before this process starts a trial, so one of its own is left from an earlier call.
        ``is_alone`` says that no other process can be at this study, on whatever host it was.
        """
        orphans = [
            trial
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if is_alone or not worker_lives(trial.user_attrs.get("worker"))
        ]
        for trial in orphans:
            self._recover(trial)
        return sum("record" not in trial.user_attrs for trial in orphans)

    def _recover(self, trial: FrozenTrial) -> None:
        if "record" in trial.user_attrs:
            told = trial.user_attrs["verdict"]
            self.study.tell(trial.number, told["value"], state=TrialState[told["state"]])
        elif "spec" in trial.user_attrs:
            self._requeue(trial.number, TrialSpec.from_json(trial.user_attrs["spec"]))
        else:
            self.study.tell(trial.number, state=TrialState.FAIL)

    def _requeue(self, number: int, spec: TrialSpec) -> None:
        # Put back first, so that a kill between the two writes cannot lose the trial; coming here
        # again for it finds the entry and adds no second one.
        waiting = [s.retry_of for s in self.unfinished_specs()]
        if number not in waiting:
            self._enqueue(replace(spec, retry_of=number))
        self.study.tell(number, state=TrialState.FAIL)

    def _enqueue(self, spec: TrialSpec) -> None:
        self.study.enqueue_trial(stored_params(spec), user_attrs={"spec": spec.to_json()})


def drop_stale_lock(journal: Path) -> None:
    """Removes the journal's lock. Only for who holds the folder, so that nobody else can have it.

    Optuna waits half a minute before it takes the lock of a killed process.
    """
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)


def open_storage(url: str | None, journal: Path) -> BaseStorage:
    """Optuna storage at ``url``, or a journal file. Raises InputError when it cannot be reached."""
    try:
        if url is None:
            drop_torn_line(journal)
            # Absolute: Optuna's lock is a link to this path, and a relative one, left behind by a
            # killed process, would point nowhere and be waited for without end.
            return JournalStorage(JournalFileBackend(str(journal.resolve())))
        return optuna.storages.get_storage(url)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{journal}: the journal is damaged ({error}). Bring back a copy of it, or choose "
            "another --out to begin anew; trials.jsonl still holds the records."
        ) from None
    except (SQLAlchemyError, ImportError, ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"--storage {url or journal}: the study storage cannot be opened: {reason}. "
            "Give a database URL such as postgresql://user@host/name or sqlite:///file.db."
        ) from None


def drop_torn_line(journal: Path) -> None:
    """Cuts off a last line that was not written to its end.

    A full disk or a power cut can leave half an entry. Optuna leaves it unread, but would write the
    next one right behind it, and neither could be read again.
    """
    if not journal.exists():
        return
    content = journal.read_bytes()
    if content and not content.endswith(b"\n"):
        with open(journal, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def build_pruner(search: SearchConfig) -> BasePruner:
    """Median of the other trials at the same step, or asynchronous successive halving."""
    if search.pruner == "median":
        return MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    if search.pruner == "halving":
        return SuccessiveHalvingPruner(reduction_factor=3)
    return NopPruner()


def this_worker() -> dict[str, Any]:
    """Names this process so that another can tell whether it still lives."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "born": psutil.Process(pid).create_time()}


def worker_lives(worker: dict[str, Any] | None) -> bool:
    """Whether another process may still be at a trial; one on another host is trusted to be."""
    if worker is None or worker == this_worker():
        return False
    if worker["host"] != socket.gethostname():
        return True
    try:
        process = psutil.Process(worker["pid"])
        same = abs(process.create_time() - worker["born"]) < 1.0
        # A killed process stays a zombie where nobody waits for it, as in many containers.
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
