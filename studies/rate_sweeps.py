"""Sweeps of the learning rate on the embedded task, that walk until they hold the best one.

What `studies/learning_rate_exponents.py` fits its exponents to; see there.

Notation
    k    a learning rate in half octaves: eta = 2^(k/2), so that sweeps share their rates
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

from rsauto import study_file
from rsauto.packing.optimizer import PackedOptimizer
from rsauto.records import TrialSpec
from rsauto.scaling import ScalingRule, gamma_r, learning_rate_exponent
from rsauto.search.setup import set_up
from rsauto.training.packed import Pack
from rsauto.training.trial import Bench

ANCHOR = 16
"""Where the three multipliers are equal, the middle of ranks 2 to 128 on a log scale."""
TOGETHER = 4
"""Trials in one pass."""

RuleName = Literal["rslora", "lora", "constant"]


@dataclass(frozen=True)
class Rule:
    """gamma_r = alpha r^exponent, of TrialSpec's rule and override."""

    scaling_rule: ScalingRule
    scaling_exponent: float | None
    alpha: int
    """Such that gamma_r is 4 at rank ANCHOR."""

    def gamma(self, rank: int) -> float:
        return gamma_r(self.scaling_rule, self.alpha, rank, self.scaling_exponent)

    def prior(self, optimizer: PackedOptimizer) -> float:
        return learning_rate_exponent(self.scaling_rule, optimizer, self.scaling_exponent)


RULES: Mapping[RuleName, Rule] = {
    "rslora": Rule("rslora", None, 16),
    "lora": Rule("lora", None, 64),
    "constant": Rule("rslora", 0.0, 4),
}
MAX_GRAD_NORM: Mapping[PackedOptimizer, float | None] = {"adamw": 1.0, "sgd": None}
"""The prior for SGD is that of steps that are not clipped."""
CENTRES: Mapping[PackedOptimizer, int] = {"adamw": -15, "sgd": -7}
"""k near the best learning rate at rank ANCHOR, where the first sweep begins."""

NOTHING_LEARNT = 3.3
"""Trials at rates that are too high end above it, near 3.8, whatever the rate: the loss of a model
that knows how frequent tokens are and no more. Among them the lowest is chance."""


def rate_of(half_octaves: int) -> float:
    """The learning rate of k."""
    return float(2.0 ** (half_octaves / 2))


@dataclass(frozen=True)
class SweepKey:
    """What the trials of a sweep have in common."""

    optimizer: PackedOptimizer
    rule: RuleName
    rank: int
    seed: int

    @property
    def trained_as(self) -> SweepKey:
        """At rank ANCHOR the three rules are one sweep, which is trained once."""
        return replace(self, rule="rslora") if self.rank == ANCHOR else self


@dataclass(frozen=True)
class Row:
    """A trial, one line of sweeps.jsonl."""

    optimizer: PackedOptimizer
    rule: RuleName
    rank: int
    seed: int
    half_octaves: int
    learning_rate: float
    gamma_r: float
    eval_loss: float | None
    """After the last step; None where the loss or a gradient was no number."""
    steps: int
    seconds: float
    """Wall time since the trial before it ended."""

    @property
    def key(self) -> SweepKey:
        return SweepKey(self.optimizer, self.rule, self.rank, self.seed)


Sweep = dict[int, float]
"""k to the loss after the last step, infinity where the trial diverged."""


# ---------------------------------------------------------------------- which rates are tried


@dataclass(frozen=True)
class Start:
    """Where a sweep begins, and how far apart its first rates are, both in half octaves."""

    centre: int
    reach: int


def next_rates(sweep: Sweep, start: Start, widest: int = 12) -> list[int]:
    """Each k to try next; none when the lowest has been tried on both sides, sqrt(2) apart.

    Where no rate taught the model anything, lower ones are tried until the loss rises with them.
    Raises ValueError where the lowest is more than ``widest`` half octaves from the centre: the
    centre is wrong, or the loss does not depend on the learning rate.
    """
    if not sweep:
        return [start.centre + side * start.reach for side in (-1, 0, 1)]
    best = lowest(sweep)
    too_high = sweep[best] > NOTHING_LEARNT and not _falls_at_first(sweep)
    reached = min(sweep) if too_high else best
    if abs(reached - start.centre) > widest:
        raise ValueError(
            f"centre: the best learning rate is {rate_of(reached):.3g} or beyond, over {widest} "
            f"half octaves from {rate_of(start.centre):.3g}. Sweep over decades, and set CENTRES."
        )
    if too_high:
        return [reached - start.reach]
    gaps = {side: _gap(sweep, best, side) for side in (-1, 1)}
    ends = [best + side * start.reach for side, gap in gaps.items() if gap is None]
    return ends or [best + side * (gap // 2) for side, gap in gaps.items() if gap and gap > 1]


def is_complete(sweep: Sweep) -> bool:
    """Whether the lowest has been tried on both sides, sqrt(2) apart."""
    return bool(sweep) and not next_rates(sweep, Start(lowest(sweep), 1))


def _falls_at_first(sweep: Sweep) -> bool:
    """Whether the loss falls over the three lowest rates, as it does where they are too low."""
    losses = [sweep[k] for k in sorted(sweep)[:3]]
    return len(losses) == 3 and losses[0] > losses[1] > losses[2]


def lowest(sweep: Sweep) -> int:
    """The k of least loss, the smaller of two."""
    return min(sweep, key=lambda k: (sweep[k], k))


def _gap(sweep: Sweep, best: int, side: int) -> int | None:
    """Half octaves to the next rate on that side."""
    return min(((k - best) * side for k in sweep if (k - best) * side > 0), default=None)


def start_of(key: SweepKey, done: Mapping[SweepKey, Sweep]) -> Start:
    """Another seed's best, if there is one; else by the prior from the nearest rank of that seed.

    By the prior a factor of 2 to both sides, so that a wrong prior is found out.
    """
    complete = {other: sweep for other, sweep in done.items() if is_complete(sweep)}
    for other, sweep in complete.items():
        if replace(other, seed=key.seed) == key:
            return Start(lowest(sweep), reach=1)
    known = [
        other
        for other in complete
        if (other.optimizer, other.seed) == (key.optimizer, key.seed)
        and (other.rule == key.rule or other.rank == ANCHOR)
    ]
    if not known:
        return Start(CENTRES[key.optimizer], reach=2)
    nearest = min(known, key=lambda other: (abs(math.log2(key.rank / other.rank)), other.rank))
    octaves = RULES[key.rule].prior(key.optimizer) * math.log2(key.rank / nearest.rank)
    return Start(lowest(complete[nearest]) + round(2 * octaves), reach=2)


# ---------------------------------------------------------------------- training


class Lab:
    """The embedded model and task; trials of one optimizer, several in one pass."""

    def __init__(self, steps: int = 64) -> None:
        sets = ["memory_budget=4GiB", "training.num_evals=1", f"training.steps={steps}"]
        setup = set_up(study_file.load(sets=sets))
        self._middle = setup.space.middle(ANCHOR, "rslora")
        self._bench = Bench(
            model=setup.load_model().model,
            base_name="embedded",
            data=setup.data,
            device=setup.device,
        )

    def spec(self, key: SweepKey, half_octaves: int) -> TrialSpec:
        rule = RULES[key.rule]
        return replace(
            self._middle,
            rank=key.rank,
            alpha=rule.alpha,
            scaling_rule=rule.scaling_rule,
            scaling_exponent=rule.scaling_exponent,
            learning_rate=rate_of(half_octaves),
            optimizer=key.optimizer,
            max_grad_norm=MAX_GRAD_NORM[key.optimizer],
            seed=key.seed,
        )

    def train(self, asked: Sequence[tuple[SweepKey, int]]) -> Iterator[Row]:
        """Trials of one optimizer, each as it ends."""
        since = time.perf_counter()
        waiting = list(asked)
        of_member: dict[int, tuple[SweepKey, int]] = {}
        with Pack(self._bench, optimizer=asked[0][0].optimizer, rows=16) as pack:
            while waiting or pack.members:
                while waiting and len(pack.members) < TOGETHER:
                    one = waiting.pop(0)
                    of_member[id(pack.admit(self.spec(*one)))] = one
                for advance in pack.advance():
                    member = advance.member
                    if not (advance.error or member.is_finished):
                        continue
                    pack.release(member)
                    now = time.perf_counter()
                    loss = None if advance.error else member.curve[-1].eval_loss
                    yield row_of(*of_member[id(member)], loss, member.steps_done, now - since)
                    since = now


def row_of(key: SweepKey, half_octaves: int, loss: float | None, steps: int, seconds: float) -> Row:
    return Row(
        **asdict(key),
        half_octaves=half_octaves,
        learning_rate=rate_of(half_octaves),
        gamma_r=RULES[key.rule].gamma(key.rank),
        eval_loss=loss,
        steps=steps,
        seconds=round(seconds, 2),
    )


def sweeps_of(rows: Iterable[Row]) -> dict[SweepKey, Sweep]:
    found: dict[SweepKey, Sweep] = {}
    for row in rows:
        loss = math.inf if row.eval_loss is None else row.eval_loss
        found.setdefault(row.key, {})[row.half_octaves] = loss
    return found


def read_rows(file: Path) -> list[Row]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [Row(**json.loads(line)) for line in lines]


Train = Callable[[Sequence[tuple[SweepKey, int]]], Iterator[Row]]
"""Trains what is asked, and gives each trial as it ends."""


def sweep_all(
    train: Train,
    stages: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    optimizers: Sequence[PackedOptimizer],
    file: Path | None,
) -> list[Row]:
    """Stage by stage, so that what is there early spans the ranks.

    Goes on from the rows in ``file``, and appends to it.
    """
    rows = read_rows(file) if file else []
    for ranks, optimizer, seed in product(stages, optimizers, seeds):
        keys = {SweepKey(optimizer, rule, r, seed).trained_as for r in ranks for rule in RULES}
        before = sweeps_of(row for row in rows if row.key not in keys)
        starts = {key: start_of(key, before) for key in keys}
        while asked := _asked(starts, sweeps_of(rows)):
            for row in train(asked):
                rows.append(row)
                print(_line(row), flush=True)
                if file:
                    with file.open("a", encoding="utf-8") as out:
                        out.write(json.dumps(asdict(row)) + "\n")
    return rows


def _asked(
    starts: Mapping[SweepKey, Start], done: Mapping[SweepKey, Sweep]
) -> list[tuple[SweepKey, int]]:
    """The next trials of every sweep; those of one rank stand together."""
    asked = [
        (key, k) for key, start in starts.items() for k in next_rates(done.get(key, {}), start)
    ]
    return sorted(asked, key=lambda one: (one[0].rank, one[0].rule, one[1]))


def _line(row: Row) -> str:
    loss = "diverged" if row.eval_loss is None else f"{row.eval_loss:.4f}"
    name = f"{row.optimizer} {row.rule} rank {row.rank} seed {row.seed}"
    return f"{name} rate {row.learning_rate:.3g}: {loss}"
