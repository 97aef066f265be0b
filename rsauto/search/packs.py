"""Search trials that share the device: several in one pass, a slot refilled as soon as it is free.

What is decided here is only when a trial runs. What it is, and what it knows of others, does not
depend on it (see `history`), and its result only by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

from rsauto.memory.kinds import Prediction
from rsauto.records import Outcome, TrialRecord, TrialSpec
from rsauto.search.agenda import num_settled
from rsauto.search.attempts import Attempt
from rsauto.search.books import Books, Ending
from rsauto.search.events import Event, PackShrank, TrialSettled, TrialStarted, TrialStep
from rsauto.search.history import Settled
from rsauto.search.pack_size import PackPlan
from rsauto.search.pruning import Rival, cohort_of, comparable, goes_on, is_telling, rivals, rungs
from rsauto.search.write_up import packed_record
from rsauto.training.member import Advance, Member
from rsauto.training.packed import Pack
from rsauto.training.trial import Bench, OutOfMemory


@dataclass(frozen=True)
class Entrant:
    """A trial that has been begun in the ledger."""

    trial: Attempt
    spec: TrialSpec
    known: Settled
    """Of the others, what it is compared with."""


@dataclass(frozen=True)
class _Running:
    """A trial of the pack."""

    entrant: Entrant
    member: Member
    prediction: Prediction
    """Of the trial alone, which is what its rank costs."""

    @property
    def number(self) -> int:
        return self.entrant.trial.number


NextEntrant = Callable[[list[TrialSpec], list[int]], Entrant | None]
"""Begins the next trial that may join those with these specs and numbers; None where none may."""

Events = Generator[Event, None, None]


class PackRun:
    """One pack, from its first trial until it is empty."""

    def __init__(
        self,
        books: Books,
        bench: Bench,
        plan: PackPlan,
        next_entrant: NextEntrant,
        put_back: set[int],
    ) -> None:
        """``put_back`` gathers the numbers of trials that were put back to be run alone."""
        self.books = books
        self.plan = plan
        """How many, as out of memory has taught."""
        self.error: str | None = None
        """What ended the pack before its trials were done."""
        self._next_entrant = next_entrant
        self._put_back_numbers = put_back
        self._pack = Pack(bench, optimizer=plan.optimizer, rows=plan.rows, tokens=plan.tokens)
        self._running: list[_Running] = []
        self._at_rung: list[_Running] = []
        """Of them those that stand still until all of their cohort have come to the rung."""
        self._passed: list[_Running] = []
        """Of them those that a rung has let through, as soon as there is room."""
        self._is_full = False
        """Nobody else may join until one of the trials has ended."""
        self._is_open = True
        """Nobody has taken a step since the last were let in."""
        self._id = ""

    def events(self, first: Entrant) -> Events:
        """Trains ``first`` and all that join it."""
        self._id = f"pack-{first.trial.number}"
        with self._pack:
            yield from self._admit(first)
            while self._running:
                yield from self._pass_rungs()
                self._is_open = self._is_open or not self._moving
                yield from self._fill()
                if not self._moving:
                    continue
                self._is_open = False
                try:
                    advances = self._pack.advance()
                except Exception as error:  # whose fault it is shows when each runs alone
                    self.error = f"{type(error).__name__}: {error}"
                    self._put_back(self._running)
                    return
                yield from self._shrink()
                for advance in advances:
                    yield from self._take(advance)
                if self.books.stop.requested:
                    self._stop()

    def _stop(self) -> None:
        for running in self._running:
            self.books.abandon(running.entrant.trial)
        self.books.stop_if_asked()

    @property
    def _moving(self) -> list[_Running]:
        still = [id(running) for running in (*self._at_rung, *self._passed)]
        return [running for running in self._running if id(running) not in still]

    def _fill(self) -> Events:
        """Lets in whoever is next, as long as there is room: those that have passed a rung first.

        In a pack that is filled together only once nobody moves.
        """
        if self.plan.admission == "together" and not self._is_open:
            return
        while len(self._moving) < self.plan.size and self._pack.has_room:
            if self._passed:
                self._pack.resume(self._passed.pop(0).member)
                continue
            if self._is_full or (self._at_rung and self._is_whole(self._at_rung[0].member.spec)):
                return  # the last of a cohort is on its way to the others
            specs = [running.entrant.spec for running in self._moving]
            entrant = self._next_entrant(specs, [running.number for running in self._running])
            if entrant is None:
                self._is_full = True
                return
            yield from self._admit(entrant)

    # ---------------------------------------------------------------- rungs

    def _stops_at_rung(self, member: Member) -> bool:
        """Whether a trial has come to a rung of its cohort."""
        halves = self.books.setup.config.search.chosen_pruner == "halving"
        return halves and member.spec.cohort is not None and member.steps_done in rungs(member.spec)

    def _pass_rungs(self) -> Events:
        """Lets the better trials of a cohort through a rung, and ends the others.

        As soon as all of the cohort have begun, and all that are in this pack stand at a rung.
        """
        if self.books.stop.requested:
            self._stop()  # half a cohort decides nothing
        for cohort in dict.fromkeys(cohort_of(r.member.spec) for r in self._at_rung):
            of_it = [r for r in self._running if cohort_of(r.member.spec) == cohort]
            group = [r for r in self._at_rung if cohort_of(r.member.spec) == cohort]
            if len(group) < len(of_it) or not self._is_whole(group[0].member.spec):
                continue
            step = min(running.member.steps_done for running in group)
            for running, stays in self._decided(group, step):
                self._at_rung = [other for other in self._at_rung if other is not running]
                if stays:
                    self._passed.append(running)
                else:
                    yield from self._end(running, "pruned")

    def _is_whole(self, spec: TrialSpec) -> bool:
        """Whether all trials of a cohort are here or have ended, or no other can begin now.

        One that waits to be run again, after an interruption, is neither.
        """
        here = [running.number for running in self._running]
        begun = sum(
            cohort_of(trial.spec) == cohort_of(spec)
            and (trial.record is not None or trial.number in here)
            for trial in self.books.ledger.history().trials
        )
        return begun >= (spec.cohort_size or 0) or (self._is_full and not self._moving)

    def _decided(self, group: Sequence[_Running], step: int) -> list[tuple[_Running, bool]]:
        """Of the group's trials that stand at ``step``, whether each goes on."""
        objective, spec = self.books.objective, group[0].member.spec
        steps = rungs(spec)
        mates = comparable(spec, self.books.ledger.settled())

        def at(step: int, leave_out: _Running | None = None) -> list[Rival]:
            of_group = [
                Rival(running.member.spec.learning_rate, objective.lower(point))
                for running in group
                for point in running.member.curve
                if point.step == step and running is not leave_out
            ]
            return rivals(objective, mates, step) + of_group

        standing = [running for running in group if running.member.steps_done == step]
        if not is_telling(objective, at(step)):
            return [(running, True) for running in standing]
        return [
            (running, goes_on(
                Rival(running.member.spec.learning_rate, objective.lower(running.member.curve[-1])),
                at(step, running), steps.index(step), len(steps), len(at(steps[0])),
            ))
            for running in standing
        ]  # fmt: skip

    # ---------------------------------------------------------------- one trial

    def _admit(self, entrant: Entrant) -> Events:
        prediction = self.books.setup.predict(entrant.spec)
        if prediction is None:
            yield from self._settled(self.books.refuse(entrant.trial, entrant.spec))
            return
        try:
            member = self._pack.admit(entrant.spec)
        except Exception:  # for want of memory or whatever else: alone it may run, or will tell
            self._put_back_to_run_alone(entrant)
            return
        self._running.append(_Running(entrant, member, prediction))
        yield TrialStarted(entrant.trial.number, member.spec, prediction)

    def _take(self, advance: Advance) -> Events:
        """What a step gave for one trial: goes on, or ends it."""
        running = next(r for r in self._running if r.member is advance.member)
        member, entrant = running.member, running.entrant
        if isinstance(advance.error, OutOfMemory):
            self._put_back([running])
            return
        if advance.error is not None:
            yield from self._end(running, "diverged", str(advance.error))
            return
        assert advance.point is not None, "a step gives a point or an error"
        yield TrialStep(running.number, member.spec, advance.point, None)
        if member.is_finished:
            harm = self.books.harm(member.curve)
            yield from self._end(running, *(harm or Ending("complete")))
        elif advance.point.evaluation is not None:
            known: Settled = () if self._stops_at_rung(member) else entrant.known
            ending = self.books.report(entrant.trial, member.spec, member.curve, known)
            if ending is not None:
                yield from self._end(running, *ending)
            elif self._stops_at_rung(member):
                self._pack.hold(member)
                self._at_rung.append(running)
                self._is_full = False  # who found no room beside it may find some now

    def _end(self, running: _Running, outcome: Outcome, error: str | None = None) -> Events:
        trial = running.entrant.trial
        record = packed_record(
            trial.number, running.member, running.prediction, outcome, error,
            pack_id=self._id, pack_peak_bytes=self._pack.peak_bytes,
        )  # fmt: skip
        if outcome == "complete":
            folder, card = self.books.place_of(record)
            try:
                num_bytes = self._pack.save(running.member, folder, card)
            except OSError:
                raise  # a disk without room is the study's matter
            except Exception:  # whatever it is, alone it may be saved, or will tell
                self._put_back([running])
                return
            record = replace(record, adapter_bytes=num_bytes)
        self._leave(running)
        record = self.books.settle(trial, record)
        self.books.keep_adapters()
        yield from self._settled(record)

    def _settled(self, record: TrialRecord) -> Events:
        self.books.folder.write_records(self.books.ledger.records())
        yield TrialSettled(record, num_settled(self.books.ledger.settled()))

    def _shrink(self) -> Events:
        capacity = self._pack.capacity
        if capacity is not None and capacity < self.plan.size:
            self.plan = replace(self.plan, size=capacity)
            yield PackShrank(capacity)

    def _put_back(self, running: Sequence[_Running]) -> None:
        """Trials that are to run alone, where whatever is wrong with them is their own."""
        for one in list(running):
            self._leave(one)
            self._put_back_to_run_alone(one.entrant)

    def _put_back_to_run_alone(self, entrant: Entrant) -> None:
        self._put_back_numbers.add(entrant.trial.number)
        self.books.abandon(entrant.trial)

    def _leave(self, running: _Running) -> None:
        self._pack.release(running.member)
        self._is_full = False
        for held in (self._running, self._at_rung, self._passed):
            held[:] = [one for one in held if one is not running]
