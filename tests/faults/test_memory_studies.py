"""Studies that run out of memory: a real limit on the process, and no room to load or to save."""

from __future__ import annotations

import multiprocessing
import os
import resource
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.study._constrained_optimization import _CONSTRAINTS_KEY
from packs import unmetered
from tiny_study import records, study_values

import rsauto
from rsauto.config import StudyConfig
from rsauto.errors import BudgetError
from rsauto.search import bench, pack_size
from rsauto.search.driver import study_events
from rsauto.search.events import Searching, StudyEnded
from rsauto.search.ledger import MEMORY, Ledger
from rsauto.search.storage import open_storage
from rsauto.training import packed, trial

__all__ = ["unmetered"]

LIMITS = {"VmSize": resource.RLIMIT_AS, "VmData": resource.RLIMIT_DATA}
"""What Linux counts of a process, and the limit on it."""

LARGE = 16384
"""A rank whose factors take 68 MiB, and 272 MiB with gradients and AdamW's moments."""

ROOM_MIB = 208
"""Enough for everything but that: safetensors ends the process where it finds no room to save."""

STUDIES = [(kind, mode) for kind in LIMITS for mode in ("off", "auto")]


@pytest.fixture(autouse=True)
def packs_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_size, "_seconds_alone", lambda *_: 1.0)
    monkeypatch.setattr(pack_size, "_seconds_packed", lambda *_: 1.0)


def values_of(folder: Path, mode: str = "off", **search: Any) -> dict[str, Any]:
    """Told that it has far more than the process may take."""
    found = study_values(
        folder,
        **{"trials": 7, "rank": [2, LARGE], "alpha": [8], "learning_rate": [1e-3, 1e-2],
           "strategy": "grid", "pruner": "none", "seeds": 1, **search},
    )  # fmt: skip
    return {**found, "memory_budget": "16GiB", "packing": {"mode": mode, "trials": 4}}


def limit(kind: str) -> None:
    """From now on this process may take little more than it has."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (now,) = [int(line.split()[1]) for line in status if line.startswith(kind)]
    most = (now * 2**10) + ROOM_MIB * 2**20
    resource.setrlimit(LIMITS[kind], (most, resource.RLIM_INFINITY))


def short_of_memory(kind: str, values: dict[str, Any], out: Path, answer: Any) -> None:
    """A study in a process that is limited once the model is loaded."""
    try:
        ended = False
        for event in study_events(StudyConfig.model_validate(values), out):
            if isinstance(event, Searching):
                limit(kind)
            ended = isinstance(event, StudyEnded)
        answer.send("ended" if ended else "stopped")
    except BaseException:
        answer.send(traceback.format_exc())


def in_a_limited_process(kind: str, values: dict[str, Any], out: Path) -> str:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=short_of_memory, args=(kind, values, out, there))
    process.start()
    there.close()
    try:
        said: str = here.recv() if here.poll(300) else "nothing"
    except EOFError:
        said = f"killed: {process.exitcode}"
    process.join(30)
    return said


def violations(out: Path) -> dict[int, float]:
    """What Optuna was told of every trial's memory; above zero it is infeasible."""
    ledger = Ledger.join(open_storage(None, out / "journal.log"), "tiny")
    name = f"{_CONSTRAINTS_KEY}:{MEMORY}"
    return {t.number: t.system_attrs[name] for t in ledger.study.trials if name in t.system_attrs}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RLIMIT_AS is Linux's")
@pytest.mark.skipif(
    "RSAUTO_FAULT_MOMENTS" not in os.environ,
    reason="what a process has before it is limited depends on the tests before it; to run this "
    "file by itself set RSAUTO_FAULT_MOMENTS=1",
)
@pytest.mark.parametrize(("kind", "mode"), STUDIES)
def test_a_process_that_may_take_no_more_settles_its_trials_and_goes_on(
    kind: str, mode: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = in_a_limited_process(kind, values_of(tmp_path, mode), out)
    assert said == "ended", said
    found = [record for record in records(out) if record["role"] == "search"]
    outcomes = {record["rank"]: record["outcome"] for record in found}
    assert outcomes == {2: "complete", LARGE: "oom"}
    told = violations(out)
    for record in found:
        assert (told[record["number"]] > 0) == (record["outcome"] == "oom")
        assert (record["error"] is None) == (record["outcome"] == "complete")
    if mode == "auto":
        assert {r["engine"] for r in found if r["rank"] == LARGE} == {"peft"}, "told alone"
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "Traceback" not in report and "memory" in report


# ------------------------------------------------------------ before the first trial


def full(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nDetails")


@pytest.mark.usefixtures("unmetered")
@pytest.mark.parametrize(
    ("part", "told"),
    [("load_everywhere", "load the model"), ("untouched", "measure the untouched model")],
)
def test_no_room_before_the_first_trial_is_told_in_words(
    part: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = values_of(tmp_path, rank=[2], trials=3)
    monkeypatch.setattr(bench, part, full)
    with pytest.raises(BudgetError) as caught:
        rsauto.run_study(values, out=tmp_path / "out", report=False)
    said = str(caught.value)
    assert said.startswith(f"memory_budget: out of memory while trying to {told}, so no trial")
    assert "Tried to allocate 2 GiB. Stop what else uses the device" in said
    assert "Details" not in said


# ------------------------------------------------------------ after the last step


@pytest.mark.usefixtures("unmetered")
def test_a_trial_that_cannot_be_saved_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, errors = trial.export_lora, iter([MemoryError(), ValueError("a fault in saving")])

    def save(*arguments: Any, **options: Any) -> Any:
        error = next(errors, None)
        if error is not None:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(trial, "export_lora", save)
    rsauto.run_study(values_of(tmp_path, rank=[2], trials=4), out=tmp_path / "out", report=False)
    found = [(record["outcome"], record["error"]) for record in records(tmp_path / "out")]
    assert found[:2] == [
        ("oom", "the host's memory is full"),
        ("failed", "ValueError: a fault in saving"),
    ]
    assert len(found) > 2 and set(found[2:]) == {("complete", None)}


@pytest.fixture
def failing_pack_saves(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fault(*_: Any, **__: Any) -> Any:
        raise ValueError("a fault in saving")

    monkeypatch.setattr(packed, "export_lora", fault)
    yield


@pytest.mark.usefixtures("unmetered", "failing_pack_saves")
def test_a_packed_trial_that_cannot_be_saved_is_run_alone(tmp_path: Path) -> None:
    values = values_of(tmp_path, "auto", rank=[2], trials=4)
    rsauto.run_study(values, out=tmp_path / "out", report=False)
    found = records(tmp_path / "out")
    assert {record["outcome"] for record in found} == {"complete"}
    assert {record["engine"] for record in found} == {"peft"}
