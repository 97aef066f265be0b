"""Reports of studies whose trials shared packs, and so have no peak or time of their own."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from test_report_records import (
    BUDGET,
    MIB,
    peak_bytes,
    record,
    study_config,
    study_records,
    with_loss,
    write_study,
)

from rsauto.console import print_verdict
from rsauto.records import TrialRecord
from rsauto.report.cells import rank_grid, tiles, trial_grid
from rsauto.report.figures import panels
from rsauto.report.page import write_report
from rsauto.report.panel import Panel
from rsauto.report.pareto import pareto, select_rank
from rsauto.report.predictions import predictions_panel
from rsauto.report.ranks import packing_note, rank_table
from rsauto.report.table import load_study, table
from rsauto.report.verdict import Verdict, judge

PACK: dict[str, Any] = {"engine": "packed", "pack_id": "p0", "pack_size": 8}


def packed(number: int, rank: int, rate: float, loss: float, **changes: Any) -> TrialRecord:
    """A complete trial of a pack, whose peak is over the budget of one trial alone."""
    fields = {**PACK, "pack_peak_bytes": 2 * BUDGET, **changes}
    return with_loss(record(number, rank, rate, **fields), loss)


def verdict_on(trials: list[TrialRecord], **search: Any) -> Verdict:
    return judge(study_config(**search), trials, {})


def ranks_of(trials: list[TrialRecord]) -> pd.DataFrame:
    return rank_table(trials, verdict_on(trials)).set_index("rank")


MOSTLY_PACKED = [
    with_loss(record(0, 8, 5e-5, role="default", method="lora"), 1.9, solo=True),
    with_loss(record(1, 8, 2e-3, role="default_tuned", method="lora"), 1.5, solo=True),
    *(packed(2 + n, rank, 1e-3, 1.4 - n / 10) for n, rank in enumerate((4, 16, 64))),
    replace(packed(5, 16, 9e-3, 1.9), outcome="pruned", fidelity=0.5, steps=50),
    with_loss(record(6, 64, 1e-3, role="seed", seed=1), 1.22, solo=True),
]


def test_a_rank_has_the_time_of_a_trial_that_ran_alone_or_none() -> None:
    rows = ranks_of(MOSTLY_PACKED)
    assert rows.loc[64, "objective"] == pytest.approx(1.21), "the mean over both seeds"
    assert rows.loc[64, "train_seconds"] == MOSTLY_PACKED[6].train_seconds
    assert rows.loc[64, "measured_peak_bytes"] == MOSTLY_PACKED[6].measured_peak_bytes
    for rank in (4, 16):
        assert pd.isna(rows.loc[rank, "train_seconds"])
        assert pd.isna(rows.loc[rank, "measured_peak_bytes"])
        assert rows.loc[rank, "predicted_peak_bytes"] == peak_bytes(rank)
    assert rows["fits"].all(), "a pack's peak is not that of its trials"


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({}, 8.5),
        ({"target_modules": "attention"}, None),
        ({"micro_batch_size": 4}, None),
        ({"role": "search", "alpha": 64}, 8.5),
    ],
)
def test_another_trial_of_the_rank_lends_its_time_where_it_costs_the_same(
    changes: dict[str, Any], seconds: float | None
) -> None:
    """Learning rate and alpha cost nothing; layers and micro-batches do."""
    best = packed(0, 16, 1e-3, 1.0)
    others = [
        replace(with_loss(record(n, 16, 2e-3, **changes), 1.5, solo=True), train_seconds=time)
        for n, time in ((1, 8.0), (2, 9.0))
    ]
    row = ranks_of([best, *others]).loc[16]
    assert row["objective"] == 1.0
    if seconds is None:
        assert pd.isna(row["train_seconds"]) and pd.isna(row["measured_peak_bytes"])
    else:
        assert row["train_seconds"] == pytest.approx(seconds)
        assert row["measured_peak_bytes"] == others[0].measured_peak_bytes


def test_a_rank_of_trials_without_a_micro_batch_is_read_as_alike() -> None:
    best = packed(0, 16, 1e-3, 1.0, micro_batch_size=None)
    other = with_loss(record(1, 16, 2e-3, micro_batch_size=None), 1.5, solo=True)
    assert ranks_of([best, other]).loc[16, "train_seconds"] == other.train_seconds


def test_a_time_of_its_own_is_not_mixed_with_that_of_others() -> None:
    own = replace(with_loss(record(0, 16, 1e-3), 1.0, solo=True), train_seconds=3.0)
    other = replace(with_loss(record(1, 16, 2e-3), 1.5, solo=True), train_seconds=9.0)
    assert ranks_of([own, other]).loc[16, "train_seconds"] == 3.0


def test_a_study_of_packs_alone_has_a_verdict_ranks_and_figures() -> None:
    trials = [packed(n, rank, 1e-3, 2 - n / 10) for n, rank in enumerate((4, 8, 16, 32))]
    verdict = verdict_on(trials)
    assert verdict.best is not None and verdict.best.rank == 32
    assert verdict.too_large == ()
    rows = ranks_of(trials)
    assert rows["train_seconds"].isna().all() and rows["measured_peak_bytes"].isna().all()
    shown = {panel.key: panel for panel in panels(trials, verdict)}
    assert "memory" in shown and "predictions" not in shown
    assert "as predicted" in shown["memory"].caption
    grid = rank_grid(rank_table(trials, verdict), verdict)
    at = [grid.headers.index(name) for name in ("measured peak", "train time")]
    assert {row[i] for row in grid.rows for i in at} == {"-"}


def test_choosing_and_the_front_need_no_measured_peak() -> None:
    trials = table(MOSTLY_PACKED)
    assert select_rank(trials, memory_budget=BUDGET)["rank"] == 64
    assert select_rank(trials, memory_budget=15 * MIB, prefer="largest")["rank"] == 8
    assert pareto(trials)["rank"].tolist() == [4, 16, 64]
    assert pareto(trials, "train_seconds")["number"].tolist() == [1, 6], "those that have a time"


def test_measured_against_predicted_shows_trials_that_ran_alone_only() -> None:
    panel = predictions_panel(table(MOSTLY_PACKED))
    assert panel is not None
    numbers = [text.split(",")[0] for text in panel.layers[1].hover]
    assert numbers == ["trial 0", "trial 1", "trial 6"]
    assert panel.caption.startswith("3 trials that ran alone")


def test_a_point_of_a_figure_says_that_it_was_packed() -> None:
    shown = panels(MOSTLY_PACKED, verdict_on(MOSTLY_PACKED))
    hover = [
        text
        for panel in shown
        if isinstance(panel, Panel) and panel.key == "memory"
        for layer in panel.layers
        for text in layer.hover
    ]
    told = {text.split(",")[0] for text in hover if "trained in a pack of up to 8" in text}
    assert told == {"trial 2", "trial 3", "trial 4", "trial 5"}


def test_the_list_of_trials_tells_engine_size_and_peak_of_the_pack() -> None:
    grid = trial_grid(table(MOSTLY_PACKED), "eval_loss")
    at = {name: grid.headers.index(name) for name in ("engine", "pack size", "pack peak bytes")}
    cells = [tuple(row[i] for i in at.values()) for row in grid.rows]
    assert cells[0] == ("peft", "-", "-")
    assert cells[2] == ("packed", "8", "64.0 MiB")
    assert "pack id" not in grid.headers


def test_the_memory_that_is_needed_says_that_it_is_predicted() -> None:
    by_name = {name: (value, remark) for name, value, remark in tiles(verdict_on(MOSTLY_PACKED))}
    assert by_name["memory needed"][1] == "predicted, of 32.0 MiB"


def test_the_note_counts_packed_trials_and_is_silent_without_any() -> None:
    note = packing_note(MOSTLY_PACKED)
    assert note is not None
    assert note.startswith("4 of 7 trials were trained in packs, up to 8 together")
    in_turns = packing_note([replace(trial, pack_size=1) for trial in MOSTLY_PACKED])
    assert in_turns is not None
    assert in_turns.startswith("4 of 7 trials were trained in turns with others of their cohort")
    assert packing_note([t for t in MOSTLY_PACKED if t.engine == "peft"]) is None
    assert packing_note([]) is None


def test_page_markdown_and_terminal_carry_the_note_and_the_files_every_column(
    tmp_path: Path,
) -> None:
    folder = write_study(tmp_path, MOSTLY_PACKED)
    verdict = write_report(folder)
    note = packing_note(MOSTLY_PACKED) or ""
    for name in ("report.html", "report.md"):
        text = (folder / name).read_text(encoding="utf-8")
        assert text.count(note) == 1, name
    csv = pd.read_csv(folder / "tradeoff.csv")
    for frame in (csv, pd.read_parquet(folder / "tradeoff.parquet")):
        assert frame["engine"].tolist() == ["peft"] * 2 + ["packed"] * 4 + ["peft"]
        assert frame["pack_size"].dropna().tolist() == [8] * 4
        assert frame["pack_peak_bytes"].dropna().tolist() == [2 * BUDGET] * 4
    console = Console(width=120, file=io.StringIO(), record=True)
    print_verdict(load_study(folder), verdict, console)
    assert "4 of 7 trials were trained in packs" in console.export_text()


def test_packing_changes_nothing_that_a_verdict_says() -> None:
    """But for what was measured: the same losses alone and in packs give the same words."""
    alone = [replace(t, engine="peft", pack_id=None, pack_size=None) for t in study_records()]
    assert judge(study_config(), alone, {}).sentences == verdict_on(study_records()).sentences
