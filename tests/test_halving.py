"""Who goes on at a rung, and packs whose trials wait there for the others of their cohort."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packs import alone, bits, unmetered
from test_training import bench_of, spec_of
from tiny_study import study_values
from transformers import LlamaForCausalLM

from rsauto.config import StudyConfig
from rsauto.errors import StudyInterrupted
from rsauto.records import AllocationSpec, EvalPoint, StepPoint, TrialRecord
from rsauto.search import pack_size, pruning
from rsauto.search.driver import study_events
from rsauto.search.events import Event, PackingDecided, TrialSettled, TrialStep
from rsauto.search.objective import Objective
from rsauto.search.pruning import SLOW_OCTAVES, Rival, gives_up, goes_on, is_telling, rungs
from rsauto.stop import StopFlag
from rsauto.study_file import validate
from rsauto.training.member import Advance, Member
from rsauto.training.packed import Pack

__all__ = ["unmetered"]

Records = Callable[..., TrialRecord]


# ------------------------------------------------------------------------ the rule


@pytest.mark.parametrize(
    ("objective", "best", "telling"),
    [
        (Objective("eval_loss", True, 2.0), 1.89, True),
        (Objective("eval_loss", True, 2.0), 1.95, False),
        (Objective("eval_loss", True, 2.0), 2.5, False),
        (Objective("accuracy", False, 0.5), -0.53, True),
        (Objective("accuracy", False, 0.5), -0.51, False),
        (Objective("accuracy", False, 0.96), -0.97, True),
        (Objective("exact_match", False, 0.0), -0.06, True),
        (Objective("exact_match", False, 0.0), -0.04, False),
        (Objective("exact_match", False, 0.0), 0.0, False),
    ],
)
def test_a_rung_says_nothing_until_its_leader_has_learnt(
    objective: Objective, best: float, telling: bool
) -> None:
    rivals = [Rival(1e-3, best), Rival(1e-3, best + 1)]
    assert is_telling(objective, rivals) is telling
    assert not is_telling(objective, [])


def test_nobody_is_given_up_while_nobody_has_learnt(record_of: Records) -> None:
    """The curves of a task on which all trials first make the model worse."""
    config = validate({"name": "late", "training": {"steps": 64, "num_evals": 8}})
    objective = Objective("eval_loss", True, 0.69)
    spec = spec_of(steps=64, num_evals=8, cohort=0, cohort_size=2)

    def ends(*losses: float, leader: tuple[float, ...] = (0.75, 0.68, 0.66, 0.5)) -> bool:
        known = replace(record_of(spec), curve=curve(*leader))
        return gives_up(config, objective, spec, curve(*losses), [(spec, known)])

    assert not ends(0.9) and not ends(0.9, 0.9) and not ends(0.9, 0.9, 0.9)
    assert ends(0.9, 0.9, 0.9, 0.9), "the leader has"
    assert ends(0.9, 0.9, 0.9, leader=(0.75, 0.68, 0.6)), "it stands still, and the leader has"


def curve(*losses: float) -> tuple[EvalPoint, ...]:
    """Evaluations eight steps apart."""
    return tuple(
        EvalPoint(step=8 * n, train_loss=1.0, eval_loss=loss, grad_norm=1.0)
        for n, loss in enumerate(losses, start=1)
    )


@pytest.mark.parametrize(
    ("steps", "num_evals", "expected"),
    [
        (80, 80, [10, 20, 40]), (80, 8, [10, 20, 40]), (100, 10, [20, 40, 80]),
        (16, 8, [2, 4, 8]), (80, 2, [40]), (80, 1, []), (6, 3, [2, 4]), (1000, 7, [143, 286, 714]),
    ],
)  # fmt: skip
def test_rungs_are_evaluations_that_lie_twice_as_far_each_time(
    steps: int, num_evals: int, expected: list[int]
) -> None:
    assert rungs(spec_of(steps=steps, num_evals=num_evals)) == expected


@given(
    values=st.lists(st.floats(0.1, 9), min_size=1, max_size=12, unique=True),
    rung=st.integers(0, 2),
)
def test_the_best_half_of_a_half_goes_on(values: list[float], rung: int) -> None:
    """Of equal learning rates, so that nobody is a slow starter."""
    count = len(values)
    rivals = [Rival(1e-3, value) for value in values]
    passed = {
        own.value
        for own in rivals
        if goes_on(own, [r for r in rivals if r is not own], rung, 3, count)
    }
    quota = {0: max(2, -(-count // 2)), 1: max(2, -(-count // 4)), 2: max(1, -(-count // 8))}[rung]
    assert passed == set(sorted(values)[:quota])


@given(octaves=st.floats(-6, 6).filter(lambda x: min(abs(x), abs(abs(x) - SLOW_OCTAVES)) > 1e-6))
def test_a_lower_rate_passes_the_first_rung_and_only_the_first(octaves: float) -> None:
    """The worst of nine, that far below the leader's learning rate."""
    others = [Rival(1e-3, 1.0), *(Rival(1e-3, 1.1 + n) for n in range(7))]
    own = Rival(1e-3 * 2**-octaves, 99.0)
    assert goes_on(own, others, 0, 3, 9) == (1e-9 < octaves <= SLOW_OCTAVES)
    assert not goes_on(own, others, 1, 3, 9) and not goes_on(own, others, 2, 3, 9)


def test_two_go_on_until_the_last_rung_and_ties_do_not_end_a_trial() -> None:
    first, second, third = (Rival(1e-3, value) for value in (1.0, 1.1, 1.2))
    for rung in (0, 1):
        assert goes_on(second, [first, third], rung, 3, 3)
        assert not goes_on(third, [first, second], rung, 3, 3)
    assert not goes_on(second, [first], 2, 3, 3)
    assert goes_on(Rival(1e-3, 1.0), [first], 2, 3, 3)


# ------------------------------------------------------------------ one trial stands still

PLACED = AllocationSpec(tinit=1, tfinal=2)


@pytest.mark.usefixtures("unmetered")
@pytest.mark.parametrize(
    ("changes", "optimizer"),
    [
        ({}, "adamw"),
        ({"optimizer": "sgd"}, "sgd"),
        ({"init_rank": 6, "target_rank": 4, "allocation": PLACED}, "adamw"),
    ],
    ids=["adamw", "sgd", "adalora"],
)
@pytest.mark.parametrize("held_after", [1, 3])
@pytest.mark.sample(2)
def test_a_trial_that_stood_still_is_one_that_never_stopped(
    llama: LlamaForCausalLM, changes: dict[str, Any], optimizer: Any, held_after: int
) -> None:
    bench = bench_of(llama)
    first, other = (
        replace(
            spec_of(steps=6, num_evals=3, rank=4, learning_rate=rate),
            **{"method": "rsadalora" if "allocation" in changes else "rslora", **changes},
        )
        for rate in (3e-3, 1e-3)
    )

    def run(held_after: int) -> list[StepPoint]:
        points: list[StepPoint] = []
        with Pack(bench, optimizer=optimizer, rows=8) as pack:
            member = pack.admit(first)
            beside: Member | None = None
            is_held, steps_beside = False, 0
            while not member.is_finished:
                for advance in pack.advance():
                    assert advance.error is None and advance.point is not None
                    if advance.member is member:
                        points.append(advance.point)
                    else:
                        steps_beside += 1
                if member.steps_done == held_after and beside is None:
                    pack.hold(member)
                    beside, is_held = pack.admit(other), True
                elif is_held and steps_beside == 2:
                    assert beside is not None
                    pack.release(beside)
                    pack.resume(member)
                    is_held = False
        return points

    whole, stopped = run(held_after=99), run(held_after)
    assert [p.step for p in stopped] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(stopped, whole, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-6)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
    expected = bits(alone(bench, first))
    assert [p.train_loss for p in stopped] == pytest.approx([b[0] for b in expected], rel=1e-5)


# ------------------------------------------------------------------ cohorts of real studies


@pytest.fixture(autouse=True)
def packs_are_faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pack_size, "_seconds_alone", lambda *_: 1.0)
    monkeypatch.setattr(pack_size, "_seconds_packed", lambda *_: 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A ladder of five, a summit of three, one more rank."""
    found = study_values(
        tmp_path_factory.mktemp("study"),
        trials=14, rank=[2, 4, 8], alpha=[8], seeds=1, min_improvement=0.0,
        learning_rate=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    )  # fmt: skip
    found["training"] = {"steps": 16, "batch_size": 4, "num_evals": 8}
    return {**found, "pack_memory_budget": "1GiB"}


def config_of(values: dict[str, Any], **packing: Any) -> StudyConfig:
    return StudyConfig.model_validate({**values, "packing": {"lookahead": 8, **packing}})


def run(config: StudyConfig, out: Path, **options: Any) -> list[Event]:
    """A study whose rungs say something from the first on: a random model learns slowly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "PROGRESS", 0.0)
        return list(study_events(config, out, report=False, **options))


def cohorts(events: list[Event]) -> dict[tuple[int, float], TrialRecord]:
    """Search trials by rank and learning rate."""
    found = [event.record for event in events if isinstance(event, TrialSettled)]
    return {(r.rank, r.learning_rate): r for r in found if r.role == "search"}


def shape(records: dict[tuple[int, float], TrialRecord]) -> dict[tuple[int, float], Any]:
    return {key: (r.outcome, [p.step for p in r.curve]) for key, r in records.items()}


@pytest.fixture(scope="module")
def large(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    """All of a cohort in one pack."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_size, "_seconds_alone", lambda *_: 1.0)
        patch.setattr(pack_size, "_seconds_packed", lambda *_: 1.0)
        return run(config_of(values, trials=8), tmp_path_factory.mktemp("large") / "out")


def assert_same(found: list[Event], expected: list[Event]) -> None:
    ours, theirs = cohorts(found), cohorts(expected)
    assert shape(ours) == shape(theirs)
    for key, record in ours.items():
        for mine, other in zip(record.curve, theirs[key].curve, strict=True):
            assert mine.eval_loss == pytest.approx(other.eval_loss, rel=3e-5)


def test_of_a_ladder_half_end_at_every_rung(large: list[Event]) -> None:
    ladder = [r for (rank, _), r in cohorts(large).items() if rank == 8]
    lengths = sorted(r.curve[-1].step for r in ladder if r.outcome in ("pruned", "complete"))
    assert lengths[0] <= 4 < lengths[-1] == 16
    assert sum(r.outcome == "complete" for r in ladder) in (1, 2)


@pytest.mark.parametrize(
    "packing", [{"trials": 2}, {"trials": 1}, {"trials": 2, "admission": "together"}], ids=str
)
@pytest.mark.sample(1)
def test_a_cohort_larger_than_its_pack_is_halved_as_if_it_were_not(
    packing: dict[str, Any], values: dict[str, Any], large: list[Event], tmp_path: Path
) -> None:
    events = run(config_of(values, **packing), tmp_path / "out")
    assert_same(events, large)
    # Nobody takes the step after a rung before all of the ladder have come there.
    first = rungs(spec_of(steps=16, num_evals=8))[0]
    came: set[int] = set()
    for event in events:
        if isinstance(event, TrialStep) and event.spec.cohort == 0:
            if event.point.step == first:
                came.add(event.number)
            assert event.point.step <= first or len(came) == event.spec.cohort_size
        if isinstance(event, TrialSettled) and event.record.outcome == "diverged":
            came.add(event.record.number)


def test_the_curves_are_those_of_trials_alone(
    values: dict[str, Any], large: list[Event], tmp_path: Path
) -> None:
    search = {**values["search"], "pruner": "none"}
    events = run(config_of({**values, "search": search}, mode="off"), tmp_path / "out")
    single = cohorts(events)
    ladder = {key: r for key, r in cohorts(large).items() if key[0] == 8}
    assert len(ladder) >= 3
    for key, record in ladder.items():
        for mine, other in zip(record.curve, single[key].curve, strict=False):
            assert mine.eval_loss == pytest.approx(other.eval_loss, rel=1e-4)


@pytest.mark.parametrize("step", [2, 3, 9])
@pytest.mark.sample(1)
def test_a_stop_while_trials_stand_at_a_rung_loses_nothing(
    step: int, values: dict[str, Any], large: list[Event], tmp_path: Path
) -> None:
    stop, out = StopFlag(), tmp_path / "out"
    before: list[Event] = []
    with pytest.raises(StudyInterrupted):
        for event in study_events(config_of(values, trials=2), out, stop=stop, report=False):
            before.append(event)
            if isinstance(event, TrialStep) and event.point.step == step:
                stop.requested = True
    assert_same([*before, *run(config_of(values, trials=2), out)], large)


def test_out_of_memory_while_others_stand_at_a_rung(
    values: dict[str, Any], large: list[Event], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Pack._logits

    def small(self: Pack, batch: Any) -> torch.Tensor:
        if len(batch.input_ids) > 2 * 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, batch)

    monkeypatch.setattr(Pack, "_logits", small)
    assert_same(run(config_of(values, trials=4), tmp_path / "out"), large)


def test_a_trial_that_diverges_counts_as_come_to_no_rung(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of the ladder to begin gives no number while the others stand at the first rung."""
    real = Pack.advance

    def faulty(self: Pack) -> list[Advance]:
        return [
            Advance(a.member, error=ValueError("no number")) if a.member.spec.learning_rate == 3e-4
            else a for a in real(self)
        ]  # fmt: skip

    monkeypatch.setattr(Pack, "advance", faulty)
    found = cohorts(run(config_of(values, trials=2), tmp_path / "out"))
    assert found[8, 3e-4].outcome == "diverged"
    assert any(r.outcome == "complete" for (rank, _), r in found.items() if rank == 8)
    assert {rank for rank, _ in found} == {2, 4, 8}


def test_a_fault_of_the_pack_puts_back_those_that_stood_at_a_rung_too(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Pack._step
    count = 0

    def faulty(self: Pack) -> Any:
        nonlocal count
        count += 1
        if count == 4:  # two stand at step 2, two others are on their way there
            raise ZeroDivisionError("a fault")
        return real(self)

    monkeypatch.setattr(Pack, "_step", faulty)
    events = run(config_of(values, trials=2), tmp_path / "out")
    plans = [event.plan for event in events if isinstance(event, PackingDecided)]
    assert "ZeroDivisionError: a fault" in plans[-1].reason
    found = cohorts(events)
    assert {rate for rank, rate in found if rank == 8} >= {3e-4, 1e-3, 3e-3, 1e-2, 3e-2}
    assert {r.engine for r in found.values()} == {"peft"}
    assert {r.outcome for r in found.values()} <= {"complete", "pruned", "diverged"}


def test_who_found_no_room_beside_others_is_let_in_once_they_stand(
    values: dict[str, Any], large: list[Event], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for two, whatever packing.trials says: the cohort still waits for all of it."""
    monkeypatch.setattr("rsauto.search.pack_memory.fits", lambda _, specs, __: len(specs) <= 2)
    events = run(config_of(values, trials=8), tmp_path / "out")
    assert_same(events, large)
