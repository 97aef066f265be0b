"""What a study has begun so far, in order, and what of it a proposal may know.

With trials in flight, what is known when the next one is proposed would depend on which of them
happened to end first, and so on the machine. So a proposal looks at results only of those trials
that were begun at least ``lookahead`` before it; the later ones it knows as running, whether they
have ended or not. However many are trained at once, up to that number, the study asks the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from rsauto.records import SETTLED_OUTCOMES, TrialRecord, TrialSpec

Settled = Sequence[tuple[TrialSpec, TrialRecord]]


@dataclass(frozen=True, slots=True)
class Begun:
    """A trial that was begun, as its latest attempt has it."""

    number: int
    """Of the latest attempt."""
    spec: TrialSpec
    record: TrialRecord | None
    """None while it runs or waits to be run again."""


@dataclass(frozen=True, slots=True)
class Known:
    """What one trial may know of the others."""

    settled: Settled
    pending: Sequence[TrialSpec]
    """Begun, with results that are not looked at."""


@dataclass(frozen=True)
class History:
    """Every trial in the order of its first attempt, which an interruption does not change."""

    trials: tuple[Begun, ...]

    def known_to(self, position: int, lookahead: int) -> Known:
        """What the trial at ``position``, from 0, may know."""
        old = self.trials[: max(0, position - lookahead + 1)]
        settled = [(t.spec, t.record) for t in old if t.record is not None]
        new = [t.spec for t in self.trials[len(old) : position]]
        return Known(settled, [*(t.spec for t in old if t.record is None), *new])

    def must_wait(self, position: int, lookahead: int, running: Sequence[int]) -> bool:
        """Whether a trial that it has to know about is among the ``running`` numbers."""
        old = self.trials[: max(0, position - lookahead + 1)]
        return any(trial.number in running for trial in old)

    def position_of(self, number: int) -> int:
        """Of the trial whose latest attempt has this number."""
        return next(n for n, trial in enumerate(self.trials) if trial.number == number)

    @cached_property
    def settled(self) -> Settled:
        """Everything that has ended."""
        return [(t.spec, t.record) for t in self.trials if t.record is not None]

    @cached_property
    def num_begun(self) -> int:
        """Trials that count or will; refusals by the planner are free."""
        counting = [True for _, record in self.settled if record.outcome in SETTLED_OUTCOMES]
        return len(counting) + self.num_unsettled

    @cached_property
    def num_unsettled(self) -> int:
        return len(self.trials) - len(self.settled)


def history_of(attempts: Sequence[tuple[int, TrialSpec, TrialRecord | None]]) -> History:
    """From every attempt by number: those that retry another stand in its place."""
    root: dict[int, int] = {}
    latest: dict[int, Begun] = {}
    for number, spec, record in attempts:
        origin = number if spec.retry_of is None else root.get(spec.retry_of, spec.retry_of)
        root[number] = origin
        latest[origin] = Begun(number, spec, record)
    return History(tuple(latest[origin] for origin in sorted(latest)))
