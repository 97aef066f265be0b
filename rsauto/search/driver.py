"""The study, from the first default to the report: a generator of events that reads in order."""

from __future__ import annotations

import errno
import gc
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from rsauto.config import StudyConfig
from rsauto.data import fingerprint
from rsauto.environment import describe_environment
from rsauto.errors import AllTrialsFailedError, StudyInterrupted
from rsauto.records import TrialRecord, TrialSpec
from rsauto.search import pack_memory
from rsauto.search.agenda import (
    num_settled,
    opening,
)
from rsauto.search.allowance import Allowance, allowance_after
from rsauto.search.books import Books
from rsauto.search.events import (
    AllowanceRaised,
    Event,
    PackingDecided,
    Planned,
    Searching,
    Stage,
    StudyEnded,
    TrialSettled,
)
from rsauto.search.folder import StudyFolder
from rsauto.search.follow import leading, load_everywhere
from rsauto.search.identity import claim, require_nothing_lost
from rsauto.search.ledger import Ledger, drop_stale_lock, open_storage
from rsauto.search.objective import Objective
from rsauto.search.pack_size import PackPlan, may_share, plan_packs
from rsauto.search.packs import Entrant, PackRun
from rsauto.search.proposals import next_spec
from rsauto.search.publish import publish
from rsauto.search.setup import Objects, Setup, probes, set_up, with_allowance
from rsauto.search.solo import run_alone
from rsauto.stop import StopFlag
from rsauto.training.evaluate import Evaluation
from rsauto.training.loop import Diverged
from rsauto.training.spread import Spread, join
from rsauto.training.trial import Bench, OutOfMemory, Trial, untouched

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
) -> Iterator[Event]:
    """Runs or continues the study of ``config`` in the folder ``out``.

    Raises InputError or BudgetError (nothing was started), StudyInterrupted (the same call
    continues) or AllTrialsFailedError.
    """
    spread = join()
    with leading(spread):
        yield from _led_events(config, out, storage, objects, stop or StopFlag(), spread)


def _led_events(
    config: StudyConfig,
    out: Path,
    storage: str | None,
    objects: Objects | None,
    stop: StopFlag,
    spread: Spread,
) -> Iterator[Event]:
    begin = time.monotonic()
    folder = StudyFolder(out)
    folder.check(config)
    yield Stage("reading model and data")
    setup = set_up(config, objects, spread)
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
        self.config = setup.config
        self.folder = folder
        self.begin = begin
        self.environment = folder.read_environment()
        self.num_failures = 0
        self.allowance = Allowance()
        if storage is None:
            drop_stale_lock(folder.journal_file)
        self.ledger = Ledger.open(open_storage(storage, folder.journal_file), self.config)
        self.books = Books(setup, folder, self.ledger, stop)
        fingerprints = {"model": setup.source.fingerprint, "data": setup.data.fingerprint}
        if setup.data.general:
            fingerprints["text of data.forgetting"] = fingerprint(setup.data.general)
        claim(self.ledger, self.config, fingerprints, folder.path)
        self.environment["fingerprints"] = fingerprints
        # Nobody else can be at a journal: this process holds its folder.
        self.num_orphans = self.ledger.recover_orphans(is_alone=storage is None)
        require_nothing_lost(folder, self.ledger)
        self.folder.write_config(self.config)

    @property
    def setup(self) -> Setup:
        return self.books.setup

    def events(self) -> Iterator[Event]:
        """Everything from loading the model to the published adapters."""
        yield Stage("loading the model")
        self.books.stop_if_asked()
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
        packs: PackPlan | None = None
        put_back: set[int] = set()
        while True:
            self.folder.write_records(self.ledger.records())
            self.books.stop_if_asked()
            self._stop_if_failing()
            reason = self._reason_to_end()
            if reason is not None:
                return reason
            if packs is None and self._is_searching():
                packs = self._plan_packs(bench)
                yield PackingDecided(packs)
            begun = self._begin(self._propose)
            if begun is None:
                return "every point of the search space has been tried"
            if packs is not None and self._begins_pack(begun, packs, put_back):
                packs = yield from self._run_pack(bench, packs, begun, put_back)
                continue
            record = yield from run_alone(self.books, bench, begun.trial, begun.spec, begun.known)
            self.num_failures = self.num_failures + 1 if record.outcome == "failed" else 0
            yield TrialSettled(record, num_settled(self.ledger.settled()))
            yield from self._raise_allowance()

    def _reason_to_end(self) -> str | None:
        """Why no further trial is begun, None where one may be."""
        if num_settled(self.ledger.settled()) >= self.config.search.trials:
            return "every trial is done"
        limit = self.config.search.max_seconds
        if limit is not None and time.monotonic() - self.begin > limit:
            return f"the time limit of {limit:g} seconds was reached"
        if not self.setup.space.ranks:
            return "no rank fits the memory budget any more"
        return None

    # ---------------------------------------------------------------- several at once

    def _is_searching(self) -> bool:
        """Whether a search trial is next, so that it must be known how many run at once."""
        spec = self.ledger.waiting_spec() or self._propose()
        return spec is not None and spec.role == "search"

    def _plan_packs(self, bench: Bench) -> PackPlan:
        """How many search trials run at once, and with it how far proposals look ahead.

        Once some ran together that stays, so that a study continued on another machine asks the
        same.
        """
        asked, chosen = self.ledger.lookahead, self.config.packing
        limit = chosen.lookahead or asked or chosen.trials
        opening_trials = opening(self.setup.space)
        plan = plan_packs(self.setup, bench, opening_trials, min(chosen.trials, limit))
        if chosen.lookahead is not None or (asked is None and plan.size > 1):
            self.ledger.set_lookahead(chosen.lookahead or plan.size)
        return plan

    def _joins(
        self, spec: TrialSpec, others: list[TrialSpec], plan: PackPlan, put_back: set[int]
    ) -> bool:
        """Whether a trial may run with these others, or in a pack that it begins."""
        return (
            plan.size > 1
            and spec.role == "search"
            and spec.retry_of not in put_back
            and may_share(spec, others)
            and pack_memory.fits(self.setup, [*others, spec], plan.rows)
        )

    def _begins_pack(self, first: Entrant, plan: PackPlan, put_back: set[int]) -> bool:
        """Whether there is a second trial to run with this one now."""
        if not self._joins(first.spec, [], plan, put_back):
            return False
        second = self.ledger.waiting_spec() or self._propose([first.trial.number])
        return second is not None and self._joins(second, [first.spec], plan, put_back)

    def _run_pack(
        self, bench: Bench, plan: PackPlan, first: Entrant, put_back: set[int]
    ) -> Generator[Event, None, PackPlan]:
        """Runs a pack until it is empty; the plan for the next one."""

        def next_entrant(specs: list[TrialSpec], running: list[int]) -> Entrant | None:
            if self.books.stop.requested or self._reason_to_end() is not None:
                return None

            def propose() -> TrialSpec | None:
                spec = self._propose(running)
                if spec is None or not self._joins(spec, specs, plan, put_back):
                    return None
                return spec

            waiting = self.ledger.waiting_spec()
            if waiting is not None and not self._joins(waiting, specs, plan, put_back):
                return None
            return self._begin(propose)

        run = PackRun(self.books, bench, plan, next_entrant, put_back)
        yield from run.events(first)
        if run.error is None:
            return run.plan
        stopped = PackPlan(size=1, reason=f"a pack failed: {run.error}")
        yield PackingDecided(stopped)
        return stopped

    # ---------------------------------------------------------------- what is next

    def _begin(self, propose: Callable[[], TrialSpec | None]) -> Entrant | None:
        """Begins the next trial: one to be run again, or what ``propose`` has."""
        begun = self.ledger.begin(propose)
        if begun is None:
            return None
        history = self.ledger.history()
        position = history.position_of(begun[0].number)
        known = history.known_to(position, self.ledger.lookahead or 1)
        return Entrant(*begun, known.settled)

    def _propose(self, running: Sequence[int] = ()) -> TrialSpec | None:
        """The next new trial; None where there is none, or it waits for one that is running."""
        return next_spec(
            self.config,
            self.setup.space,
            self.ledger.history(),
            self.books.objective,
            lookahead=self.ledger.lookahead or 1,
            running=running,
        )

    def _raise_allowance(self) -> Iterator[Event]:
        """Learns from trials that needed more memory than predicted, those of earlier runs too."""
        found = allowance_after(
            (record for _, record in self.ledger.settled()), self.setup.planner.outside_bytes
        )
        if found.share > self.allowance.share:
            self.allowance = found
            self.books.setup = with_allowance(self.setup, found.share)
            yield AllowanceRaised(found, self.setup.space.ranks)

    # ---------------------------------------------------------------- before and around them

    def _train_again(self, bench: Bench, record: TrialRecord) -> None:
        """Trains a settled configuration once more, to get back an adapter that was not kept."""
        spec = next(s for s, r in self.ledger.settled() if r.number == record.number)
        size, order = record.micro_batch_size, record.product_order
        spec = replace(spec, micro_batch_size=size, product_order=order)
        with Trial(bench, spec) as run:
            try:
                for _ in run.steps():
                    self.books.stop_if_asked()
            except (OutOfMemory, Diverged) as error:
                raise StudyInterrupted(
                    f"The adapter of trial {record.number} is no longer there, and training it "
                    f"again failed: {error}. The records are complete; try the same command again."
                ) from None
            folder, card = self.books.place_of(record)
            run.save(folder, card)

    def _bench(self) -> Bench:
        loaded = load_everywhere(self.setup)
        return Bench(
            model=loaded.model,
            base_name=self.setup.source.name,
            data=self.setup.data,
            device=self.setup.device,
            fresh_parameters=loaded.fresh_parameters,
            spread=self.setup.spread,
        )

    def _describe(self, bench: Bench) -> Bench:
        """Measures the untouched model once, and writes environment.json."""
        if "baseline" not in self.environment:
            spec = self.setup.space.middle(self.setup.space.ranks[0])
            prediction = self.setup.predict(spec)
            size = prediction.micro_batch_size if prediction else 1
            result = untouched(bench, size, self.config.training.seed)
            general = {"forgetting": 0.0} if bench.data.general else {}
            self.environment["baseline"] = asdict(
                replace(result, metrics={**result.metrics, **general})
            )
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
        baseline = Evaluation(**self.environment["baseline"])
        self.books.objective = Objective.of(self.config.search, baseline)
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
            self.books.refuse(trial, spec)

    def _stop_if_failing(self) -> None:
        """Failures of earlier runs do not count: what caused them may have been mended."""
        limit = self.config.search.max_failures
        if self.num_failures < limit:
            return
        settled = [r for _, r in self.ledger.settled() if r.outcome != "infeasible"]
        self.books.write_unfinished_report()
        message = f"{limit} trials in a row failed, the last with: {settled[-1].error}."
        if all(r.outcome == "failed" for r in settled):
            raise AllTrialsFailedError(f"{message} No trial gave a result.")
        raise StudyInterrupted(f"{message} The same command continues after it is mended.")


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
