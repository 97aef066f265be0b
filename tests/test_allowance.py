"""Trials that need more memory than predicted make the study keep more of it free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planning import planner_of
from test_memory import SMALL_LLAMA
from tiny_study import study_values

from rsauto.config import StudyConfig
from rsauto.memory.planner import ALLOWANCE
from rsauto.records import TrialRecord, TrialSpec
from rsauto.search.allowance import Allowance, allowance_after
from rsauto.search.driver import study_events
from rsauto.search.events import AllowanceRaised, Event, StudyEnded, TrialSettled
from rsauto.study_file import validate
from rsauto.training import loop

MIB = 2**20
SPEC = TrialSpec(
    role="search", method="rslora", rank=8, alpha=8, scaling_rule="rslora", learning_rate=1e-3
)


@pytest.fixture
def needing(record_of: Callable[..., TrialRecord]) -> Callable[..., TrialRecord]:
    """A record of 100 MiB predicted, 110 MiB reserved."""

    def make(measured: float | None, outcome: str = "complete", number: int = 0) -> TrialRecord:
        return record_of(
            SPEC,
            number,
            outcome=outcome,
            predicted_peak_bytes=100 * MIB,
            predicted_reserved_bytes=110 * MIB,
            measured_peak_bytes=None if measured is None else int(measured * MIB),
            memory_budget_bytes=1000 * MIB,
        )

    return make


def test_predictions_that_held_change_nothing(needing: Callable[..., TrialRecord]) -> None:
    records = [needing(99.5), needing(None), needing(101.9), needing(None, "infeasible")]
    assert allowance_after(records, 0) == Allowance(ALLOWANCE)


def test_the_largest_excess_decides(needing: Callable[..., TrialRecord]) -> None:
    records = [needing(105, number=3), needing(112.34, number=4), needing(103)]
    found = allowance_after(records, 0)
    assert found.share == 0.124
    assert found.reason == "trial 4 needed 12.3% more than predicted"


def test_packs_say_nothing_about_what_a_trial_needs_alone(
    needing: Callable[..., TrialRecord],
) -> None:
    """Neither that of a pack that ran out, nor its peak, which all of its trials share."""
    shared: dict[str, Any] = {"engine": "packed", "pack_id": "p", "pack_size": 4}
    full = replace(needing(None, "oom"), **shared)
    done = replace(needing(None), **shared, pack_peak_bytes=900 * MIB)
    assert allowance_after([full, done], 0) == Allowance(ALLOWANCE)
    assert allowance_after([replace(full, engine="peft")], 0).share > ALLOWANCE


def test_what_ran_out_of_memory_no_longer_fits(needing: Callable[..., TrialRecord]) -> None:
    """With CUDA's 500 MiB outside of the allocator, 500 MiB are left for 110 MiB reserved."""
    record = needing(None, "oom", number=7)
    found = allowance_after([record, needing(130)], 500 * MIB)
    assert found.reason == "trial 7 ran out of memory"
    assert 110 * (1 + found.share) > 500 > 110 * (1 + found.share - 0.002)


def test_a_planner_with_an_allowance_needs_that_much_more() -> None:
    planner = planner_of(SMALL_LLAMA, 16)
    prediction = planner.predict(8, batch_size=2, micro_batch_size=2)
    raised = planner.with_allowance(0.5)
    assert raised.needed_bytes(prediction) == int(1.5 * prediction.reserved_bytes)
    assert planner.needed_bytes(prediction) == int((1 + ALLOWANCE) * prediction.reserved_bytes)


def hold(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Lets every training step hold so much more memory than anyone planned."""
    real = loop.accumulate_gradients

    def greedy(*args: Any) -> float:
        unplanned = torch.ones(num_bytes, dtype=torch.uint8)
        loss = real(*args)
        del unplanned
        return loss

    monkeypatch.setattr(loop, "accumulate_gradients", greedy)


def config(folder: Path, **search: Any) -> StudyConfig:
    return validate(study_values(folder, trials=6, seeds=1, **search))


def run(study: StudyConfig, out: Path) -> list[Event]:
    return list(study_events(study, out))


def test_a_study_learns_from_a_measured_excess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = config(tmp_path)
    hold(monkeypatch, MIB // 4)
    events = run(study, tmp_path / "out")
    raised = [event for event in events if isinstance(event, AllowanceRaised)]
    assert raised and raised[0].allowance.share > ALLOWANCE
    assert isinstance(events[-1], StudyEnded)
    before = events.index(raised[-1])
    budget = 2 * MIB
    settled = [e.record for e in events[before:] if isinstance(e, TrialSettled)]
    ran = [r for r in settled if r.outcome != "infeasible"]
    assert ran
    for record in ran:
        assert record.predicted_reserved_bytes is not None
        assert record.predicted_reserved_bytes * (1 + raised[-1].allowance.share) <= budget
        assert record.measured_peak_bytes is None or record.measured_peak_bytes <= budget


def test_a_study_says_when_nothing_fits_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = config(tmp_path)
    hold(monkeypatch, 4 * MIB)
    events = run(study, tmp_path / "out")
    raised = [event for event in events if isinstance(event, AllowanceRaised)]
    assert raised[-1].ranks == ()
    assert isinstance(events[-1], StudyEnded)
    assert events[-1].reason == "no rank fits the memory budget any more"
    again = run(study, tmp_path / "out")
    assert sum(isinstance(event, TrialSettled) for event in again) == 0
    assert (tmp_path / "out" / "report.md").exists()
