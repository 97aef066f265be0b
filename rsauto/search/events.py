"""What a running study tells whoever watches it. The driver yields these and knows no watcher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsauto.memory.kinds import Prediction
from rsauto.records import StepPoint, TrialRecord, TrialSpec
from rsauto.search.allowance import Allowance
from rsauto.search.pack_size import PackPlan
from rsauto.search.setup import Setup


@dataclass(frozen=True)
class Stage:
    """A new part of the work has begun."""

    name: str


@dataclass(frozen=True)
class Planned:
    """Model and data are read, and it is known which ranks fit."""

    setup: Setup


@dataclass(frozen=True)
class Searching:
    """Trials are about to run."""

    num_settled: int
    """Trials of earlier runs that count."""
    num_orphans: int
    """Trials of a killed process that are run again."""


@dataclass(frozen=True)
class TrialStarted:
    number: int
    spec: TrialSpec
    prediction: Prediction


@dataclass(frozen=True)
class TrialStep:
    number: int
    spec: TrialSpec
    point: StepPoint
    measured_peak_bytes: int | None


@dataclass(frozen=True)
class TrialSettled:
    record: TrialRecord
    num_settled: int
    """Trials that count so far, this one included."""
    worker: str | None = None
    """Who ran it, where it was another process."""


@dataclass(frozen=True)
class TrialDropped:
    """A trial of this process was given to another one, which took this one for dead."""

    number: int


@dataclass(frozen=True)
class CrewNotice:
    """Processes that help have started, or one of them has ended before the study did."""

    text: str


@dataclass(frozen=True)
class AllowanceRaised:
    """More is added to every prediction from now on, and ranks may no longer fit."""

    allowance: Allowance
    ranks: tuple[int, ...]
    """Those that still fit."""


@dataclass(frozen=True)
class PackingDecided:
    """How search trials will be run."""

    plan: PackPlan


@dataclass(frozen=True)
class PackShrank:
    """The device had no room for as many trials at once."""

    size: int
    """How many it has room for."""


@dataclass(frozen=True)
class StudyEnded:
    """The folder is complete: records and adapters are written, and the report if it was asked
    for."""

    out: Path
    seconds: float
    reason: str
    """Why it ended: every trial done, the space exhausted, a time limit."""


Event = (
    Stage
    | Planned
    | Searching
    | TrialStarted
    | TrialStep
    | TrialSettled
    | TrialDropped
    | CrewNotice
    | AllowanceRaised
    | PackingDecided
    | PackShrank
    | StudyEnded
)
