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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from rsauto.records import SETTLED_OUTCOMES, TrialRecord, TrialSpec
from rsauto.search.history import Begun, History


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
    def of(cls, trial: FrozenTrial) -> Attempt | None:
        """None for a trial that has no spec, and is nobody's."""
        known = trial.user_attrs
        if "spec" not in known:
            return None
        spec = TrialSpec.from_json(known["spec"])
        record = None
        if "record" in known and trial.state.is_finished():
            record = TrialRecord.from_json(known["record"])
        return cls(
            trial_id=trial._trial_id,
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
    """Every attempt of a study, by number."""

    def __init__(self, attempts: Sequence[Attempt]) -> None:
        self._roots: dict[int, int] = {}
        self._first: dict[int, Attempt] = {}
        self._latest: dict[int, Attempt] = {}
        self._retried: set[int] = set()
        self._doubled: set[int] = set()
        self._by_token: dict[str, Attempt] = {}
        for attempt in attempts:
            self._add(attempt)

    def _add(self, attempt: Attempt) -> None:
        number, retried = attempt.number, attempt.begun.spec.retry_of
        if attempt.token is not None:
            self._by_token[attempt.token] = attempt
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
        latest = self._latest
        return tuple(latest[root] for root in sorted(latest) if not latest[root].is_withdrawn)

    @cached_property
    def history(self) -> History:
        return History(tuple(attempt.begun for attempt in self.trials))

    @cached_property
    def settled(self) -> list[tuple[TrialSpec, TrialRecord]]:
        """Every trial that has ended, by number."""
        ended = sorted((a.number, a.begun) for a in self.trials if a.begun.record is not None)
        return [(b.spec, b.record) for _, b in ended if b.record is not None]

    def in_state(self, *states: TrialState) -> list[Attempt]:
        """Trials that are in one of these states, by number."""
        found = [attempt for attempt in self.trials if attempt.state in states]
        return sorted(found, key=lambda attempt: attempt.number)

    def lost(self) -> Iterator[Attempt]:
        """Trials that nobody is at and nobody will take up, for want of one more write.

        Whoever gave them up died before they were put back.
        """
        for attempt in self.trials:
            if attempt.state.is_finished() and attempt.begun.record is None:
                yield attempt

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
        first = self._first[root]
        num_before = 0
        for other in self.trials:
            origin = self._roots[other.number]
            if origin >= root:
                break
            if first.unseen is not None and origin >= first.unseen and other.point == first.point:
                return True
            num_before += other.counts
        return limit is not None and num_before >= limit

    def with_token(self, token: str) -> Attempt | None:
        """The attempt that was added with this token, though it may have been retried since."""
        return self._by_token.get(token)
