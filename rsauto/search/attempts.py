"""What the trials of a ledger amount to: which stands for which, what counts, who gives way.

An attempt that was cut short is retried by another one, which names it; a chain of attempts is one
trial of the study, in the place of its first. Any number of processes may add attempts at the same
time. None of them asks another: each adds its own, reads again, and, as numbers are given in order,
all come to the same verdict on which of them stand.

- Of several retries of one attempt only the first is one.
- A trial gives way to an earlier one of the same configuration and seed that whoever proposed it
  had not seen, and to as many earlier ones as the study is to have.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.trial import TrialState

from rsauto.records import SETTLED_OUTCOMES, TrialRecord, TrialSpec
from rsauto.search.history import Begun, History
from rsauto.search.stored import StoredTrial


def point(spec: TrialSpec) -> tuple[Any, ...]:
    """What no two trials of a study should have in common: configuration and seed."""
    return (spec.configuration(), spec.seed)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One Optuna trial, as it was read."""

    trial_id: int
    state: TrialState
    begun: Begun
    token: str | None
    """Of the process that began it."""
    unseen: int | None
    """Trials from this number on were not known when it was proposed."""
    is_withdrawn: bool
    deaths: int
    """Processes that died of earlier attempts."""
    point: tuple[Any, ...]

    @classmethod
    def of(cls, trial: StoredTrial) -> Attempt | None:
        """None for a trial that has no spec, and is nobody's."""
        known = trial.user_attrs
        if "spec" not in known:
            return None
        spec = TrialSpec.from_json(known["spec"])
        record = None
        if "record" in known and trial.state.is_finished():
            record = TrialRecord.from_json(known["record"])
        return cls(
            trial_id=trial.trial_id,
            state=trial.state,
            begun=Begun(trial.number, spec, record),
            token=known.get("token"),
            unseen=known.get("unseen"),
            is_withdrawn=bool(known.get("withdrawn")),
            deaths=known.get("deaths", 0),
            point=point(spec),
        )

    @property
    def number(self) -> int:
        return self.begun.number

    @property
    def counts(self) -> bool:
        """Whether it is one of the study's trials: it may be, or it has been."""
        record = self.begun.record
        return record is None or record.outcome in SETTLED_OUTCOMES


class Attempts:
    """Every attempt of a study, as it was last read."""

    def __init__(self) -> None:
        self._all: dict[int, Attempt] = {}
        self._waiting: set[int] = set()
        self._roots: dict[int, int] = {}
        self._first: dict[int, Attempt] = {}
        self._latest: dict[int, Attempt] = {}
        self._retried: set[int] = set()
        self._doubled: set[int] = set()
        self._by_token: dict[str, int] = {}

    def put(self, attempt: Attempt) -> None:
        """A new attempt, or a known one as it is now. New ones come in the order of their numbers.

        What retries what does not change, so only what is asked of all trials is gathered anew.
        """
        number = attempt.number
        if number not in self._all:
            self._link(attempt)
        self._all[number] = attempt
        root = self._roots[number]
        for place in (self._first, self._latest):
            if root in place and place[root].number == number:
                place[root] = attempt
        self._waiting.discard(number)
        if attempt.state == TrialState.WAITING:
            self._waiting.add(number)
        for name in ("trials", "history", "settled"):
            self.__dict__.pop(name, None)

    def _link(self, attempt: Attempt) -> None:
        number, retried = attempt.number, attempt.begun.spec.retry_of
        if attempt.token is not None:
            self._by_token[attempt.token] = number
        root = number if retried is None else self._roots.get(retried, retried)
        self._roots[number] = root
        if retried is not None and retried in self._retried:
            self._doubled.add(number)
            return
        if retried is not None:
            self._retried.add(retried)
        self._first.setdefault(root, attempt)
        self._latest[root] = attempt

    @cached_property
    def trials(self) -> tuple[Attempt, ...]:
        """The latest attempt of every trial of the study, in the order of their first ones."""
        latest = [self._latest[root] for root in sorted(self._latest)]
        return tuple([attempt for attempt in latest if not attempt.is_withdrawn])

    @cached_property
    def history(self) -> History:
        return History(tuple([attempt.begun for attempt in self.trials]))

    @cached_property
    def settled(self) -> list[tuple[TrialSpec, TrialRecord]]:
        """Every trial that has ended, by number."""
        ended = [begun for begun in self.history.trials if begun.record is not None]
        ended.sort(key=lambda begun: begun.number)
        return [(begun.spec, begun.record) for begun in ended if begun.record is not None]

    def in_state(self, *states: TrialState) -> list[Attempt]:
        """Trials that are in one of these states, by number."""
        found = [attempt for attempt in self.trials if attempt.state in states]
        return sorted(found, key=lambda attempt: attempt.number)

    def waiting(self) -> list[Attempt]:
        """Attempts that nobody has taken up, by number, those that are doubled with them."""
        return [self._all[number] for number in sorted(self._waiting)]

    def lost(self) -> Iterator[Attempt]:
        """Trials that nobody is at and nobody will take up, for want of one more write.

        Whoever gave them up died before they were put back.
        """
        for attempt in self.trials:
            if attempt.state.is_finished() and attempt.begun.record is None:
                yield attempt

    def deaths_before(self, spec: TrialSpec) -> int:
        """Processes that died of the trial before this attempt at it."""
        if spec.retry_of is None:
            return 0
        return self._latest[self._roots.get(spec.retry_of, spec.retry_of)].deaths

    def is_doubled(self, number: int) -> bool:
        """Whether an earlier attempt retries the same one."""
        return number in self._doubled

    def must_not_run(self, number: int, limit: int | None) -> bool:
        """Whether an attempt, or the whole trial it is of, has to give way to an earlier one.

        ``limit`` is how many trials the study is to have; None is any number.
        """
        if self.is_doubled(number):
            return True
        root = self._roots[number]
        position = bisect_left(self.trials, root, key=lambda other: self._roots[other.number])
        before, first = self.trials[:position], self._first[root]
        for other in reversed(before):
            if first.unseen is None or self._roots[other.number] < first.unseen:
                break
            if other.point == first.point:
                return True
        if limit is None or position < limit:
            return False
        return sum(other.counts for other in before) >= limit

    def numbered(self, number: int) -> Attempt:
        """The attempt of this number."""
        return self._all[number]

    def with_token(self, token: str) -> Attempt | None:
        """The attempt that was added with this token, though it may have been retried since."""
        number = self._by_token.get(token)
        return None if number is None else self._all[number]
