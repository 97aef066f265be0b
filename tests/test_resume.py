"""Kill it, interrupt it, fill its disk: what was settled stays, and the same command continues."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import Child, command_line, rsauto
from tiny_study import environment, records, write_study

TIMES = {"train_seconds", "tokens_per_second", "worker", "started_at", "retry_of", "number"}
"""Fields in which a continued study may differ from an undisturbed one."""

TRIALS = 7


def comparable(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records(out)]


@pytest.fixture(scope="module")
def study_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"), trials=TRIALS)


@pytest.fixture(scope="module")
def undisturbed(study_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    result = rsauto("study", study_file, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


def start(
    study_file: Path,
    out: Path,
    step_seconds: float = 0.15,
    prepare: Callable[[], None] | None = None,
) -> Child:
    """The command line running, its trials stretched so that it can be hit in the middle of one."""
    words = ("study", study_file, "--out", out)
    return command_line(*words, step_seconds=step_seconds, prepare=prepare, own_stderr=True)


def wait_for(condition: Callable[[], bool], process: Child) -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("the study never came that far")


def in_the_middle_of_a_trial(out: Path, num_settled: int) -> Callable[[], bool]:
    """Whether that many trials are settled and the next one has reported a value."""

    def reached() -> bool:
        journal = out / "journal.log"
        if len(records(out)) < num_settled or not journal.exists():
            return False
        lines = journal.read_text().splitlines()
        last = [json.loads(line) for line in lines[-2:] if line.endswith("}")]
        return any("intermediate_value" in entry for entry in last)

    return reached


def test_killed_in_the_middle_of_a_trial_nothing_settled_is_lost(
    study_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(study_file, out)
    wait_for(in_the_middle_of_a_trial(out, 4), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = records(out)
    assert 4 <= len(before) < len(records(undisturbed))

    # A process of its own, in which sets have another order.
    command = [sys.executable, "-m", "rsauto", "study", study_file, "--out", out]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**environment(), "PYTHONHASHSEED": "7"}
    )
    assert result.returncode == 0, result.stderr
    assert "run again" in result.stdout
    after = records(out)
    assert after[: len(before)] == before
    assert comparable(out) == comparable(undisturbed)
    assert [r["retry_of"] for r in after].count(None) == len(after) - 1
    assert not list(out.rglob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_cleanly_and_continues(
    study_file: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = start(study_file, out)
    wait_for(in_the_middle_of_a_trial(out, 4), process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "the same command continues" in stderr
    assert "Traceback" not in stderr
    assert (out / "report.html").exists(), "an interrupted study has a report too"

    assert rsauto("study", study_file, "--out", out).returncode == 0
    assert comparable(out) == comparable(undisturbed)


def test_a_second_process_on_the_same_folder_says_so(study_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(study_file, out, step_seconds=5.0)
    try:
        wait_for(lambda: len(records(out)) >= 1, process)
        second = rsauto("study", study_file, "--out", out)
        assert second.returncode == 2
        assert f"another process (pid {process.pid}) is working on this study" in second.stderr
    finally:
        process.kill()
        process.communicate()


@pytest.mark.thorough
def test_a_full_disk_ends_the_study_with_one_message_and_it_continues(
    study_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def small_files_only() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (45_000, resource.RLIM_INFINITY))

    process = start(study_file, out, prepare=small_files_only)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 4, stderr
    assert "cannot be written: File too large" in stderr
    assert "Traceback" not in stderr
    assert rsauto("study", study_file, "--out", out).returncode == 0
    assert comparable(out) == comparable(undisturbed)


def test_the_lock_of_a_killed_process_is_not_waited_for(
    study_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Optuna's lock of the journal is a link; one that dangles was waited for without end."""
    shutil.copytree(undisturbed, tmp_path / "out")
    (tmp_path / "out" / "journal.log.lock").symlink_to("out/journal.log")
    result = rsauto("study", study_file, "--out", "out", "--trials", str(TRIALS), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert records(tmp_path / "out") == records(undisturbed)
