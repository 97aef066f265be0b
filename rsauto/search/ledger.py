"""The Optuna study as the ledger of record: every trial is written here before it counts.

Each trial carries its full `TrialSpec` and, once settled, its `TrialRecord`. trials.jsonl is
rebuilt from here, so a kill at any moment loses at most the trial that was running. Any number of
processes may write it at the same time (see `attempts`).
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import NopPruner
from optuna.storages import BaseStorage
from optuna.study._constrained_optimization import _CONSTRAINTS_KEY
from optuna.trial import TrialState, create_trial

from rsauto.config import StudyConfig
from rsauto.records import TrialRecord, TrialSpec
from rsauto.search.attempts import Attempt, Attempts
from rsauto.search.history import History
from rsauto.search.liveness import Pulse, Watch, this_worker
from rsauto.search.space import STORED_DISTRIBUTIONS, stored_params
from rsauto.search.storage import patiently
from rsauto.search.stored import StoredTrial, stored
from rsauto.search.write_up import lost_record

MEMORY, DIVERGENCE = "memory", "divergence"
"""Names of the constraints; a trial is feasible when every value is at most zero."""

MOST_DEATHS = 3
"""Processes that may die of a trial before it is not run again."""

LOST_SECONDS = 5.0
"""How long a trial may be nobody's, between being given up and put back, before it is lost."""

MOST_BACK_OFF_SECONDS = 0.5
"""Before a proposal that another process was quicker with is followed by the next."""


class Ledger:
    """A study's trials in an Optuna storage."""

    def __init__(self, study: optuna.Study) -> None:
        self.study = study
        self.seen = Attempts()
        """The study as it was when it was last read, by `attempts`."""
        self._lost_since: dict[int, float] = {}
        self._storage: BaseStorage = study._storage
        self._stored = stored(study)
        self._watch = Watch(self._storage, study._study_id)
        self._pulse = Pulse(self._storage)

    @classmethod
    def open(cls, storage: BaseStorage, config: StudyConfig) -> Ledger:
        """Creates the study or continues it."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(
            study_name=config.name,
            storage=storage,
            direction="minimize" if config.search.minimize else "maximize",
            # Proposals and pruning are our own (see there); these are never asked.
            sampler=optuna.samplers.RandomSampler(seed=0),
            pruner=NopPruner(),
            load_if_exists=True,
        )
        return cls(study)

    @classmethod
    def join(cls, storage: BaseStorage, name: str) -> Ledger:
        """A study that is there."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = patiently(lambda: optuna.load_study(study_name=name, storage=storage))
        return cls(study)

    def close(self) -> None:
        """Ends the thread that tells others that this process lives."""
        self._pulse.close()

    # ---------------------------------------------------------------- what is there

    def attempts(self) -> Attempts:
        """The study as it is now. Only what has changed is read, and taken in."""
        for trial in patiently(self._stored.changed):
            attempt = Attempt.of(trial)
            if attempt is not None:
                self.seen.put(attempt)
        return self.seen

    def records(self) -> list[TrialRecord]:
        """Every settled or refused trial, by number."""
        return [record for _, record in self.settled()]

    def settled(self) -> list[tuple[TrialSpec, TrialRecord]]:
        """Every record together with the spec it came from, by number."""
        return self.attempts().settled

    def history(self) -> History:
        """Every trial that was begun, in the order of its first attempt."""
        return self.attempts().history

    def has_last_chance(self, spec: TrialSpec) -> bool:
        """Whether one more death of a process settles the trial as failed.

        It has this chance alone: nobody else is to fail for what one trial of a pack does. (One of
        a cohort is then compared as trials alone are, like one that a pack had no memory for.)
        """
        return self.seen.deaths_before(spec) + 1 >= MOST_DEATHS

    def waiting_spec(self) -> TrialSpec | None:
        """Of the trial that `begin` would run again, None where there is none."""
        waiting = self.attempts().in_state(TrialState.WAITING)
        return waiting[0].begun.spec if waiting else None

    def unfinished_specs(self) -> list[TrialSpec]:
        """Specs of trials that are running somewhere or waiting to be run again."""
        found = self.attempts().in_state(TrialState.RUNNING, TrialState.WAITING)
        return [attempt.begun.spec for attempt in found]

    def attributes(self) -> dict[str, Any]:
        """What is stored of the study as a whole."""
        return patiently(lambda: self.study.user_attrs)

    def set_attribute(self, name: str, value: Any) -> None:
        patiently(lambda: self.study.set_user_attr(name, value))

    def num_running(self) -> int:
        """Trials that some process is at."""
        return len(self.attempts().in_state(TrialState.RUNNING))

    @property
    def lookahead(self) -> int | None:
        """How far proposals look ahead (see `history`), None before the first one."""
        found: int | None = self.attributes().get("lookahead")
        return found

    def set_lookahead(self, lookahead: int) -> None:
        """A study continued elsewhere asks what it would have asked here."""
        self.set_attribute("lookahead", lookahead)

    # ---------------------------------------------------------------- beginning

    def begin(
        self, propose: Callable[[], TrialSpec | None], limit: int | None = None
    ) -> tuple[Attempt, TrialSpec] | None:
        """The next trial, marked as running by this process: one to be run again, or a new one.

        None when there is nothing to run again and ``propose`` has nothing more; it may go by what
        was `seen`. A new one that another process begins at the same moment, or that would be more
        than ``limit``, is given up, and ``propose`` asked again; it has nothing more once it sees
        ``limit`` trials begun.
        """
        back_off = MOST_BACK_OFF_SECONDS / 16
        while True:
            self.attempts()
            again = self._begin_again(limit)
            if again is not None:
                return again
            unseen = self._stored.num_seen
            spec = propose()
            if spec is None:
                return None
            trial, spec = self.begin_new(spec, unseen=unseen)
            if not self.seen.must_not_run(trial.number, limit):
                return trial, spec
            self._withdraw(trial)
            # Whoever are as quick as each other would otherwise go on proposing the same.
            time.sleep(random.uniform(0, back_off))
            back_off = min(2 * back_off, MOST_BACK_OFF_SECONDS)

    def begin_new(self, spec: TrialSpec, unseen: int | None = None) -> tuple[Attempt, TrialSpec]:
        """Starts a trial of ``spec``, whoever waits to be run again.

        It is added as a running one. Optuna's own way, to enqueue it and to ask, would give the
        oldest that waits, or leave it to another process. Trials from the number ``unseen`` on were
        not known when it was proposed.
        """
        attributes = {"worker": this_worker(), "unseen": unseen}
        added = self._add(TrialState.RUNNING, spec, attributes)
        self._pulse.add(added.trial_id)
        return added, spec

    def _add(self, state: TrialState, spec: TrialSpec, attributes: dict[str, Any]) -> Attempt:
        """Adds an attempt; its token tells whether that was done although no answer came."""
        token = uuid.uuid4().hex
        template = create_trial(
            state=state,
            params=stored_params(spec),
            distributions=dict(STORED_DISTRIBUTIONS),
            user_attrs={"spec": spec.to_json(), **attributes, "token": token},
        )
        tried: list[bool] = []

        def add() -> Attempt:
            found = self.attempts().with_token(token) if tried else None
            if found is None:
                tried.append(True)
                self._stored.add(template)
                found = self.attempts().with_token(token)
            assert found is not None, "what was added is there"
            return found

        return patiently(add)

    def _begin_again(self, limit: int | None) -> tuple[Attempt, TrialSpec] | None:
        """The next trial that waits to be run again, None where there is none."""
        for waiting in self.seen.waiting():
            if not self._take(waiting.trial_id):
                continue
            if self.attempts().must_not_run(waiting.number, limit):
                self._withdraw(waiting)
            else:
                self._pulse.add(waiting.trial_id)
                return self.seen.numbered(waiting.number), waiting.begun.spec
        return None

    def _take(self, trial_id: int) -> bool:
        """Makes a waiting trial this process's own; False where another was quicker."""
        sign = partial(self._storage.set_trial_user_attr, trial_id, "worker", this_worker())
        with suppress(UpdateFinishedTrialError):
            if patiently(partial(self._stored.take, trial_id)):
                patiently(sign)
                return True
        return False

    def give_back(self, trial: Attempt) -> None:
        """Leaves the study as it was before `begin`."""
        if trial.begun.spec.retry_of is None:
            self._withdraw(trial)
        else:
            self.abandon(trial)

    def _withdraw(self, trial: Attempt) -> None:
        """Takes back a trial that was begun too much; it is no part of the study."""
        self._pulse.drop(trial.trial_id)
        with suppress(UpdateFinishedTrialError):
            mark = partial(self._storage.set_trial_user_attr, trial.trial_id, "withdrawn", True)
            patiently(mark)
        self._fail(trial.trial_id)

    def _fail(self, trial_id: int) -> bool:
        """Ends a trial without a result; False where another process has ended it."""
        try:
            patiently(partial(self._storage.set_trial_state_values, trial_id, TrialState.FAIL))
        except UpdateFinishedTrialError:
            return False
        return True

    # ---------------------------------------------------------------- ending

    def report(self, trial: Attempt, value: float, step: int) -> None:
        """Tells Optuna a point of a curve. Raises UpdateFinishedTrialError when the trial was
        given to another process."""
        write = self._storage.set_trial_intermediate_value
        patiently(partial(write, trial.trial_id, step, float(value)))

    def settle(
        self,
        trial: Attempt,
        record: TrialRecord,
        *,
        value: float | None,
        state: TrialState,
        constraints: dict[str, float],
    ) -> None:
        """Writes constraints, then the record, then finishes the trial.

        With the record written the trial is as good as settled: should the process die before
        the last write, `recover_orphans` makes it up. The result of a trial that was given to
        another process meanwhile is dropped. ``value`` is that of a complete or pruned trial.
        """
        storage, trial_id = self._storage, trial.trial_id
        told = value if state == TrialState.COMPLETE else None

        def write() -> None:
            for name, violation in constraints.items():
                storage.set_trial_system_attr(trial_id, f"{_CONSTRAINTS_KEY}:{name}", violation)
            verdict = {"state": state.name, "value": told}
            storage.set_trial_user_attr(trial_id, "verdict", verdict)
            storage.set_trial_user_attr(trial_id, "record", record.to_json())
            values = None if value is None or state == TrialState.FAIL else [float(value)]
            storage.set_trial_state_values(trial_id, state, values)

        try:
            patiently(write)
        except UpdateFinishedTrialError:
            pass  # it was given to another process, or ended although no answer came
        finally:
            self._pulse.drop(trial_id)

    def abandon(self, trial: Attempt) -> None:
        """Gives up a running trial without a result and puts it back to be run again."""
        self._pulse.drop(trial.trial_id)
        if self._fail(trial.trial_id):
            self._put_back(trial.number, trial.begun.spec, trial.deaths)

    # ---------------------------------------------------------------- recovering

    def recover_orphans(
        self, *, is_alone: bool = False, spares_own: bool = False, limit: int | None = None
    ) -> int:
        """Puts trials of processes that no longer live back to be run again; how many there were.

        An orphan is failed, not retried in place: a retried trial would inherit what the dead
        process had already reported. One whose record was already written is finished instead, and
        one that processes died of `MOST_DEATHS` times is settled as failed.
        ``is_alone`` says that no other process can be at this study, on whatever host it was.
        ``spares_own`` leaves alone what this ledger has begun and not ended: that process is in the
        middle of it. Otherwise such a trial is left from an earlier call.
        """
        running = patiently(self._stored.running)
        orphans = running if is_alone else patiently(lambda: self._watch.orphans(running))
        if spares_own:
            orphans = [orphan for orphan in orphans if not self._pulse.has(orphan.trial_id)]
        ended = [orphan.number for orphan in orphans if self._end(orphan, limit)]
        now = time.monotonic()
        num_lost = 0
        for attempt in list(self.attempts().lost()):
            # Whoever has just ended one is about to put it back.
            since = self._lost_since.setdefault(attempt.number, now)
            if is_alone or attempt.number in ended or now - since > LOST_SECONDS:
                self._put_back(attempt.number, attempt.begun.spec, attempt.deaths + 1)
                num_lost += 1
        return num_lost

    def _end(self, orphan: StoredTrial, limit: int | None) -> bool:
        """Takes a trial from its dead process; whether it is this process's to put back."""
        if "record" in orphan.user_attrs:
            told = orphan.user_attrs["verdict"]
            state = TrialState[told["state"]]
            with suppress(ValueError, UpdateFinishedTrialError):
                patiently(lambda: self.study.tell(orphan.number, told["value"], state=state))
            return False
        if "spec" not in orphan.user_attrs:
            return self._fail(orphan.trial_id)
        attempt = self.attempts().numbered(orphan.number)
        if self.seen.must_not_run(orphan.number, limit):
            self._withdraw(attempt)
            return False
        if attempt.deaths + 1 >= MOST_DEATHS:
            self._settle_lost(attempt, orphan.user_attrs.get("worker"))
            return False
        return self._fail(orphan.trial_id)

    def _settle_lost(self, trial: Attempt, worker: dict[str, Any] | None) -> None:
        """Ends a trial that kills whoever runs it: others must not die of it, too."""
        name = None if worker is None else f"{worker['host']}:{worker['pid']}"
        error = f"its process died {MOST_DEATHS} times"
        record = lost_record(trial.number, trial.begun.spec, error, name)
        self.settle(trial, record, value=None, state=TrialState.FAIL, constraints={})

    def _put_back(self, number: int, spec: TrialSpec, deaths: int = 0) -> None:
        """``deaths`` are the processes that died of it so far."""
        again = replace(spec, retry_of=number)
        added = self._add(TrialState.WAITING, again, {"deaths": deaths})
        if self.seen.is_doubled(added.number):
            self._withdraw(added)
