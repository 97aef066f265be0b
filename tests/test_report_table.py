"""The table: strict reading, fixed types, and a folder that says what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pandas as pd
import pytest
from test_report_records import (
    BUDGET,
    ENVIRONMENT,
    allocated,
    record,
    refit,
    study_config,
    study_records,
    with_loss,
    write_study,
)

from rsauto.errors import InputError
from rsauto.records import AllocationSpec, TrialRecord, dump_line
from rsauto.report.page import write_report
from rsauto.report.table import (
    ALLOCATION_COLUMNS,
    COLUMNS,
    LEFT_OUT,
    PEFT_NAMES,
    feasible,
    load_study,
    metric_columns,
    needed_bytes,
    read_records,
    table,
)


def test_every_field_of_a_record_has_a_column_or_is_left_out_on_purpose() -> None:
    fields = {field.name for field in dataclasses.fields(TrialRecord)}
    assert set(COLUMNS) == fields - LEFT_OUT
    parts = {f"allocation_{field.name}" for field in dataclasses.fields(AllocationSpec)}
    assert set(ALLOCATION_COLUMNS) == parts


def test_an_allocation_becomes_columns_that_are_empty_for_other_methods() -> None:
    spec = AllocationSpec(tinit=7, tfinal=9, recovery="none", score="lambda", beta2=0.5)
    frame = table([allocated(0, allocation=spec), refit(1), record(2, 8, 1e-3)])
    row = frame.iloc[0]
    assert (row["allocation_tinit"], row["allocation_tfinal"]) == (7, 9)
    assert (row["allocation_recovery"], row["allocation_score"]) == ("none", "lambda")
    assert row["allocation_beta2"] == 0.5 and pd.isna(row["allocation_init_std"])
    assert (row["init_rank"], row["target_rank"], row["r_max"]) == (6, 2, 5)
    assert row["lambda_lr_ratio"] == 16.0
    assert frame[list(ALLOCATION_COLUMNS)].iloc[1:].isna().all(axis=None)
    assert frame["refit"].tolist() == [False, True, False]


def test_columns_and_types_do_not_depend_on_the_rows() -> None:
    empty, full = table([]), table(study_records())
    assert [c for c in full.columns if c != "accuracy"] == list(empty.columns)
    assert len(empty) == 0 and len(full) == len(study_records())
    for name in empty.columns:
        assert full[name].dtype == empty[name].dtype, name
    assert str(full["rank"].dtype) == "Int64" and str(full["eval_loss"].dtype) == "Float64"
    assert full["feasible"].dtype == bool
    assert full["accuracy"].dtype == "Float64"


def test_values_arrive_unchanged_and_absent_is_na() -> None:
    trial = record(7, 8, 1e-3, target_modules=("q_proj", "v_proj"), rank_pattern={"b": 1, "a": 2})
    row = table([with_loss(trial, 1.25, solo=True)]).iloc[0]
    assert (row["number"], row["rank"], row["eval_loss"]) == (7, 8, 1.25)
    assert row["target_modules"] == "q_proj,v_proj"
    assert row["rank_pattern"] == '{"a": 2, "b": 1}'
    assert row["accuracy"] == pytest.approx(0.9 - 0.3 * 1.25)
    assert row["train_loss"] == pytest.approx(1.25 + 1.1 * math.exp(-4))
    for name, source in PEFT_NAMES.items():
        assert row[name] == row[source], name
    assert pd.isna(row["error"]) and pd.isna(row["retry_of"])


def test_a_loss_that_is_not_finite_is_absent() -> None:
    trial = record(0, 8, 1.0, eval_loss=math.inf, perplexity=math.nan, metrics={"accuracy": 0.5})
    row = table([trial]).iloc[0]
    assert pd.isna(row["eval_loss"]) and pd.isna(row["perplexity"])


def test_a_metric_named_like_a_field_gets_a_name_of_its_own() -> None:
    frame = table([record(0, 8, 1e-3, metrics={"rank": 0.5, "feasible": 0.1, "f1": 0.9})])
    assert metric_columns(frame) == ["f1", "metric_feasible", "metric_rank"]
    assert frame["rank"][0] == 8 and frame["metric_rank"][0] == 0.5


def test_feasible_is_about_memory_alone() -> None:
    over = BUDGET + 1
    trials = [
        (record(0, 8, 1e-3), True),
        (record(1, 8, 9.0, outcome="diverged"), True),
        (record(2, 8, 1e-3, outcome="oom"), False),
        (record(3, 8, 1e-3, outcome="infeasible"), False),
        (record(4, 8, 1e-3, predicted_peak_bytes=over), False),
        (record(5, 8, 1e-3, predicted_reserved_bytes=over), False),
        (record(6, 8, 1e-3, measured_peak_bytes=over), False),
        (record(7, 8, 1e-3, measured_peak_bytes=BUDGET), True),
        (record(8, 8, 1e-3, predicted_peak_bytes=None), True),
        (record(9, 8, 1e-3, predicted_peak_bytes=over, memory_budget_bytes=None), True),
    ]
    frame = table([trial for trial, _ in trials])
    assert feasible(frame).tolist() == [expected for _, expected in trials]
    assert needed_bytes(frame)[6] == over and pd.isna(needed_bytes(frame)[8])


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    found = study_records()
    assert read_records(write_study(tmp_path, found)) == found


def test_a_metric_written_as_null_is_absent(tmp_path: Path) -> None:
    trial = with_loss(record(0, 8, 1e-3), 1.2)
    line = dump_line(dataclasses.replace(trial, metrics={"accuracy": math.nan, "f1": 0.5}))
    (tmp_path / "trials.jsonl").write_text(line + "\n")
    assert read_records(tmp_path)[0].metrics == {"f1": 0.5}


def test_a_record_from_before_adalora_reads_as_one_of_a_single_rank(tmp_path: Path) -> None:
    new = {
        "init_rank", "target_rank", "r_max", "rank_pattern", "allocation", "lambda_lr_ratio"
    }  # fmt: skip
    lines = []
    for trial in study_records():
        if trial.rank_pattern is None:
            data = {key: value for key, value in trial.to_json().items() if key not in new}
            lines.append(json.dumps(data))
    write_study(tmp_path, [])
    (tmp_path / "trials.jsonl").write_text("\n".join(lines) + "\n")
    verdict = write_report(tmp_path)
    assert verdict.recommended is not None and verdict.recommended.rank == 64
    assert "largest rank" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not (tmp_path / "figures" / "rank_map.svg").exists()


def test_an_unknown_field_of_a_newer_version_is_skipped(tmp_path: Path) -> None:
    line = dump_line(record(0, 8, 1e-3))[:-1] + ', "from_the_future": 1}'
    (tmp_path / "trials.jsonl").write_text(line)
    assert read_records(tmp_path)[0].rank == 8


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("not json", "line 2 is not a trial record"),
        ("[1]", "it is not a JSON object"),
        ('{"number": 3}', "missing"),
        (dump_line(record(1, 8, 1e-3)).replace('"complete"', '"finished"'), "outcome"),
        (dump_line(record(1, 8, 1e-3)).replace('"rank": 8', '"rank": "eight"'), "rank is 'eight'"),
        (dump_line(record(0, 8, 1e-3)), "trial 0 twice: lines 1 and 2"),
        (dump_line(record(1, 8, 1e-3)).replace('"curve": []', '"curve": [3]'), "line 2"),
        (dump_line(record(1, 8, 1e-3)).replace('"metrics": {}', '"metrics": [3]'), "line 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    good = dump_line(record(0, 8, 1e-3))
    (tmp_path / "trials.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(InputError, match=r"trials\.jsonl") as caught:
        read_records(tmp_path)
    assert says in str(caught.value)


def test_a_last_line_cut_off_says_what_to_do(tmp_path: Path) -> None:
    whole = dump_line(record(0, 8, 1e-3))
    (tmp_path / "trials.jsonl").write_text(f"{whole}\n{whole[:50]}")
    with pytest.raises(InputError, match=r"line 2 is cut off.*same command.*delete that line"):
        read_records(tmp_path)


def test_all_bad_lines_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_text("x\ny\n")
    with pytest.raises(InputError) as caught:
        read_records(tmp_path)
    assert len(caught.value.problems) == 2


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trials\.jsonl is not there"):
        load_study(tmp_path)
    write_study(tmp_path, [], environment=None)
    study = load_study(tmp_path)
    assert study.environment == {} and study.records == () and len(study.trials) == 0
    (tmp_path / "environment.json").write_text("[]")
    with pytest.raises(InputError, match=r"environment\.json"):
        load_study(tmp_path)
    (tmp_path / "study.yaml").unlink()
    (tmp_path / "environment.json").unlink()
    with pytest.raises(InputError, match=r"study\.yaml"):
        load_study(tmp_path)


def test_a_folder_is_read_as_a_study(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, study_records()))
    assert study.folder == tmp_path and study.config == study_config()
    assert study.environment == ENVIRONMENT and list(study.records) == study_records()
    assert len(study.trials) == len(study.records)
