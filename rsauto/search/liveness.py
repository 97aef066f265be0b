"""Which trials still have a living process behind them, and telling others that one's own have."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.storages._heartbeat import BaseHeartbeat
from sqlalchemy.exc import SQLAlchemyError

from rsauto.search.stored import StoredTrial

NAMELESS_SECONDS = 30.0
"""How long a running trial may be without the name of its worker, which is written at once."""


def this_worker() -> dict[str, Any]:
    """Names this process so that another can tell whether it still lives."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pids": _pid_space(), "pid": pid, "born": born(pid)}


def born(pid: int) -> str | float:
    """When a process was started, for comparison with itself. Raises psutil.NoSuchProcess.

    On Linux the boot and the clock ticks since then: psutil's seconds since 1970 move with the
    system clock, by which a living process would be taken for another.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # proc(5): field 22; the second, the name in brackets, may have blanks of its own.
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return psutil.Process(pid).create_time()
    return f"{boot}:{ticks}"


def _same_start(one: str | float, other: str | float) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return abs(one - other) < 1.0


def _pid_space() -> str | None:
    """Where the pid means something: two containers of one host may have the same name."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def is_here(worker: dict[str, Any]) -> bool:
    """Whether a worker is, or was, a process that this one would see."""
    return worker["host"] == socket.gethostname() and worker.get("pids") == _pid_space()


def worker_lives(worker: dict[str, Any] | None) -> bool:
    """Whether another process may still be at a trial; one on another host is trusted to be."""
    if worker is None or worker == this_worker():
        return False
    if not is_here(worker):
        return True
    try:
        process = psutil.Process(worker["pid"])
        same = _same_start(born(process.pid), worker["born"])
        # A killed process stays a zombie where nobody waits for it, as in many containers.
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Watch:
    """Tells orphans from trials that somebody is at: by pid on this host, else by heartbeats."""

    def __init__(self, storage: BaseStorage, study_id: int) -> None:
        self._storage = storage
        self._study_id = study_id
        self._nameless_since: dict[int, float] = {}
        self._greeted: set[int] = set()

    def orphans(self, running: Sequence[StoredTrial]) -> list[StoredTrial]:
        """Those of the running trials whose process is gone."""
        now = time.monotonic()
        silent = self._silent(running)
        found = []
        for trial in running:
            worker = trial.user_attrs.get("worker")
            if worker is None:
                since = self._nameless_since.setdefault(trial.number, now)
                is_orphan = now - since > NAMELESS_SECONDS
            else:
                is_orphan = not worker_lives(worker) or trial.trial_id in silent
            if is_orphan:
                found.append(trial)
        return found

    def _silent(self, running: Sequence[StoredTrial]) -> set[int]:
        """Ids of trials of other hosts whose heartbeat stopped."""
        storage = self._storage
        workers = {trial.trial_id: trial.user_attrs.get("worker") for trial in running}
        away = {i for i, worker in workers.items() if worker is not None and not is_here(worker)}
        if not away or not _has_heartbeat(storage):
            return set()
        assert isinstance(storage, BaseHeartbeat)
        silent = set(storage._get_stale_trial_ids(self._study_id)) & away
        for trial_id in away - silent - self._greeted:
            # Its process may have died before its first heartbeat: without one it never gets old.
            storage.record_heartbeat(trial_id)
            self._greeted.add(trial_id)
        return silent


class Pulse:
    """Records heartbeats for the trials of this process, from a thread of its own.

    Optuna does so only inside `Study.optimize`.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self._trial_ids: set[int] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, trial_id: int) -> None:
        """This process is at the trial from now on."""
        self._trial_ids.add(trial_id)
        if self._thread is None and _has_heartbeat(self._storage):
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()

    def has(self, trial_id: int) -> bool:
        """Whether this process is at the trial."""
        return trial_id in self._trial_ids

    def drop(self, trial_id: int) -> None:
        self._trial_ids.discard(trial_id)

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _beat(self) -> None:
        assert isinstance(self._storage, BaseHeartbeat)
        interval = self._storage.get_heartbeat_interval()
        assert interval is not None
        while not self._stop.wait(interval):
            for trial_id in tuple(self._trial_ids):
                # One that is missed is made up by the next.
                with suppress(StorageInternalError, SQLAlchemyError):
                    self._storage.record_heartbeat(trial_id)


def _has_heartbeat(storage: BaseStorage) -> bool:
    return isinstance(storage, BaseHeartbeat) and storage.get_heartbeat_interval() is not None
