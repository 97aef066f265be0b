"""Studies whose search trials run together: the same trials and results as one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import study_values

from rsauto.config import StudyConfig
from rsauto.errors import StudyInterrupted
from rsauto.packing.layers import NotPackableError
from rsauto.records import TrialRecord
from rsauto.search import pack_size
from rsauto.search.driver import study_events
from rsauto.search.events import Event, PackingDecided, PackShrank, TrialSettled, TrialStep
from rsauto.stop import StopFlag
from rsauto.training.packed import Pack
from rsauto.training.trial import Trial


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every point of a grid: a list of trials that no result changes."""
    found = study_values(
        tmp_path_factory.mktemp("study"),
        trials=17,
        strategy="grid",
        pruner="none",
        rank=[2, 4, 64],
        alpha=[8],
        learning_rate=[1e-3, 3e-3, 1e-2],
        seeds=2,
    )
    return {**found, "pack_memory_budget": "1GiB"}


def config_of(values: dict[str, Any], **changes: Any) -> StudyConfig:
    merged = {**values}
    for section, part in changes.items():
        merged[section] = {**values.get(section, {}), **part} if isinstance(part, dict) else part
    return StudyConfig.model_validate(merged)


REAL_PROBE = (pack_size._seconds_alone, pack_size._seconds_packed)


@pytest.fixture(autouse=True)
def packs_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the probe finds on a busy machine is not what these tests are about."""
    monkeypatch.setattr(pack_size, "_seconds_alone", lambda *_: 1.0)
    monkeypatch.setattr(pack_size, "_seconds_packed", lambda *_: 1.0)


def run(config: StudyConfig, out: Path, **options: Any) -> list[Event]:
    return list(study_events(config, out, report=False, **options))


def settled(events: list[Event]) -> list[TrialRecord]:
    found = [event.record for event in events if isinstance(event, TrialSettled)]
    return sorted(found, key=lambda record: record.number)


def plan_of(events: list[Event]) -> pack_size.PackPlan:
    return next(event.plan for event in events if isinstance(event, PackingDecided))


def results(records: list[TrialRecord]) -> list[tuple[Any, ...]]:
    return [
        (r.role, r.rank, r.learning_rate, r.seed, r.outcome, [p.step for p in r.curve])
        for r in records
    ]


@pytest.fixture(scope="module")
def one_by_one(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> list[TrialRecord]:
    config = config_of(values, packing={"mode": "off"})
    events = run(config, tmp_path_factory.mktemp("alone") / "out")
    assert plan_of(events).reason == "packing.mode is off"
    records = settled(events)
    assert {record.engine for record in records} == {"peft"}
    return records


@pytest.mark.parametrize("admission", ["elastic", "together"])
@pytest.mark.sample(1)
def test_a_fixed_list_of_trials_gives_the_same_packed_and_one_by_one(
    admission: str, values: dict[str, Any], one_by_one: list[TrialRecord], tmp_path: Path
) -> None:
    config = config_of(values, packing={"trials": 4, "admission": admission})
    events = run(config, tmp_path / "out")
    assert plan_of(events).size == 4
    records = settled(events)
    assert results(records) == results(one_by_one)
    for packed, alone in zip(records, one_by_one, strict=True):
        for mine, other in zip(packed.curve, alone.curve, strict=True):
            assert mine.eval_loss == pytest.approx(other.eval_loss, rel=1e-4)
            assert mine.train_loss == pytest.approx(other.train_loss, rel=1e-4)
            assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)
        assert packed.flops == alone.flops
        # What is recorded must fit the budget of a trial, also where the pack may use more.
        assert packed.micro_batch_size == alone.micro_batch_size
        assert packed.predicted_peak_bytes == alone.predicted_peak_bytes
        assert packed.tokens == alone.tokens
    search = [record for record in records if record.role == "search"]
    assert len(search) == 9
    # The ninth waits for the first, and then has nobody to run with.
    assert [record.engine for record in search] == ["packed"] * 8 + ["peft"]
    assert {record.engine for record in records if record.role != "search"} == {"peft"}
    assert max(record.pack_size or 0 for record in search) == 4


def test_a_packed_trial_has_no_peak_and_no_clock_of_its_own(
    values: dict[str, Any], tmp_path: Path
) -> None:
    records = settled(run(config_of(values), tmp_path / "out"))
    packed = [record for record in records if record.engine == "packed"]
    for record in packed:
        assert record.measured_peak_bytes is None
        assert record.train_seconds is None and record.tokens_per_second is None
        assert record.pack_id is not None and record.pack_size == 8
        assert record.predicted_peak_bytes is not None and record.flops is not None
    assert any((record.pack_peak_bytes or 0) > 0 for record in packed)
    alone = [record for record in records if record.engine == "peft"]
    assert all(record.train_seconds and record.measured_peak_bytes for record in alone)


def test_with_elastic_admission_a_slot_is_refilled_before_the_others_are_done(
    values: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of(values, packing={"trials": 4}, search={"pruner": "median"})
    begun: dict[int, int] = {}
    steps: dict[int, int] = {}
    for event in run(config, tmp_path / "out"):
        if isinstance(event, TrialStep) and event.spec.role == "search":
            begun.setdefault(event.number, max(steps.values(), default=0))
            steps[event.number] = event.point.step
    assert len(begun) == 9


def test_a_study_stopped_within_a_pack_loses_nothing_and_goes_on(
    values: dict[str, Any], one_by_one: list[TrialRecord], tmp_path: Path
) -> None:
    config = config_of(values, packing={"trials": 4})
    stop, out = StopFlag(), tmp_path / "out"
    with pytest.raises(StudyInterrupted):
        for event in study_events(config, out, stop=stop, report=False):
            is_late = isinstance(event, TrialStep) and event.spec.role == "search"
            if is_late and event.point.step == 4:
                stop.requested = True
    events = run(config, out)
    # Numbers differ: what was running is begun again.
    done = {tuple(map(str, row)) for row in results(settled(events))}
    wanted = {tuple(map(str, row)) for row in results(one_by_one)}
    assert done <= wanted
    assert {row for row in wanted if "search" in row[0] or "seed" in row[0]} <= done


def test_out_of_memory_makes_packs_smaller_and_trials_run_on(
    values: dict[str, Any],
    one_by_one: list[TrialRecord],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Pack._logits

    def small(self: Pack, batch: Any) -> torch.Tensor:
        if len(batch.input_ids) > 2 * 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, batch)

    monkeypatch.setattr(Pack, "_logits", small)
    events = run(config_of(values, packing={"trials": 4}), tmp_path / "out")
    assert [event.size for event in events if isinstance(event, PackShrank)] == [2]
    records = settled(events)
    assert results(records) == results(one_by_one)
    engines = [r.engine for r in records if r.role == "search"]
    assert engines == ["packed"] * 8 + ["peft"], "the ninth has nobody to run with"


def test_a_trial_that_is_too_large_for_a_pack_of_one_runs_alone(
    values: dict[str, Any],
    one_by_one: list[TrialRecord],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(self: Pack, batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Pack, "_logits", full)
    records = settled(run(config_of(values, packing={"trials": 4}), tmp_path / "out"))
    assert {(r.rank, r.learning_rate, r.role) for r in records} == {
        (r.rank, r.learning_rate, r.role) for r in one_by_one
    }
    assert {record.outcome for record in records} == {"complete"}
    assert {record.engine for record in records} == {"peft"}


def test_a_fault_within_a_pack_is_told_and_its_trials_run_alone(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Pack._step

    def faulty(self: Pack) -> Any:
        if any(member.spec.rank == 64 and member.steps_done == 2 for member in self.members):
            raise ZeroDivisionError("a fault")
        return real(self)

    monkeypatch.setattr(Pack, "_step", faulty)
    events = run(config_of(values, packing={"trials": 4}), tmp_path / "out")
    plans = [event.plan for event in events if isinstance(event, PackingDecided)]
    assert [plan.size for plan in plans] == [4, 1]
    assert "ZeroDivisionError: a fault" in plans[-1].reason
    assert {record.outcome for record in settled(events)} == {"complete"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"packing": {"trials": 1}}, "packing.trials is 1"),
        ({"training": {"optimizer": "adafactor"}}, "adafactor is not packed"),
        ({"training": {"steps": 3}}, "3 steps are too few"),
        ({"pack_memory_budget": None, "memory_budget": "1.6MiB"}, "memory budget holds one"),
    ],
    ids=str,
)
def test_where_packs_do_not_apply_the_log_says_why(
    changes: dict[str, Any], reason: str, values: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of({**values, **{k: v for k, v in changes.items() if not isinstance(v, dict)}},
                       **{k: v for k, v in changes.items() if isinstance(v, dict)})  # fmt: skip
    events: list[Event] = []
    for event in study_events(config, tmp_path / "out", report=False):
        events.append(event)
        if isinstance(event, PackingDecided):
            break
    assert plan_of(events).size == 1
    assert reason in plan_of(events).reason


def test_a_model_whose_trials_cannot_share_a_batch_runs_one_by_one(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> float:
        raise NotPackableError("pos_proj is given (1, 8, 4)")

    monkeypatch.setattr(pack_size, "_seconds_packed", refuse)
    records = run(config_of(values), tmp_path / "out")
    assert plan_of(records).reason == "pos_proj is given (1, 8, 4)"
    assert {record.engine for record in settled(records)} == {"peft"}


def test_a_slower_pack_is_not_used(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def seconds(_bench: Any, _plan: Any, specs: list[Any]) -> float:
        sizes.append(len(specs))
        return {2: 1.0, 4: 1.5, 8: 3.4}[len(specs)]

    monkeypatch.setattr(pack_size, "_seconds_packed", seconds)
    assert plan_of(run(config_of(values), tmp_path / "out")).size == 4
    assert sizes == [2, 4, 8]
    monkeypatch.setattr(pack_size, "_seconds_packed", lambda *_: 1.99)
    slow = plan_of(run(config_of(values), tmp_path / "slow"))
    assert slow.size == 1
    assert "no faster" in slow.reason


def test_the_probe_leaves_the_model_as_it_was(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_size, "_seconds_alone", REAL_PROBE[0])
    monkeypatch.setattr(pack_size, "_seconds_packed", REAL_PROBE[1])
    seen: list[list[str]] = []
    real = Trial.steps

    def watched(self: Trial) -> Any:
        seen.append(sorted(name for name, _ in self.bench.model.named_parameters()))
        return real(self)

    monkeypatch.setattr(Trial, "steps", watched)
    run(config_of(values, search={"trials": 8}), tmp_path / "out")
    assert seen and all(names == seen[0] for names in seen)


@pytest.mark.parametrize("method", [["rsadalora"], ["rslora", "adalora"]], ids=str)
@pytest.mark.sample(1)
def test_adalora_runs_in_packs_too(
    method: list[str], values: dict[str, Any], tmp_path: Path
) -> None:
    search = {"method": method, "rank": [4, 8], "learning_rate": [1e-3, 3e-3], "trials": 12}
    config = config_of(values, search=search, training={"steps": 12}, packing={"trials": 4})
    records = settled(run(config, tmp_path / "out"))
    packed = {record.method for record in records if record.engine == "packed"}
    assert packed == set(method)


def test_a_trial_that_cannot_be_taken_in_runs_alone(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Pack.admit

    def refuse(self: Pack, spec: Any) -> Any:
        if spec.rank == 4:
            raise NotPackableError("this one is not packed")
        return real(self, spec)

    monkeypatch.setattr(Pack, "admit", refuse)
    records = settled(run(config_of(values, packing={"trials": 4}), tmp_path / "out"))
    assert {record.outcome for record in records} == {"complete"}
    assert {r.engine for r in records if r.rank == 4 and r.role == "search"} == {"peft"}
    assert "packed" in {record.engine for record in records}


def test_packs_may_be_turned_on_later(values: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(config_of(values, packing={"mode": "off"}, search={"trials": 8}), out)
    records = settled(run(config_of(values, packing={"trials": 4}), out))
    assert "packed" in {record.engine for record in records}


def test_a_model_that_fails_in_the_probe_runs_one_by_one(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> float:
        raise RuntimeError("vmap: no batching rule")

    monkeypatch.setattr(pack_size, "_seconds_packed", fail)
    events: list[Event] = []
    for event in study_events(config_of(values), tmp_path / "out"):
        events.append(event)
        if isinstance(event, PackingDecided):
            break
    assert "vmap: no batching rule" in plan_of(events).reason
