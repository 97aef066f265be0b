"""A study's database that stops, comes back, or drops its connections; clocks, disks and workers.

    python tests/faults/test_storage_faults.py --minutes 10

kills workers of one study, each with a chance of 30 % a minute, and starts new ones.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import postgres
import psutil
import psycopg
import pytest
from processes import Child, command_line
from test_workers_postgres import check_books, database, trials_of, wait_for, worker_at
from tiny_study import records, write_study

CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
TRIALS, FEW = 12, 8


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    with postgres.running() as found:
        yield found


def settled(url: str) -> int:
    return sum("record" in trial.user_attrs for trial in trials_of(url))


def end(host: Child, *others: Child) -> str:
    """What the host said, once it has ended by itself."""
    try:
        output, _ = host.communicate(timeout=300)
        for other in others:
            other.communicate(timeout=60)
    finally:
        for process in (host, *others):
            process.kill()
            process.wait()
    assert "Traceback" not in output
    return output


@pytest.mark.thorough
def test_a_database_that_is_restarted_in_mid_study(server: postgres.Server, tmp_path: Path) -> None:
    url = database(server.url, "restarted")
    study, out = write_study(tmp_path, trials=TRIALS), tmp_path / "out"
    host = command_line(
        "study", study, "--out", out, "--storage", url, "--no-report", step_seconds=0.4
    )
    worker = None
    try:
        wait_for(lambda: len(trials_of(url)) > 0, host)
        worker = command_line("worker", url, "--study", "tiny", step_seconds=0.4)
        for how in (signal.SIGQUIT, signal.SIGINT):
            before = settled(url)
            wait_for(lambda: settled(url) > before, host)  # noqa: B023
            server.stop(how)
            time.sleep(3)
            server.start()
    finally:
        output = end(host, *filter(None, [worker]))
    assert host.returncode == 0, output
    check_books(trials_of(url), records(out), TRIALS)


def test_connections_that_are_cut_all_the_time(server: postgres.Server, tmp_path: Path) -> None:
    url = database(server.url, "cut")
    study, out = write_study(tmp_path, trials=FEW), tmp_path / "out"
    host = command_line(
        "study", study, "--out", out, "--storage", url, "--no-report", step_seconds=0.05
    )
    num_cut = 0
    with psycopg.connect(server.url, autocommit=True) as connection:
        while host.poll() is None:
            num_cut += len(connection.execute(CUT, ["cut"]).fetchall())
            time.sleep(1)
    output = end(host)
    assert host.returncode == 0, output
    assert num_cut >= 3
    check_books(trials_of(url), records(out), FEW)


def test_a_database_that_stays_away_ends_the_study_and_its_return_continues_it(
    server: postgres.Server, tmp_path: Path
) -> None:
    url = database(server.url, "away")
    study, out = write_study(tmp_path, trials=FEW), tmp_path / "out"
    # A minute and a half of patience is for users.
    short = (
        "import rsauto.search.storage as storage\nstorage.patiently.__defaults__ = ((0.1, 0.2),)\n"
    )
    host = command_line(
        "study", study, "--out", out, "--storage", url, step_seconds=0.4, before=short
    )
    try:
        wait_for(lambda: settled(url) > 2, host)
        server.stop()
        output = end(host)
    finally:
        host.kill()
        server.start()
    assert host.returncode == 4, output
    assert "does not answer any more" in output and "run the same command again" in output
    safe = {trial.number for trial in trials_of(url) if "record" in trial.user_attrs}
    output = end(command_line("study", study, "--out", out, "--storage", url, "--no-report"))
    check_books(trials_of(url), records(out), FEW)
    assert safe <= {line["number"] for line in records(out)}


def test_no_command_line_has_the_password_of_a_storage(
    server: postgres.Server, tmp_path: Path
) -> None:
    """They are everybody's to read; the server asks for no password, so that any will do."""
    url = database(server.url, "secret").replace("rsauto@", "rsauto:s3cr3t@")
    study, out = write_study(tmp_path, trials=FEW), tmp_path / "out"
    host = command_line(
        "study", study, "--out", out, "--workers", "2", "--no-report",
        # Slow enough to leave trials for the one that is only starting.
        step_seconds=1.5, before=f"import os\nos.environ['RSAUTO_STORAGE'] = {url!r}",
    )  # fmt: skip
    seen: set[str] = set()
    while host.poll() is None:
        for child in [psutil.Process(host.pid), *_children(host.pid)]:
            try:
                seen.add(" ".join(child.cmdline()))
            except psutil.Error:
                continue
        time.sleep(0.1)
    output = end(host)
    assert host.returncode == 0, output
    assert any("rsauto worker --study tiny" in line for line in seen)
    assert not [line for line in seen if "s3cr3t" in line]
    assert "s3cr3t" not in output + (out / "workers" / "2.log").read_text(encoding="utf-8")
    assert len({line["worker"] for line in records(out)}) == 2, "the second one worked"


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


MOVED = """
import random, time
from rsauto.search import liveness
true, chance = time.time, random.Random(0)
time.time = lambda: true() + chance.choice([-1e6, 0, 1e6])
"""
SLOW = """
import os, time
sync, replace = os.fsync, os.replace
os.fsync = lambda file: (time.sleep(0.2), sync(file))[1]
os.replace = lambda *paths, **options: (time.sleep(0.2), replace(*paths, **options))[1]
"""


@pytest.mark.parametrize("fault", [MOVED, SLOW], ids=["clock", "disk"])
@pytest.mark.sample(1)
def test_a_clock_that_jumps_and_a_disk_that_is_slow_change_no_result(
    tmp_path: Path, fault: str
) -> None:
    study = write_study(tmp_path, trials=4)
    found = []
    for name, before in (("plain", ""), ("hit", fault)):
        host = command_line(
            "study", study, "--out", tmp_path / name, "--no-report", "--set", "packing.mode=off",
            step_seconds=0.0, before=before,
        )  # fmt: skip
        output = end(host)
        assert host.returncode == 0, output
        found.append(records(tmp_path / name))
    for plain, hit in zip(*found, strict=True):
        same = ("number", "outcome", "rank", "alpha", "learning_rate", "eval_loss", "curve")
        assert [hit[field] for field in same] == [plain[field] for field in same]
        assert hit["train_seconds"] is None or 0 < hit["train_seconds"] < 300


def reaped(minutes: float, num_workers: int = 4, chance_a_minute: float = 0.3) -> str:
    """A study whose workers die and are replaced; what is left of it."""
    chance = random.Random(0)
    with postgres.running() as server, tempfile.TemporaryDirectory() as folder:
        # Random, so that it never comes to its end by itself.
        endless = {"trials": 100_000, "strategy": "random", "min_improvement": 0.0}
        study, out = write_study(Path(folder), **endless), Path(folder) / "out"
        options = ("--storage", server.url)
        trials_of(server.url)  # makes Optuna's tables
        host = command_line("study", study, "--out", out, *options, "--no-report", step_seconds=0.2)
        wait_for(lambda: len(trials_of(server.url)) > 0, host)
        workers: list[Child] = []
        num_killed = 0
        stop_at = time.monotonic() + 60 * minutes
        while time.monotonic() < stop_at:
            workers = [worker for worker in workers if worker.poll() is None]
            for worker in list(workers):
                if chance.random() < chance_a_minute / 60:
                    os.kill(worker.pid, signal.SIGKILL)
                    num_killed += 1
            while len(workers) < num_workers:
                workers.append(worker_at(server.url))
            assert host.poll() is None, host.communicate()
            time.sleep(1)
        for process in (host, *workers):
            process.send_signal(signal.SIGTERM)
        output = end(host, *workers)
        # Enough for what was broken off, and for some more.
        num_trials = settled(server.url) + 4 * num_workers
        end(
            command_line(
                "study", study, "--out", out, *options, "--no-report", "--trials", str(num_trials)
            )
        )
        lines = records(out)
        check_books(trials_of(server.url), lines, num_trials)
    return (
        f"{num_killed} workers killed, {len(lines)} trials, none lost, none twice\n{output[-300:]}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    print(reaped(parser.parse_args().minutes))
