"""Processes that die while trials share them: whoever is at fault ends alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from forked import require_continued, require_sound, run_to, tiny
from processes import ended, forked
from tiny_study import records

from rsauto.config import StudyConfig
from rsauto.records import TrialSpec
from rsauto.search import pack_size
from rsauto.search.ledger import MOST_DEATHS
from rsauto.training.packed import Pack
from rsauto.training.trial import Trial

DEADLY = 0.01
"""The learning rate of the trial that takes its process with it, as one that fills the machine's
memory would."""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """Four points of a grid in one pack; one is deadly from its second step on."""
    monkeypatch.setattr(pack_size, "_seconds_alone", lambda *_: 1.0)
    monkeypatch.setattr(pack_size, "_seconds_packed", lambda *_: 1.0)
    together, alone = Pack.advance, Trial.steps

    def is_deadly(spec: TrialSpec) -> bool:
        return spec.learning_rate == DEADLY

    def advance(pack: Pack) -> object:
        if any(is_deadly(member.spec) and member.steps_done for member in pack.members):
            os._exit(137)
        return together(pack)

    def steps(trial: Trial) -> object:
        if is_deadly(trial.spec):
            os._exit(137)
        return alone(trial)

    monkeypatch.setattr(Pack, "advance", advance)
    monkeypatch.setattr(Trial, "steps", steps)
    return tiny(
        tmp_path, packed=4, strategy="grid", pruner="none", rank=[4], alpha=[8], seeds=1,
        learning_rate=[1e-3, 3e-3, DEADLY, 3e-2], trials=4, baseline=False,
    )  # fmt: skip


def test_a_trial_that_kills_its_pack_costs_the_others_nothing(
    config: StudyConfig, tmp_path: Path
) -> None:
    out, codes = tmp_path / "out", []
    for _ in range(MOST_DEATHS):
        codes.append(ended(forked(lambda: run_to(config, out), tmp_path / "killed.log")))
    assert codes == [137] * MOST_DEATHS, (tmp_path / "killed.log").read_text()
    require_continued(config, out)
    require_sound(out, has_report=True)
    found = {record["learning_rate"]: record for record in records(out)}
    assert len(found) == 4
    deadly = found.pop(DEADLY)
    assert deadly["outcome"] == "failed" and f"died {MOST_DEATHS} times" in deadly["error"]
    assert {record["outcome"] for record in found.values()} == {"complete"}
    assert {record["engine"] for record in found.values()} == {"peft"}, "alone at the last"
