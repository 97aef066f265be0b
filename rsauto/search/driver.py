"""The study, from the first default to the report: a generator of events that reads in order.

This is the process that holds the study's folder. It works on trials like any other (see `work`),
and there may be others (see `workers`).
"""

from __future__ import annotations

import errno
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from rsauto.config import StudyConfig
from rsauto.environment import describe_environment
from rsauto.errors import StudyInterrupted
from rsauto.launch import Crew, NoCrew
from rsauto.records import TrialRecord
from rsauto.search.agenda import num_settled
from rsauto.search.bench import load_bench, with_baseline, with_memory_of
from rsauto.search.books import Books
from rsauto.search.events import CrewNotice, Event, Planned, Searching, Stage, StudyEnded
from rsauto.search.folder import StudyFolder
from rsauto.search.follow import leading
from rsauto.search.identity import claim, require_nothing_lost, require_own_journal
from rsauto.search.ledger import Ledger
from rsauto.search.objective import Objective
from rsauto.search.publish import publish
from rsauto.search.setup import Objects, Setup, probes, set_up
from rsauto.search.storage import JournalUsers, open_storage
from rsauto.search.work import Work
from rsauto.stop import StopFlag
from rsauto.training.loop import Diverged
from rsauto.training.spread import Spread, join
from rsauto.training.trial import Bench, OutOfMemory, Trial

_DISK_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG, errno.ENOENT,
}  # fmt: skip


def study_events(
    config: StudyConfig,
    out: Path,
    *,
    storage: str | None = None,
    objects: Objects | None = None,
    stop: StopFlag | None = None,
    crew: Crew | None = None,
    report: bool = True,
) -> Iterator[Event]:
    """Runs or continues the study of ``config`` in the folder ``out``, with the help of ``crew``.

    Without ``report`` page and table are left to `rsauto report`, also where the study ends early.

    Raises InputError or BudgetError (nothing was started), StudyInterrupted (the same call
    continues) or AllTrialsFailedError.
    """
    spread = join()
    with leading(spread):
        yield from _led_events(
            config, out, storage, objects, stop or StopFlag(), crew or NoCrew(), spread, report
        )


def _led_events(
    config: StudyConfig,
    out: Path,
    storage: str | None,
    objects: Objects | None,
    stop: StopFlag,
    crew: Crew,
    spread: Spread,
    report: bool,
) -> Iterator[Event]:
    begin = time.monotonic()
    folder = StudyFolder(out)
    folder.check(config)
    yield Stage("reading model and data")
    setup = set_up(with_memory_of(config, crew.num_on_this_host), objects, spread)
    yield Planned(setup)
    if storage is not None:
        open_storage(storage, folder.journal_file)  # a wrong URL is told before a folder is made
    if stop.requested:
        raise StudyInterrupted("Stopped before anything was started; the same command begins.")
    with disk_errors(folder), folder.locked():
        run = StudyRun(config, setup, folder, storage, stop, crew, begin, has_report=report)
        try:
            yield from run.events()
        finally:
            run.close()


class StudyRun:
    """One run of a study in this process, and the state its parts share."""

    def __init__(
        self,
        config: StudyConfig,
        setup: Setup,
        folder: StudyFolder,
        storage: str | None,
        stop: StopFlag,
        crew: Crew,
        begin: float,
        *,
        has_report: bool,
    ) -> None:
        """``config`` is the study's; that of ``setup`` has the memory of this process."""
        self.config = config
        self.folder = folder
        self.storage = storage
        self.crew = crew
        self.begin = begin
        self.environment = folder.read_environment()
        self.environment.pop("ended", None)  # of an earlier run
        # Nobody else can be at a journal that nobody else has open.
        self.users = JournalUsers(folder.journal_file) if storage is None else None
        is_alone = self.users is not None and self.users.join()
        opened = open_storage(storage, folder.journal_file)
        if storage is None:
            require_own_journal(opened, config, folder)
        self.ledger = Ledger.open(opened, config)
        self.books = Books(setup, folder, self.ledger, stop, has_report=has_report)
        self.environment["fingerprints"] = claim(self.ledger, config, setup, folder)
        self.num_orphans = self.ledger.recover_orphans(
            is_alone=is_alone, limit=config.search.trials
        )
        require_nothing_lost(folder, self.ledger)
        self.folder.write_config(config)

    def close(self) -> None:
        self.crew.stop()
        self.ledger.close()
        if self.users is not None:
            self.users.leave()

    @property
    def setup(self) -> Setup:
        return self.books.setup

    def events(self) -> Iterator[Event]:
        """Everything from loading the model to the published adapters."""
        yield Stage("loading the model")
        self.books.stop_if_asked()
        bench = self._describe(load_bench(self.setup))
        work = Work(
            self.books,
            bench,
            is_shared=self.crew.num_processes > 1,
            between=self._crew_notices,
            begin=self.begin,
        )
        yield from work.raise_allowance()
        self._record_ranks_that_do_not_fit()
        yield Searching(num_settled(self.ledger.settled()), self.num_orphans)
        started = self.crew.start(self.config.name, self.storage, self.folder.path)
        if started is not None:
            yield CrewNotice(started)
        # What is alive now stays alive: collections after each trial then look at little else.
        gc.collect()
        gc.freeze()
        try:
            reason = yield from work.events()
        finally:
            gc.unfreeze()
        self.ledger.set_attribute("ended", reason)
        yield from work.until_others_end()
        self.crew.stop()
        self.environment["ended"] = reason
        self.folder.write_environment(self.environment)
        yield Stage("publishing adapters")
        publish(
            self.folder,
            self.config,
            self.ledger.records(),
            self.environment,
            lambda record: self._train_again(bench, record),
        )
        if self.books.has_report:
            yield Stage("writing the report")
        self.books.write_report()
        yield StudyEnded(self.folder.path, time.monotonic() - self.begin, reason)

    def _crew_notices(self) -> Iterator[Event]:
        for text in self.crew.notices():
            yield CrewNotice(text)

    def _train_again(self, bench: Bench, record: TrialRecord) -> None:
        """Trains a settled configuration once more, to get back an adapter that was not kept."""
        spec = next(s for s, r in self.ledger.settled() if r.number == record.number)
        size, order = record.micro_batch_size, record.product_order
        spec = replace(spec, micro_batch_size=size, product_order=order)
        with Trial(bench, spec) as run:
            try:
                for _ in run.steps():
                    self.books.stop_if_asked()
                run.save(*self.books.place_of(record))
            except (OutOfMemory, Diverged) as error:
                raise StudyInterrupted(
                    f"The adapter of trial {record.number} is no longer there, or damaged, and "
                    f"training it again failed: {error}. The records are complete; try the same "
                    "command again."
                ) from None

    def _describe(self, bench: Bench) -> Bench:
        """Measures the untouched model once, and writes environment.json."""
        known = self.environment.get("baseline")
        bench, baseline = with_baseline(bench, self.setup, self.ledger, known)
        self.environment["baseline"] = asdict(baseline)
        self.environment.update(
            describe_environment(bench.device),
            model=self.setup.source.name,
            num_processes=self.setup.spread.size,
            memory_budget_bytes=self.setup.memory_budget_bytes,
            seed=self.config.training.seed,
            # Without the samples: a report is passed on, and rows of data are not for everyone.
            preflight={k: v for k, v in self.setup.preflight.to_json().items() if k != "samples"},
        )
        self.folder.write_environment(self.environment)
        self.books.objective = Objective.of(self.config.search, baseline)
        return bench

    def _record_ranks_that_do_not_fit(self) -> None:
        """One record for every rank of the space that the budget rules out, with what it needs."""
        known = {record.rank for _, record in self.ledger.settled()}
        # One that a killed process was about to refuse waits to be run again.
        known |= {spec.rank for spec in self.ledger.unfinished_specs()}
        fitting = self.setup.space.ranks
        for rank in self.config.search.ranks:
            if not fitting or rank in fitting or rank in known:
                continue
            spec = probes(self.setup, rank)[0]
            trial, spec = self.ledger.begin_new(spec)
            self.books.refuse(trial, spec)


@contextmanager
def disk_errors(folder: StudyFolder) -> Iterator[None]:
    """A disk that refuses to be written ends the study, resumable, with one clear message."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRNOS:
            raise
        raise StudyInterrupted(
            f"{error.filename or folder.path}: cannot be written: {error.strerror}. Settled trials "
            "are safe; make room or put the permissions right, and run the same command again."
        ) from None
