"""The command line as a user meets it: help, exit codes, and one clear message for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import rsauto
from tiny_study import environment, study_values
from typer.testing import CliRunner, Result

from rsauto.cli import app


def study(folder: Path, *arguments: str, **changes: Any) -> Result:
    """Runs `rsauto study` in this process on the tiny study with some sections changed."""
    values = study_values(folder)
    for section, change in changes.items():
        values[section] = {**values[section], **change} if isinstance(change, dict) else change
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return CliRunner().invoke(app, ["study", str(path), "--out", str(folder / "out"), *arguments])


def assert_refused(result: Result, folder: Path, *parts: str, code: int = 2) -> None:
    """One message with these parts, the right exit code, and nothing started."""
    assert result.exit_code == code, result.output
    for part in parts:
        assert part in result.stderr, result.stderr
    assert "Traceback" not in result.output
    assert not (folder / "out").exists(), "nothing may be started"


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys\nfrom rsauto.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'optuna', 'pandas'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert result.returncode == 0, result.stderr
    for command in ("study", "status", "report"):
        assert command in result.stdout


def test_every_option_of_study_is_there() -> None:
    text = rsauto("study", "--help").stdout
    for option in ("--trials", "--out", "--memory-budget", "--seed", "--storage", "--preset",
                   "--set", "--json"):  # fmt: skip
        assert option in text


def test_all_errors_of_a_file_come_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("trainig: {}\nsearch:\n  trials: many\n  alhpa: 16\nmemory_budget: lots\n")
    result = CliRunner().invoke(app, ["study", str(path), "--out", str(tmp_path / "out")])
    assert_refused(
        result,
        tmp_path,
        f"{path}:1: trainig: unknown key. Did you mean 'training'?",
        f"{path}:3: search.trials:",
        "(got 'many')",
        f"{path}:4: search.alhpa: unknown key. Did you mean 'alpha'?",
        f"{path}:5: memory_budget:",
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model": {"name": "./nowhere"}}, ["model.name", "./nowhere", "no folder"]),
        ({"model": {"name": "someone/no-such-model"}}, ["model.name", "someone/no-such-model"]),
        (
            {"model": {"target_modules": ["q_prj"]}},
            ["model.target_modules", "'q_prj'", "Did you mean 'q_proj'?", "It has:", "down_proj"],
        ),
        ({"data": {"name": "./nowhere.jsonl"}}, ["data.name", "nowhere.jsonl"]),
        ({"data": {"prompt": "{qestion}", "completion": "{completion}"}}, ["qestion", "prompt"]),
        ({"data": {"validation_split": "test"}}, ["validation_split", "test"]),
        ({"search": {"objective": "accuracy"}}, ["search.objective", "'accuracy'", "eval_loss"]),
        ({"training": {"micro_batch_size": 3}}, ["micro_batch_size", "4", "1, 2, 4"]),
    ],
)
def test_wrong_input_is_named_and_nothing_is_started(
    tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    assert_refused(study(tmp_path, **changes), tmp_path, *parts)


def test_a_budget_too_small_says_how_much_is_needed(tmp_path: Path) -> None:
    result = study(tmp_path, "--memory-budget", "500KiB")
    assert_refused(
        result, tmp_path, "memory_budget", "500.0 KiB", "rank 2, needs", "micro_batch_size 1",
        code=3,
    )  # fmt: skip


def test_empty_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "train.jsonl").write_text("")
    changes = {"data": {"name": str(tmp_path / "empty")}}
    assert_refused(study(tmp_path, **changes), tmp_path, "train.jsonl", "empty")


def test_a_folder_that_is_no_study_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    result = study(tmp_path)
    assert result.exit_code == 2
    assert "not empty and holds no study" in result.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_an_out_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = study(tmp_path, "--out", str(tmp_path / "file" / "out"))
    assert result.exit_code == 2
    assert "--out" in result.stderr
    assert "Traceback" not in result.output


def test_report_and_status_of_no_study_say_so(tmp_path: Path) -> None:
    for command in ("report", "status"):
        result = CliRunner().invoke(app, [command, str(tmp_path / "none")])
        assert result.exit_code == 2, result.output
        assert "none" in result.stderr


def test_json_keeps_standard_output_to_one_line(tmp_path: Path) -> None:
    result = study(tmp_path, "--json", "--trials", "1")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["trials"] == 1
