"""A worker: one more process at a study that another one holds the folder of.

All it needs is in the study's storage: configuration, what the untouched model scores, and every
record. Its adapters go to the study's folder where it can see it; elsewhere they are not kept, and
whoever holds the folder trains again those that are the answer.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
from optuna.storages import BaseStorage

from rsauto.base import pick_device
from rsauto.config import StudyConfig
from rsauto.enclosed import require_enclosed
from rsauto.errors import (
    InputError,
    NotBegunError,
    StorageAwayError,
    StudyInterrupted,
    nearest,
)
from rsauto.search.agenda import num_settled
from rsauto.search.bench import load_bench, with_baseline
from rsauto.search.books import AdapterFolder, WorkersBooks
from rsauto.search.driver import disk_errors
from rsauto.search.events import Event, Planned, Searching, Stage, StudyEnded
from rsauto.search.folder import StudyFolder
from rsauto.search.identity import require_equal_inputs, stored_config
from rsauto.search.ledger import Ledger
from rsauto.search.objective import Objective
from rsauto.search.setup import Setup, device_bytes, set_up, with_allowance
from rsauto.search.storage import JournalUsers, close_storage, open_storage, patiently
from rsauto.search.work import Work
from rsauto.stop import StopFlag
from rsauto.storage_url import shown
from rsauto.units import bytes_text

LOOK_SECONDS = 5.0
"""Between two looks for a study that is not begun yet."""


@dataclass(frozen=True)
class Joined:
    """A study in a storage that this process may work on."""

    where: str
    """How the user named it."""
    ledger: Ledger
    config: StudyConfig
    users: JournalUsers | None

    def leave(self) -> None:
        self.ledger.close()
        if self.users is not None:
            self.users.leave()


def join_when_begun(
    target: str,
    name: str | None = None,
    *,
    wait_seconds: float,
    stop: StopFlag,
    on_wait: Callable[[str], None],
) -> Joined:
    """As `join_study`; a study that is not begun yet, or a database that is away, is looked for
    again for so long.

    ``on_wait`` is told once what it is that is not there. Raises StudyInterrupted when it is asked
    to stop.
    """
    end = time.monotonic() + wait_seconds
    told = False
    while True:
        try:
            return join_study(target, name)
        except (NotBegunError, StorageAwayError) as error:
            if time.monotonic() >= end:
                waited = f" It was waited for, {wait_seconds:g} s." if wait_seconds else ""
                raise type(error)(f"{error}{waited}") from None
            if not told:
                on_wait(str(error))
                told = True
        _pause(min(LOOK_SECONDS, max(0.0, end - time.monotonic())), stop)


def _pause(seconds: float, stop: StopFlag) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if stop.requested:
            raise StudyInterrupted("Stopped before the study was begun.")
        time.sleep(min(left, 0.2))


def join_study(target: str, name: str | None = None) -> Joined:
    """Opens the study in the folder or storage ``target``.

    Raises StorageAwayError when it cannot be reached, NotBegunError when it has no study of that
    name yet, InputError when it never will or none is named.
    """
    if "://" in target:
        storage = open_storage(target, Path())
        try:
            return _joined(shown(target), storage, name, None)
        except BaseException:
            close_storage(storage)
            raise
    folder = StudyFolder(Path(target))
    if not folder.journal_file.is_file():
        raise NotBegunError(
            f"{target}: is no study folder with a journal. Give a folder such as runs/embedded, "
            "or, where the study's storage is a database, its URL and --study NAME."
        )
    require_enclosed(folder.path)
    users = JournalUsers(folder.journal_file)
    users.join()
    try:
        storage = open_storage(None, folder.journal_file)
        names = optuna.get_all_study_names(storage)
        if not names:
            raise _only_just_begun(target)
        return _joined(target, storage, name or names[0], users)
    except BaseException:
        users.leave()  # a host that begins now is to find itself alone
        raise


def _joined(
    where: str, storage: BaseStorage, name: str | None, users: JournalUsers | None
) -> Joined:
    names = patiently(lambda: optuna.get_all_study_names(storage))
    there = f"It has: {', '.join(sorted(names))}." if names else "It has none."
    if name is None:
        raise InputError(f"--study: must name the study of {where} to work on. {there}")
    if name not in names:
        raise (NotBegunError if users is None else InputError)(  # a folder is one study's for good
            f"--study {name}: the storage {where} has no such study.{nearest(name, names)} {there} "
            "rsauto study begins one."
        )
    ledger = Ledger.join(storage, name)
    stored = ledger.attributes().get("config")
    if stored is None:
        is_foreign = bool(ledger.study.get_trials(deepcopy=False))
        ledger.close()
        if is_foreign:
            raise InputError(
                f"--study {name}: the study of that name in {where} was not begun by rsauto. Give "
                "the name of one that was; rsauto study begins one."
            )
        raise _only_just_begun(where if users is not None else f"--study {name} in {where}")
    return Joined(where, ledger, stored_config(stored, where), users)


def _only_just_begun(what: str) -> NotBegunError:
    return NotBegunError(
        f"{what}: is only just being begun by its host, or was not begun by rsauto. Try again in a "
        "moment, or let the worker --wait for it."
    )


def worker_events(joined: Joined, *, stop: StopFlag | None = None) -> Iterator[Event]:
    """Works on a study until it is done.

    Raises InputError or BudgetError (nothing was started), StudyInterrupted when it is asked to
    stop, AllTrialsFailedError when no trial gave a result.
    """
    try:
        with _adapter_folder(joined.ledger) as (folder, is_shared):
            with disk_errors(folder):
                yield from WorkerRun(joined, folder, stop or StopFlag()).events(is_shared)
    finally:
        joined.leave()


class WorkerRun:
    """One worker's part of a study."""

    def __init__(self, joined: Joined, folder: AdapterFolder, stop: StopFlag) -> None:
        self.joined = joined
        self.ledger = joined.ledger
        self.folder = folder
        self.stop = stop
        self.stored: dict[str, Any] = {}
        self.begin = time.monotonic()

    def events(self, is_shared: bool) -> Iterator[Event]:
        """Everything from reading the data to the study's end."""
        ended = self.ledger.attributes().get("ended")
        if ended is not None:
            said = f"the study is finished ({ended}); nothing is left for a worker"
            yield StudyEnded(self.folder.path, time.monotonic() - self.begin, said)
            return
        yield Stage("reading model and data")
        setup = self._set_up()
        yield Planned(setup)
        require_equal_inputs(self.ledger, setup, self.joined.where)
        kept = "its adapters go to" if is_shared else "its adapters are not kept, for want of"
        yield Stage(f"{kept} the study's folder; loading the model")
        books = WorkersBooks(setup, self.folder, self.ledger, self.stop)
        books.stop_if_asked()
        bench, baseline = with_baseline(load_bench(setup), setup, self.ledger)
        books.objective = Objective.of(setup.config.search, baseline)
        yield Searching(num_settled(self.ledger.settled()), 0)

        def between() -> Iterator[Event]:
            if self.ledger.attributes()["config"] != self.stored:
                books.setup = with_allowance(self._set_up(), work.allowance.share)
                yield Planned(books.setup)

        work = Work(books, bench, is_shared=True, between=between, begin=self.begin)
        gc.collect()
        gc.freeze()
        try:
            yield from work.raise_allowance()
            reason = yield from work.events()
        finally:
            gc.unfreeze()
        said = f"{reason}; this worker ran {work.num_own} trials"
        yield StudyEnded(self.folder.path, time.monotonic() - self.begin, said)

    def _set_up(self) -> Setup:
        """The study as its storage has it now: whoever holds the folder may have widened it."""
        attributes = self.ledger.attributes()
        self.stored = attributes["config"]
        config = stored_config(self.stored, self.joined.where)
        if config.memory_budget == "auto":
            # A plan is for one budget, that of the device on which the study was begun.
            budget = attributes["memory_budget_bytes"]
            _require_room(budget, "the device on which the study was begun")
            config = config.model_copy(update={"memory_budget": budget})
        else:
            _require_room(config.memory_budget, "the study")
        return set_up(config)


def _require_room(budget: int, whose: str) -> None:
    """Raises InputError where this process's GPU is smaller than the ``budget`` in bytes."""
    device = pick_device()
    has = device_bytes(device)
    # A card that is sold as 24 GiB shows a little less; the host does not refuse it either.
    if device.type == "cuda" and has < 0.95 * budget:
        raise InputError(
            f"memory_budget: {whose} has {bytes_text(budget)}, and the device here "
            f"{bytes_text(has)}. Start the worker on a larger one, or give the study file a "
            "memory_budget that every worker can hold."
        )


def _adapter_folder(ledger: Ledger) -> AbstractContextManager[tuple[AdapterFolder, bool]]:
    """Where adapters go, and whether that is the study's own folder."""
    place = ledger.attributes().get("folder", {})
    folder = AdapterFolder(Path(place.get("path", "")))
    if place and folder.is_the_one(place["identity"]):
        require_enclosed(folder.path)
        return nullcontext((folder, True))
    return _Scratch()


class _Scratch(TemporaryDirectory[str]):
    """A folder for adapters that nobody will see."""

    def __enter__(self) -> tuple[AdapterFolder, bool]:  # type: ignore[override]
        return AdapterFolder(Path(super().__enter__())), False
