"""The strategy transfer in a made-up landscape, run by the driver's and the packs' decisions."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from landscape import Bowl, Landscape
from test_agenda import Records

from rsauto.config import StudyConfig
from rsauto.errors import StudyInterrupted
from rsauto.records import TrialRecord, TrialSpec
from rsauto.scaling import learning_rate_exponent
from rsauto.search.history import history_of
from rsauto.search.space import Space
from rsauto.search.transfer import (
    BAND_OCTAVES,
    SUMMIT_OCTAVES,
    WIDE_BAND_OCTAVES,
    ladder,
    narrowed,
    transfer_trial,
    tuned,
)
from rsauto.study_file import validate

RANKS = [2, 4, 8, 16, 32, 64, 128]
RANGE = {"low": 2e-5, "high": 2e-2}


def space_of(**search: Any) -> Space:
    config: StudyConfig = validate(
        {
            "training": {"steps": 80, "num_evals": 20},
            "search": {
                "trials": 40, "rank": RANKS, "alpha": 16, "learning_rate": RANGE, **search,
            },
        }
    )  # fmt: skip
    return Space(config, config.search.ranks, steps=80, max_length=512)


def loss_of(record: TrialRecord) -> float | None:
    return record.curve[-1].eval_loss if record.outcome == "complete" else None


def study(
    record_of: Records, monkeypatch: pytest.MonkeyPatch, bowl: Bowl | None = None, size: int = 8,
    seed: int = 0, **search: Any,
) -> Landscape:  # fmt: skip
    run = Landscape(space_of(**search), record_of, bowl or Bowl(), seed)
    run.run_packed(monkeypatch, size)
    return run


def part_of(spec: TrialSpec, rank: int = 8) -> str:
    if spec.cohort is not None:
        return "ladder" if spec.cohort % 2 == 0 else "summit"
    return "alone"


def test_ladder_summit_coverage_and_then_the_band(
    record_of: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    bowl = Bowl()
    run = study(record_of, monkeypatch, bowl, min_improvement=0)
    specs = [trial.spec for trial in run.ledger.history().trials]
    parts = [part_of(spec) for spec in specs if spec.role == "search"]
    assert [key for key, _ in itertools.groupby(parts)] == ["ladder", "summit", "alone"]
    assert parts.count("ladder") == 9 and parts.count("summit") == 3
    steps, summit = specs[:9], specs[9:12]
    assert {spec.rank for spec in steps} == {8} and {spec.rank for spec in summit} == {128}
    assert {spec.cohort_size for spec in steps} == {9}
    rates = sorted(spec.learning_rate for spec in steps)
    low, high = rates[0], rates[-1]
    assert (low, high) == pytest.approx((RANGE["low"], RANGE["high"]), rel=1e-3)
    gaps = [math.log2(b / a) for a, b in itertools.pairwise(rates)]
    assert max(gaps) - min(gaps) < 1e-2
    # Every other rank at the rate of the law.
    coverage = specs[12:17]
    assert [spec.rank for spec in coverage] == [64, 32, 16, 4, 2]
    found = tuned(run.setup.space, "rslora", run.searched, loss_of)
    assert found is not None and found.rank == 8
    for spec in coverage:
        assert spec.learning_rate == pytest.approx(found.rate * (spec.rank / 8) ** -0.25, rel=1e-3)
    # What follows is sampled near it.
    for spec in [s for s in specs if s.role == "search"][17:]:
        centre = found.rate * (spec.rank / 8) ** -0.25
        assert abs(math.log2(spec.learning_rate / centre)) <= BAND_OCTAVES + 1e-3


def test_the_summit_is_the_ladders_vertex_moved_by_the_law(
    record_of: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without drift every step's parabola has its vertex at the planted rate."""
    bowl = Bowl(drift=0.0)
    run = study(record_of, monkeypatch, bowl)
    summit = [s for s, _ in run.searched if part_of(s) == "summit"]
    middle = bowl.best_rate(8) * (128 / 8) ** -0.25
    wanted = sorted(middle * 2**x for x in (-SUMMIT_OCTAVES, 0.0, SUMMIT_OCTAVES))
    assert sorted(s.learning_rate for s in summit) == pytest.approx(wanted, rel=1e-3)


def test_the_best_point_of_a_grid_is_come_close_to_for_a_tenth_of_its_tokens(
    record_of: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the highest rank is the best one, which the summit looks at first."""
    bowl = Bowl(middle=math.log2(5e-4), best_rank=128)
    run = study(record_of, monkeypatch, bowl)
    rates = [2e-5 * 10 ** (k / 2) for k in range(7)]
    like = run.searched[0][0]
    grid = [replace(like, rank=r, learning_rate=x) for r in RANKS for x in rates]
    goal = 1.005 * min(bowl.loss(spec) for spec in grid)
    whole = 49 * like.steps * 100
    spent = 0
    for _, record in run.searched:
        spent += record.tokens or 0
        if record.outcome == "complete" and record.curve[-1].eval_loss <= goal:
            break
    else:
        pytest.fail("never came close")
    assert spent < whole / 10, spent / whole


def outcomes(run: Landscape) -> list[tuple[TrialSpec, TrialRecord]]:
    return run.ledger.settled()


def test_the_same_trials_however_many_run_at_once_and_in_whatever_order_they_end(
    record_of: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = study(record_of, monkeypatch, size=1).results()
    assert len({role for role, *_ in alone}) == 4
    for size, seed in ((1, 5), (2, 1), (8, 3)):
        assert study(record_of, monkeypatch, size=size, seed=seed).results() == alone


@pytest.mark.parametrize("stop_after", [3, 20, 29, 50])
def test_a_study_stopped_in_a_ladder_or_a_summit_goes_on_with_the_same_trials(
    stop_after: int, record_of: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = study(record_of, monkeypatch, size=4, trials=30)
    run = Landscape(space_of(trials=30), record_of, Bowl(), seed=stop_after)
    run.stop_after = stop_after
    with pytest.raises(StudyInterrupted):
        run.run_packed(monkeypatch, 4)
    assert any(t.record is None and t.spec.cohort is not None for t in run.ledger.history().trials)
    run.stop_after = 10**9
    run.books.stop.requested = False
    run.run_packed(monkeypatch, 4)
    assert run.results() == whole.results()


def test_a_law_that_the_trials_contradict_is_given_up(
    record_of: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = learning_rate_exponent("rslora", "adamw")
    for exponent in (prior, 0.3):
        bowl = Bowl(exponent=exponent, drift=0.0, best_rank=8)
        run = study(record_of, monkeypatch, bowl, min_improvement=0, trials=50, pruner="none")
        space = narrowed(run.setup.space, run.searched, loss_of)
        band = space.bands["rslora"]
        is_right = exponent == prior
        assert band.half_octaves == (BAND_OCTAVES if is_right else WIDE_BAND_OCTAVES)
        assert band.exponent == pytest.approx(exponent, abs=1e-2)


def test_ranks_that_are_added_later_are_covered(
    record_of: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = study(record_of, monkeypatch, rank=[4, 8, 16], trials=24)
    wide = space_of(rank=[2, 4, 8, 16, 32], trials=30)
    attempts = [(t.number, t.spec, t.record) for t in run.ledger.history().trials]
    added = []
    while True:
        turn = transfer_trial(wide, history_of(attempts), loss_of, 20)
        if turn is None:
            break
        assert isinstance(turn, TrialSpec) and len(added) < 20
        added.append(turn)
        loss = run.bowl.loss(turn)
        number = len(attempts)
        attempts.append((number, turn, record_of(turn, number, loss)))
    assert {2, 32} <= {spec.rank for spec in added}


def test_a_list_of_learning_rates_is_kept_to(
    record_of: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3]
    run = study(record_of, monkeypatch, learning_rate=rates)
    assert {s.learning_rate for s, _ in run.searched} <= set(rates)
    steps = [s for s, _ in run.searched if part_of(s) == "ladder"]
    assert {s.learning_rate for s in steps} == set(rates) and {s.rank for s in steps} == {8}
    assert {s.rank for s, r in run.searched if r.outcome == "complete"} == set(RANKS)
    assert narrowed(run.setup.space, run.searched, loss_of) is run.setup.space


def test_each_method_has_a_ladder_and_adalora_no_law(
    record_of: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = study(
        record_of, monkeypatch, method=["rslora", "adalora"], trials=60, rank=[4, 8, 16, 32]
    )
    ladders = {(s.cohort, s.method) for s, _ in run.searched if part_of(s) == "ladder"}
    assert ladders == {(0, "rslora"), (2, "adalora")}
    for method, exponent in (("rslora", -0.25), ("adalora", 0.0)):
        found = tuned(run.setup.space, method, run.searched, loss_of)  # type: ignore[arg-type]
        assert found is not None
        summit = [
            s for s, _ in run.searched if part_of(s) == "summit" and s.method == method
        ]  # fmt: skip
        rates = sorted(s.learning_rate for s in summit)
        assert rates[1] == pytest.approx(found.rate * 4**exponent, rel=1e-3)
    bands = narrowed(run.setup.space, run.searched, loss_of).bands
    assert bands["adalora"].exponent == 0.0


def test_one_rank_has_a_ladder_and_no_summit(
    record_of: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = study(record_of, monkeypatch, rank=16)
    parts = {part_of(s) for s, _ in run.searched}
    assert parts == {"ladder", "alone"}
    assert {s.rank for s, _ in run.searched} == {16}


@pytest.mark.parametrize("trials", range(1, 13))
def test_a_study_too_short_for_a_ladder_covers_ranks_and_uses_its_trials(
    trials: int, record_of: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = study(record_of, monkeypatch, trials=trials, min_improvement=0)
    assert len(outcomes(run)) == trials
    space = run.setup.space
    assert ladder(space, "rslora", 5) == [] and len(ladder(space, "rslora", 6)) == 3


def test_where_the_whole_ladder_diverges_the_study_goes_on(
    record_of: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = study(record_of, monkeypatch, Bowl(diverges_above=0.0), min_improvement=0)
    assert len(outcomes(run)) == 40 - 6, "there is nobody to run on two more seeds"
    assert {r.outcome for _, r in outcomes(run)} == {"diverged"}
    assert {s.rank for s, _ in run.searched} == set(RANKS)
    assert narrowed(run.setup.space, run.searched, loss_of).bands == {}


def test_where_the_upper_half_of_the_ladder_diverges_the_rest_decides(
    record_of: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = study(record_of, monkeypatch, Bowl(drift=0.0, diverges_above=1e-3))
    found = tuned(run.setup.space, "rslora", run.searched, loss_of)
    assert found is not None and found.rate == pytest.approx(4e-4, rel=0.01)


@pytest.mark.parametrize(
    ("optimizer", "half"), [("adamw", BAND_OCTAVES), ("sgd", WIDE_BAND_OCTAVES)]
)
def test_only_the_law_of_adamw_is_trusted_with_a_narrow_band(
    optimizer: str, half: float, record_of: Records
) -> None:
    space = space_of()
    training = space.config.training.model_copy(update={"optimizer": optimizer})
    space = replace(space, config=space.config.model_copy(update={"training": training}))
    middle = ladder(space, "rslora", 40)[0]
    found = narrowed(space, [(middle, record_of(middle, 0, 1.0))], loss_of)
    assert found.bands["rslora"].half_octaves == half
