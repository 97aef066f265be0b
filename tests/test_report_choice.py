"""The trial that a command is about: by number, by rank, or the report's own answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsauto.errors import InputError
from rsauto.report.choice import Choice, chosen_record
from rsauto.report.table import Study, load_study
from rsauto.report.verdict import judge

STUDY = Path(__file__).parents[1] / "reports" / "gsm8k-embedded"


@pytest.fixture(scope="module")
def study() -> Study:
    return load_study(STUDY)


def test_the_answers_are_those_of_the_verdict(study: Study) -> None:
    verdict = judge(study.config, study.records, study.environment)
    assert verdict.best != verdict.recommended
    assert chosen_record(study, Choice(best=True)) == verdict.best
    assert chosen_record(study, Choice(recommended=True)) == verdict.recommended
    assert chosen_record(study, Choice()) == verdict.recommended


def test_a_rank_is_its_best_configuration(study: Study) -> None:
    found = chosen_record(study, Choice(rank=128))
    losses = {
        record.number: record.eval_loss
        for record in study.records
        if record.rank == 128 and record.outcome == "complete" and record.eval_loss is not None
    }
    assert len(losses) > 1
    rates = {record.learning_rate for record in study.records if record.number in losses}
    assert found.number in losses
    mean = {
        rate: [
            losses[r.number]
            for r in study.records
            if r.number in losses and r.learning_rate == rate
        ]
        for rate in rates
    }
    best = min(rates, key=lambda rate: sum(mean[rate]) / len(mean[rate]))
    assert found.learning_rate == best


def test_a_trial_is_found_by_its_number_however_it_ended(study: Study) -> None:
    for record in study.records:
        assert chosen_record(study, Choice(trial=record.number)) == record


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        (Choice(trial=999), "--trial 999: .* has no such trial; there are 0 to"),
        (Choice(rank=7), "--rank 7: no trial of that rank finished .*; ranks that did: .*128"),
    ],
)
def test_what_is_not_there_is_refused(study: Study, choice: Choice, says: str) -> None:
    with pytest.raises(InputError, match=says):
        chosen_record(study, choice)


def test_two_choices_are_refused_and_each_has_a_name() -> None:
    with pytest.raises(InputError, match="--trial and --best say which trial twice"):
        Choice(trial=0, best=True)
    names = [c.name for c in (Choice(trial=0), Choice(rank=8), Choice(best=True), Choice())]
    assert names == ["trial-0", "rank-8", "best", "recommended"]
