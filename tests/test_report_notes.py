"""Where the tokens went and how trials ended, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_report_records import record, study_config, with_loss, write_study

from rsauto.records import TrialRecord
from rsauto.report.cells import rank_grid, tiles, trial_grid
from rsauto.report.notes import endings, notes, token_grid, token_note
from rsauto.report.page import write_report
from rsauto.report.ranks import rank_table
from rsauto.report.table import table
from rsauto.report.verdict import judge


def pruned(number: int, rank: int, share: float, loss: float = 0.5) -> TrialRecord:
    """Stopped at a rung, at a loss that no whole trial has."""
    done = {"steps": round(100 * share), "tokens": round(100_000 * share), "fidelity": share}
    return with_loss(record(number, rank, 1e-3, outcome="pruned", **done), loss)


def cohort() -> list[TrialRecord]:
    """A default, and six of which two ran to the end: 100 k tokens a whole trial."""
    return [
        with_loss(record(0, 8, 5e-5, role="default", method="lora", tokens=100_000), 1.5),
        with_loss(record(1, 16, 1e-3, tokens=100_000), 1.0),
        with_loss(record(2, 32, 1e-3, tokens=100_000), 1.1),
        *(pruned(3 + n, 16, share) for n, share in enumerate((0.25, 0.25, 0.5))),
        pruned(6, 64, 0.25),
        record(7, 128, 1e-3, outcome="infeasible", steps=None, tokens=None, fidelity=None),
    ]


def test_tokens_by_role_and_what_went_to_pruned_trials() -> None:
    # 3 x 100 k whole, 25 + 25 + 50 + 25 = 125 k pruned.
    assert token_note(cohort()) == (
        "425 k tokens were trained on in all; 29 % went to 4 trials that were pruned."
    )
    assert token_grid(cohort()).rows == (
        ("default", "1", "0", "100 k", "24 %", "0 %"),
        ("search", "7", "4", "325 k", "76 %", "38 %"),
        ("all", "8", "4", "425 k", "100 %", "29 %"),
    )


def test_nothing_pruned_and_nothing_trained() -> None:
    whole = cohort()[:3]
    assert token_note(whole) == "300 k tokens were trained on in all; no trial was pruned."
    assert "to 1 trial that was pruned" in (token_note([*whole, pruned(3, 8, 0.5)]) or "")
    assert token_note([]) is None and token_grid([]).rows == ()
    refused = cohort()[-1:]
    assert token_note(refused) is None and token_grid(refused).rows == ()


def test_how_trials_ended_by_rung() -> None:
    assert endings(cohort()) == ("3 complete, 1 infeasible, 4 pruned (3 after 25 %, 1 after 50 %)")
    assert endings(cohort()[:2]) == "2 complete" and endings([]) == ""


def test_pruned_trials_are_counted_and_are_never_the_best() -> None:
    """They were ahead of every whole trial when they were stopped, in this record."""
    verdict = judge(study_config(), cohort(), {})
    assert verdict.best is not None and verdict.best.number == 1
    assert (verdict.num_complete, verdict.num_pruned) == (3, 4)
    assert tiles(verdict)[-1] == ("trials", "8", "3 finished at full length, 4 pruned")
    frame = rank_table(cohort(), verdict)
    rsl = frame[frame["method"] == "rslora"].set_index("rank")
    assert rsl["num_trials"].tolist() == [4, 1, 1, 1]
    assert rsl["num_pruned"].tolist() == [3, 0, 1, 0]
    assert rsl["num_complete"].tolist() == [1, 1, 0, 0]
    assert rsl.loc[16, "best_single"] == rsl.loc[16, "objective"] == 1.0
    assert rsl.loc[[64, 128], ["objective", "best_single", "half_width"]].isna().all(axis=None)
    grid = rank_grid(frame, verdict)
    finished = [(row[0], *row[-2:]) for row in grid.rows]
    assert finished[1:4] == [("16", "1 of 4", "3"), ("32", "1 of 1", "0"), ("64", "0 of 1", "1")]


def test_the_list_of_trials_tells_how_far_each_came() -> None:
    grid = trial_grid(table(cohort()), "eval_loss")
    column = grid.headers.index("share of full length")
    shares = [row[column] for row in grid.rows]
    assert shares == ["100 %", "100 %", "100 %", "25 %", "25 %", "50 %", "25 %", "-"]


@pytest.mark.parametrize("text", [None, "", "  ", 3, {"why": "x"}])
def test_a_study_that_does_not_say_why_it_ended(text: object) -> None:
    verdict = judge(study_config(), cohort(), {"ended": text})
    assert verdict.ended is None
    assert not [note for note in notes(cohort(), verdict) if "ended" in note]


def test_the_report_says_why_the_search_ended_and_where_tokens_went(tmp_path: Path) -> None:
    why = "no trial in 12 improved on <the best>"
    write_report(write_study(tmp_path, cohort(), environment={"ended": why}))
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "Why the search ended: no trial in 12 improved on &lt;the best&gt;." in text
        assert "29 % went to 4 trials that were pruned" in text
        assert "Where the tokens went" in text
        assert "4 pruned (3 after 25 %, 1 after 50 %)" in text
