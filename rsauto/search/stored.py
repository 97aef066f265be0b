"""What the books need of an Optuna study: which trials are new, and which have changed their state.

A study of thousands of trials is asked about several times for each of them, by every process. So
what was seen is not read again, and of a database only what is asked for: Optuna would read every
running trial anew each time, with its parameters and curve.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import optuna
from optuna.distributions import distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import (
    StudyModel,
    TrialModel,
    TrialParamModel,
    TrialUserAttributeModel,
)
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import ColumnElement, Connection, func, insert, or_, select, update

MOST_IDS = 1000
"""In one question to a database, all of which have a limit."""


@dataclass(frozen=True, slots=True)
class StoredTrial:
    """A trial as it is stored, without what Optuna alone makes use of."""

    trial_id: int
    number: int
    state: TrialState
    user_attrs: Mapping[str, Any]


class Stored(Protocol):
    """The trials of one study in its storage."""

    @property
    def num_seen(self) -> int:
        """Trials that were there when `changed` was last asked."""

    def changed(self) -> list[StoredTrial]:
        """Trials that are new or in another state than when this was last asked, by number.

        The attributes of a trial are written before it ends, so those of an ended one are whole;
        what is written to one that runs is not noticed.
        """

    def running(self) -> list[StoredTrial]:
        """Running trials with what is written of them now."""

    def add(self, trial: FrozenTrial) -> None:
        """Adds a running or waiting trial."""

    def take(self, trial_id: int) -> bool:
        """Makes a waiting trial a running one; False where another process was quicker."""


def stored(study: optuna.Study) -> Stored:
    """The fastest way to read a study."""
    backend = getattr(study._storage, "_backend", None)
    if isinstance(backend, RDBStorage):
        return _InDatabase(backend, study._study_id)
    return _InProcess(study)


class _InProcess:
    """Of a storage that holds the whole study in this process, as a journal does."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._unfinished: dict[int, TrialState] = {}
        self.num_seen = 0

    def changed(self) -> list[StoredTrial]:
        trials = self._study.get_trials(deepcopy=False)
        known = [n for n, state in self._unfinished.items() if trials[n].state != state]
        found = [_read(trials[n]) for n in (*known, *range(self.num_seen, len(trials)))]
        self.num_seen = len(trials)
        _note(self._unfinished, {trial.number: trial.state for trial in found})
        return found

    def running(self) -> list[StoredTrial]:
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [_read(trial) for trial in trials]

    def add(self, trial: FrozenTrial) -> None:
        self._study.add_trial(trial)

    def take(self, trial_id: int) -> bool:
        with suppress(UpdateFinishedTrialError):
            return self._study._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        return False


def _read(trial: FrozenTrial) -> StoredTrial:
    return StoredTrial(trial._trial_id, trial.number, trial.state, trial.user_attrs)


class _InDatabase:
    """Of a database, by Optuna's tables.

    Trials of one study get their ids in the order in which they become visible: Optuna locks the
    study for that.
    """

    def __init__(self, backend: RDBStorage, study_id: int) -> None:
        self._engine = backend.engine
        self._study_id = study_id
        self._of_study = TrialModel.study_id == study_id
        self._unfinished: dict[int, TrialState] = {}
        self._last_id = -1
        self.num_seen = 0

    def changed(self) -> list[StoredTrial]:
        is_new = TrialModel.trial_id > self._last_id
        with self._engine.connect() as connection:
            found = self._states(connection, or_(is_new, TrialModel.trial_id.in_(self._unfinished)))
            found = [row for row in found if self._unfinished.get(row[0]) != row[2]]
            trials = self._with_attributes(connection, found)
        if trials:
            self._last_id = max(self._last_id, trials[-1].trial_id)
            self.num_seen = max(self.num_seen, trials[-1].number + 1)
        _note(self._unfinished, {trial.trial_id: trial.state for trial in trials})
        return trials

    def running(self) -> list[StoredTrial]:
        with self._engine.connect() as connection:
            found = self._states(connection, TrialModel.state == TrialState.RUNNING)
            return self._with_attributes(connection, found)

    def add(self, trial: FrozenTrial) -> None:
        """As Optuna adds one, in six statements instead of thirty.

        While one process adds a trial every other one that begins one waits: the number that it
        gets is that of the trials before it.
        """
        trials = TrialModel.__table__
        begun = None if trial.datetime_start is None else trial.datetime_start.astimezone(UTC)
        row = {
            "study_id": self._study_id,
            "state": trial.state,
            "datetime_start": begun and begun.replace(tzinfo=None),
        }
        with self._engine.begin() as connection:
            is_it = StudyModel.study_id == self._study_id
            connection.execute(select(StudyModel.study_id).where(is_it).with_for_update()).one()
            key = connection.execute(insert(trials).values(row)).inserted_primary_key
            assert key is not None, "the id that the database gave"
            trial_id = key[0]
            connection.execute(insert(TrialParamModel.__table__), [
                {"trial_id": trial_id, "param_name": name,
                 "param_value": distribution.to_internal_repr(trial.params[name]),
                 "distribution_json": distribution_to_json(distribution)}
                for name, distribution in trial.distributions.items()
            ])  # fmt: skip
            connection.execute(insert(TrialUserAttributeModel.__table__), [
                {"trial_id": trial_id, "key": name, "value_json": json.dumps(value)}
                for name, value in trial.user_attrs.items()
            ])  # fmt: skip
            before = select(func.count()).where(self._of_study, TrialModel.trial_id < trial_id)
            number = connection.execute(before).scalar_one()
            numbered = update(trials).where(trials.c.trial_id == trial_id)
            connection.execute(numbered.values(number=number))

    def take(self, trial_id: int) -> bool:
        """In one statement: Optuna reads the state and then writes it, which with SQLite, that
        locks no rows, two processes may do at the same time."""
        trials, now = TrialModel.__table__, datetime.now(UTC).replace(tzinfo=None)
        is_it = (trials.c.trial_id == trial_id, trials.c.state == TrialState.WAITING)
        taken = {"state": TrialState.RUNNING, "datetime_start": now}
        with self._engine.begin() as connection:
            return connection.execute(update(trials).where(*is_it).values(taken)).rowcount == 1

    def _states(
        self, connection: Connection, condition: ColumnElement[bool]
    ) -> list[tuple[int, int, TrialState]]:
        query = select(TrialModel.trial_id, TrialModel.number, TrialModel.state)
        query = query.where(self._of_study, condition).order_by(TrialModel.trial_id)
        return [(trial_id, number, state) for trial_id, number, state in connection.execute(query)]

    def _with_attributes(
        self, connection: Connection, rows: Sequence[tuple[int, int, TrialState]]
    ) -> list[StoredTrial]:
        attributes: dict[int, dict[str, Any]] = {trial_id: {} for trial_id, _, _ in rows}
        model, ids = TrialUserAttributeModel, list(attributes)
        query = select(model.trial_id, model.key, model.value_json)
        for start in range(0, len(ids), MOST_IDS):
            of_these = model.trial_id.in_(ids[start : start + MOST_IDS])
            for trial_id, key, value in connection.execute(query.where(of_these)):
                attributes[trial_id][key] = json.loads(value)
        return [StoredTrial(*row, attributes[row[0]]) for row in rows]


def _note(unfinished: dict[int, TrialState], states: Mapping[int, TrialState]) -> None:
    """Keeps the states of those that may still change."""
    unfinished.update(states)
    for key in [key for key, state in states.items() if state.is_finished()]:
        del unfinished[key]
