"""Trials, one after another or in packs, until none is left: what every process at a study does.

Several processes do this at the same time, on one ledger. What is proposed is decided by each alone
(see `proposals`), and the ledger sees to it that no point is begun twice and no more than are asked
for. A process that has nothing to begin because others must end first looks again after a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar
from zlib import crc32

from rsauto.config import StudyConfig
from rsauto.errors import AllTrialsFailedError, StudyInterrupted
from rsauto.records import TrialSpec
from rsauto.search import pack_memory
from rsauto.search.agenda import num_begun, num_settled, opening
from rsauto.search.allowance import Allowance, allowance_after
from rsauto.search.attempts import point
from rsauto.search.books import Books
from rsauto.search.events import (
    AllowanceRaised,
    Event,
    PackingDecided,
    Stage,
    TrialDropped,
    TrialSettled,
)
from rsauto.search.history import History, Settled
from rsauto.search.limits import limit_reached
from rsauto.search.pack_size import PackPlan, may_share, plan_packs
from rsauto.search.packs import Entrant, PackRun
from rsauto.search.proposals import REFERENCES, next_spec, why_no_more
from rsauto.search.setup import Setup, with_allowance
from rsauto.search.solo import run_alone
from rsauto.search.write_up import worker_name
from rsauto.training.trial import Bench

T = TypeVar("T")

RECOVERY_SECONDS = 5.0
"""Between two looks for trials of processes that died, while this one has trials to run."""

NEWS_SECONDS = 1.0
"""Between two looks at what other processes have settled, in the middle of a trial."""

POLL_SECONDS = 1.0
"""Before a process that has nothing to begin looks again."""


def nothing() -> Iterator[Event]:
    return iter(())


class Work:
    """The trials of one process, and how it goes about with those of others."""

    def __init__(
        self,
        books: Books,
        bench: Bench,
        *,
        is_shared: bool = False,
        between: Callable[[], Iterator[Event]] = nothing,
        poll_seconds: float = POLL_SECONDS,
        begin: float | None = None,
    ) -> None:
        """``between`` is called before every trial, and while others are waited for.

        ``begin`` is when the time limit began to run, by `time.monotonic`.
        """
        self.books = books
        self.ledger = books.ledger
        self.is_shared = is_shared
        """Whether other processes are, or have been, at the study."""
        self.num_own = 0
        """Trials that this process has settled."""
        self.num_failures = 0
        self._last_error: str | None = None
        self.allowance = Allowance()
        self._bench = bench
        self._between = between
        self._poll_seconds = poll_seconds
        self._begin_time = time.monotonic() if begin is None else begin
        self._must_wait = False
        self._asked: tuple[object, ...] = (None, None, None)
        self._answer: TrialSpec | None = None
        self._told = {record.number for record in self.ledger.records()}
        self._recovered = self._heard = time.monotonic()

    @property
    def setup(self) -> Setup:
        return self.books.setup

    @property
    def config(self) -> StudyConfig:
        return self.books.setup.config

    def events(self) -> Generator[Event, None, str]:
        """Runs trials; returns why there are no more."""
        packs: PackPlan | None = None
        put_back: set[int] = set()
        while True:
            yield from self.turn()
            reason = self._reason_to_end()
            if reason is not None:
                return reason
            if packs is None and self._is_searching():
                packs = self._plan_packs(self._bench)
                yield PackingDecided(packs)
            begun = self._begin(self._propose)
            if begun is None:
                if not self._must_wait:
                    yield from self._news()
                    history, objective = self.ledger.history(), self.books.objective
                    why = why_no_more(self.config, self.setup.space, history, objective)
                    return self._reason_to_end() or why
                yield from self._wait()
                continue
            if packs is not None and self._begins_pack(begun, packs, put_back):
                packs = yield from self._with_news(self._run_pack(packs, begun, put_back))
                continue
            record = yield from self._with_news(
                run_alone(self.books, self._bench, begun.trial, begun.spec, begun.known)
            )
            self.num_failures = self.num_failures + 1 if record.outcome == "failed" else 0
            self._last_error = record.error
            yield from self._news(ran=record.number)
            yield from self.raise_allowance()

    def until_others_end(self) -> Iterator[Event]:
        """Waits for trials that other processes still run, and takes over from those that die."""
        is_told = False
        while self.ledger.num_running():
            if not is_told:
                yield Stage("waiting for trials of other workers")
                is_told = True
            yield from self._wait()
            yield from self.turn()

    def turn(self) -> Iterator[Event]:
        """What is seen to before every trial."""
        self.books.folder.write_records(self.ledger.records())
        yield from self._between()
        self.books.stop_if_asked()
        self._stop_if_failing()
        if self.ledger.num_running():
            self.is_shared = True  # this process runs none at the moment
        self._recover_if_due()
        yield from self._news()

    def _wait(self) -> Iterator[Event]:
        self.setup.spread.tell("wait")  # processes that follow take silence for death
        end = time.monotonic() + self._poll_seconds
        while time.monotonic() < end:
            self.books.stop_if_asked()
            time.sleep(min(0.2, self._poll_seconds))
        self._recover()
        yield from self._news()

    def _recover_if_due(self, *, spares_own: bool = False) -> None:
        if self.is_shared and time.monotonic() - self._recovered > RECOVERY_SECONDS:
            self._recover(spares_own=spares_own)

    def _recover(self, *, spares_own: bool = False) -> None:
        """``spares_own`` while this process is in the middle of trials."""
        self.ledger.recover_orphans(spares_own=spares_own, limit=self.config.search.trials)
        self._recovered = time.monotonic()

    def _reason_to_end(self) -> str | None:
        """Why no further trial is begun, None where one may be."""
        if num_settled(self.ledger.settled()) >= self.config.search.trials:
            return "every trial is done"
        limit = limit_reached(
            self.config,
            self.ledger.settled(),
            time.monotonic() - self._begin_time,
            self._device_seconds(),
        )
        if limit is not None:
            return limit
        if not self.setup.space.ranks:
            return "no rank fits the memory budget any more"
        return self._ended_elsewhere()

    def _ended_elsewhere(self) -> str | None:
        """Why whoever holds the folder has ended the study, None while it goes on."""
        ended: str | None = self.ledger.attributes().get("ended") if self.is_shared else None
        return ended

    def _device_seconds(self) -> float:
        """How long all processes of all runs have held their devices; this one says so, too."""
        if self.config.search.max_gpu_hours is None:
            return 0.0
        own = f"device_seconds:{worker_name()}:{self._begin_time:.0f}"
        held = (time.monotonic() - self._begin_time) * self.setup.spread.size
        self.ledger.set_attribute(own, held)
        known = self.ledger.attributes()
        return sum(float(v) for name, v in known.items() if name.startswith("device_seconds:"))

    # ---------------------------------------------------------------- what others do

    def _with_news(self, events: Generator[Event, None, T]) -> Generator[Event, None, T]:
        """Events of this process's trials, and between them what others settled meanwhile."""
        while True:
            try:
                event = next(events)
            except StopIteration as end:
                value: T = end.value
                return value
            if isinstance(event, TrialSettled):
                yield from self._news(ran=event.record.number)
                continue
            yield event
            self._recover_if_due(spares_own=True)
            if self.is_shared and time.monotonic() - self._heard > NEWS_SECONDS:
                yield from self._news()

    def _news(self, ran: int | None = None) -> Iterator[Event]:
        """Trials that were settled since this was last asked, whoever ran them.

        ``ran`` is one that this process has just ended.
        """
        self._heard = time.monotonic()
        settled = self.ledger.settled()
        for _, record in settled:
            if record.number not in self._told:
                self._told.add(record.number)
                is_own = record.worker == worker_name()
                self.num_own += is_own
                yield TrialSettled(record, num_settled(settled), None if is_own else record.worker)
        if ran is not None and ran not in self._told:
            yield TrialDropped(ran)

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
        plan = plan_packs(self.setup, bench, opening(self.setup.space), min(chosen.trials, limit))
        if chosen.lookahead is not None or (asked is None and plan.size > 1):
            self.ledger.set_lookahead(chosen.lookahead or plan.size)
        return plan

    def _joins(
        self, spec: TrialSpec, others: list[TrialSpec], plan: PackPlan, put_back: set[int]
    ) -> bool:
        """Whether a trial may run with these others, or in a pack that it begins."""
        return (
            (plan.size > 1 or (plan.can_hold and spec.cohort is not None))
            and spec.role == "search"
            and spec.retry_of not in put_back
            and not self.ledger.has_last_chance(spec)
            and may_share(spec, others)
            and pack_memory.fits(self.setup, [*others, spec], plan.rows)
        )

    def _begins_pack(self, first: Entrant, plan: PackPlan, put_back: set[int]) -> bool:
        """Whether there is a second trial to run with this one now."""
        if not self._joins(first.spec, [], plan, put_back):
            return False
        if first.spec.cohort is not None:
            return True
        second = self.ledger.waiting_spec() or self._propose()
        return second is not None and self._joins(second, [first.spec], plan, put_back)

    def _run_pack(
        self, plan: PackPlan, first: Entrant, put_back: set[int]
    ) -> Generator[Event, None, PackPlan]:
        """Runs a pack until it is empty; the plan for the next one."""

        def next_entrant(specs: list[TrialSpec], _running: list[int]) -> Entrant | None:
            if self.books.stop.requested or self._reason_to_end() is not None:
                return None

            def propose() -> TrialSpec | None:
                spec = self._propose()
                if spec is None or not self._joins(spec, specs, plan, put_back):
                    return None
                return spec

            waiting = self.ledger.waiting_spec()
            if waiting is not None and not self._joins(waiting, specs, plan, put_back):
                return None
            entrant = self._begin(propose)
            if entrant is not None and not self._joins(entrant.spec, specs, plan, put_back):
                # Another process has taken the one that waited, and this is the next.
                self.books.abandon(entrant.trial)
                return None
            return entrant

        run = PackRun(self.books, self._bench, plan, next_entrant, put_back)
        yield from run.events(first)
        if run.error is None:
            return run.plan
        stopped = PackPlan(size=1, reason=f"a pack failed: {run.error}")
        yield PackingDecided(stopped)
        return stopped

    # ---------------------------------------------------------------- what is next

    def _begin(self, propose: Callable[[], TrialSpec | None]) -> Entrant | None:
        """Begins the next trial: one to be run again, or what ``propose`` has."""
        begun = self.ledger.begin(propose, limit=self.config.search.trials)
        if begun is None:
            return None
        if self._ended_elsewhere() is not None:  # while this one was proposed
            self.ledger.give_back(begun[0])
            return None
        return Entrant(*begun, self._known_to(self.ledger.seen.history, begun[0].number))

    def _known_to(self, history: History, number: int) -> Settled:
        """With what a trial is compared."""
        if self._is_asynchronous:
            return history.settled
        position = history.position_of(number)
        return history.known_to(position, self.ledger.lookahead or 1).settled

    @property
    def _is_asynchronous(self) -> bool:
        """Whether proposals know all that is settled, and so depend on who is how fast.

        With several processes nobody waits for anybody, unless the study file says how far to look
        ahead.
        """
        return self.is_shared and self.config.packing.lookahead is None

    def _propose(self) -> TrialSpec | None:
        """The next new trial; None where there is none, or it waits for one that is running."""
        history = self.ledger.seen.history  # everybody who asks has just read
        pending = [trial for trial in history.trials if trial.record is None]
        self._must_wait = bool(pending)
        if num_begun(history) >= self.config.search.trials:
            return None
        if not self._is_asynchronous and any(t.spec.role in REFERENCES for t in pending):
            return None  # everything after the defaults knows how they ended
        asked = (history, self.setup, self.ledger.lookahead)
        if all(now is then for now, then in zip(asked, self._asked, strict=True)):
            return self._answer  # a search may take long to propose, and is asked at every step
        config, lookahead = self.config, self.ledger.lookahead or 1
        if self._is_asynchronous:
            config = self._with_own_seed(config)
            # With what runs put last, looking past it leaves out nothing that is known.
            ended = [trial for trial in history.trials if trial.record is not None]
            history, lookahead = History((*ended, *pending)), len(pending) + 1
        spec = next_spec(
            config,
            self.setup.space,
            history,
            self.books.objective,
            lookahead=lookahead,
            running=[] if self._is_asynchronous else [trial.number for trial in pending],
        )
        if spec is not None and any(point(spec) == point(trial.spec) for trial in pending):
            spec = None  # what the agenda asks for is running elsewhere
        self._asked, self._answer = asked, spec
        return spec

    def _with_own_seed(self, config: StudyConfig) -> StudyConfig:
        """Settings by which this process draws other points than those that ask beside it.

        The trials themselves keep the study's seed, which the space gives them.
        """
        own = config.training.seed + crc32(worker_name().encode())
        training = config.training.model_copy(update={"seed": own})
        return config.model_copy(update={"training": training})

    def raise_allowance(self) -> Iterator[Event]:
        """Learns from trials that needed more memory than predicted, those of earlier runs too."""
        found = allowance_after(
            (record for _, record in self.ledger.settled()), self.setup.planner.outside_bytes
        )
        if found.share > self.allowance.share:
            self.allowance = found
            self.books.setup = with_allowance(self.setup, found.share)
            yield AllowanceRaised(found, self.setup.space.ranks)

    def _stop_if_failing(self) -> None:
        """Failures of earlier runs do not count: what caused them may have been mended."""
        limit = self.config.search.max_failures
        if self.num_failures < limit:
            return
        settled = [r for _, r in self.ledger.settled() if r.outcome != "infeasible"]
        self.books.write_report()
        message = f"{limit} trials in a row failed, the last with: {self._last_error}."
        if all(r.outcome == "failed" for r in settled):
            raise AllTrialsFailedError(f"{message} No trial gave a result.")
        raise StudyInterrupted(f"{message} The same command continues after it is mended.")
