"""A study in a made-up landscape: the driver's and the packs' own decisions, curves by formula."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from test_agenda import Records, SyntheticRun

from rsauto.records import EvalPoint, TrialRecord, TrialSpec
from rsauto.search import pack_memory, packs, work
from rsauto.search.agenda import num_settled
from rsauto.search.pack_size import PackPlan
from rsauto.search.packs import Entrant
from rsauto.search.space import Space
from rsauto.stop import StopFlag
from rsauto.training.member import Advance
from rsauto.training.schedule import evaluation_steps

TOKENS_PER_STEP = 100


@dataclass(frozen=True)
class Bowl:
    """ln loss = f(rho) + c (log2 lr - m - s rho - drift (1 - p))^2 + fall (1 - p) after a share p
    of the steps: a higher learning rate looks best early."""

    middle: float = math.log2(4e-4)
    """m, at rank 8."""
    exponent: float = -0.25
    curvature: float = 0.03
    drift: float = 1.0
    fall: float = 0.4
    best_rank: int = 64
    diverges_above: float = math.inf
    """Learning rate above which a trial gives no number."""

    def best_rate(self, rank: int) -> float:
        return float(2 ** (self.middle + self.exponent * math.log2(rank / 8)))

    def loss(self, spec: TrialSpec, share: float = 1.0) -> float:
        left = 1 - share
        offset = math.log2(spec.learning_rate / self.best_rate(spec.rank)) - self.drift * left
        return math.exp(
            0.3
            + 0.01 * math.log2(spec.rank / self.best_rank) ** 2
            + self.curvature * offset**2
            + self.fall * left
        )

    def curve(self, spec: TrialSpec) -> list[EvalPoint]:
        return [
            EvalPoint(step=step, train_loss=loss, eval_loss=loss, grad_norm=1.0)
            for step in evaluation_steps(spec.steps, spec.num_evals)
            for loss in [self.loss(spec, step / spec.steps)]
        ]


@dataclass
class Walker:
    """What a pack knows of a trial."""

    spec: TrialSpec
    points: list[EvalPoint]
    curve: list[EvalPoint] = field(default_factory=list)

    @property
    def steps_done(self) -> int:
        return self.curve[-1].step if self.curve else 0

    @property
    def is_finished(self) -> bool:
        return self.steps_done == self.spec.steps


class MadeUpPack:
    """Stands where a pack stands; of its trials some come on, whichever chance picks."""

    capacity = None
    peak_bytes = None
    has_room = True

    def __init__(self, bowl: Bowl, chance: random.Random) -> None:
        self.bowl, self.chance = bowl, chance
        self.members: list[Walker] = []

    def __enter__(self) -> MadeUpPack:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def admit(self, spec: TrialSpec) -> Walker:
        self.members.append(Walker(spec, self.bowl.curve(spec)))
        return self.members[-1]

    def resume(self, member: Walker) -> None:
        self.members.append(member)

    def release(self, member: Walker) -> None:
        self.members = [one for one in self.members if one is not member]

    hold = release

    def advance(self) -> list[Advance]:
        chosen = [one for one in self.members if self.chance.random() < 0.5] or self.members[:1]
        return [self._advanced(one) for one in chosen]

    def _advanced(self, member: Walker) -> Any:
        if member.spec.learning_rate > self.bowl.diverges_above:
            return SimpleNamespace(member=member, point=None, error=ValueError("no number"))
        member.curve.append(member.points[len(member.curve)])
        point = SimpleNamespace(evaluation=member.curve[-1])
        return SimpleNamespace(member=member, point=point, error=None)

    def save(self, member: Walker, *_: object) -> int:
        return 0


class Landscape(SyntheticRun):
    """A study that runs packs of a size, in a landscape."""

    def __init__(self, space: Space, record_of: Records, bowl: Bowl, seed: int = 0) -> None:
        super().__init__(space, record_of, lambda spec, number: "complete")
        self.bowl, self.chance = bowl, random.Random(seed)
        self.begin = 0.0
        nothing = SimpleNamespace(
            write_records=lambda *_: None,
            adapter_entries=list,
            remove_adapters=lambda *_, **__: None,
            adapter=lambda *_: None,
            path=None,  # nothing may be written there
        )
        self.books.folder = self.folder = nothing  # type: ignore[assignment]
        self.books.stop = StopFlag()
        self.books.setup.predict = lambda spec: spec.rank  # type: ignore[assignment,method-assign]
        self.books.place_of = lambda record: (None, "")  # type: ignore[assignment,method-assign]
        self.books.has_report = False
        self.stop_after = 10**9
        """Settled trials or steps of packs after which somebody asks to stop."""

    def record(
        self, number: int, walker: Walker, _: object, outcome: str, error: str | None = None,
        **pack: object,
    ) -> TrialRecord:  # fmt: skip
        loss = walker.curve[-1].eval_loss if walker.curve else None
        return self.record_of(
            walker.spec, number, loss, outcome, curve=tuple(walker.curve), steps=walker.steps_done,
            tokens=TOKENS_PER_STEP * walker.steps_done,
            flops=float(walker.steps_done) * (1000 + walker.spec.rank),
        )  # fmt: skip

    def run_packed(self, monkeypatch: pytest.MonkeyPatch, size: int, lookahead: int = 8) -> None:
        """The whole study, ``size`` trials at once."""
        self.ledger.set_lookahead(lookahead)
        monkeypatch.setattr(packs, "Pack", lambda *_, **__: MadeUpPack(self.bowl, self.chance))
        monkeypatch.setattr(packs, "packed_record", self.record)
        monkeypatch.setattr(pack_memory, "fits", lambda *_: True)
        assert work.pack_memory is pack_memory
        plan, put_back = PackPlan(size=size, can_hold=True), set[int]()
        count = 0
        while num_settled(self.ledger.settled()) < self.config.search.trials:
            begun = self._begin(self._propose)
            if begun is None:
                break
            assert begun.trial.number < 300, "the study does not end"
            if not self._begins_pack(begun, plan, put_back):
                self.end(begun)
                continue
            for _ in self._run_pack(plan, begun, put_back):
                count += 1
                self.books.stop.requested = count >= self.stop_after

    def end(self, begun: Entrant) -> None:
        """A trial alone, with the rules that hold for one."""
        walker = Walker(begun.spec, self.bowl.curve(begun.spec))
        outcome = "complete"
        if begun.spec.learning_rate > self.bowl.diverges_above:
            outcome = "diverged"
        else:
            for point in walker.points:
                walker.curve.append(point)
                if walker.is_finished:
                    break
                ending = self.books.report(begun.trial, begun.spec, walker.curve, begun.known)
                if ending is not None:
                    outcome = ending.outcome
                    break
        self.books.settle(begun.trial, self.record(begun.trial.number, walker, None, outcome))

    @property
    def searched(self) -> list[tuple[TrialSpec, TrialRecord]]:
        return [(s, r) for s, r in self.ledger.settled() if s.role == "search"]

    def results(self) -> set[tuple[Any, ...]]:
        """Everything that was tried and how it ended, whatever the order."""
        return {
            (s.role, s.seed, s.cohort, s.configuration(), r.outcome, len(r.curve))
            for s, r in self.ledger.settled()
        }


Make = Callable[..., Landscape]


def bare(spec: TrialSpec) -> TrialSpec:
    return replace(spec, retry_of=None, cohort=None, cohort_size=None)
