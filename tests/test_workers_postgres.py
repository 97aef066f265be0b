"""Several processes at one study in PostgreSQL, killed and joined at any time; a server is started
for the tests."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import postgres
import pytest
from optuna.trial import FrozenTrial, TrialState
from processes import Child, command_line
from test_ledger import config_of, settle, spec_of
from tiny_study import records, write_study

from rsauto.errors import InputError, StorageAwayError, StudyInterrupted
from rsauto.records import TrialRecord, TrialSpec
from rsauto.search import liveness, storage, workers
from rsauto.search.ledger import Ledger
from rsauto.search.storage import driver_url, open_storage
from rsauto.search.workers import Joined, join_study, join_when_begun
from rsauto.stop import StopFlag

Records = Callable[..., TrialRecord]

TRIALS = 12


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with postgres.server() as found:
        yield found


def worker_at(url: str) -> Child:
    return command_line("worker", url, "--study", "tiny", step_seconds=0.1)


def trials_of(url: str, name: str = "tiny") -> list[FrozenTrial]:
    """Read with nothing of rsauto but the driver's name."""
    try:
        return optuna.load_study(study_name=name, storage=driver_url(url)).trials
    except KeyError:
        return []


def runs_a_trial(url: str, process: Child) -> Callable[[], bool]:
    """Whether that process is in the middle of one."""

    def is_running() -> bool:
        return any(
            trial.state == TrialState.RUNNING
            and trial.intermediate_values
            and trial.user_attrs.get("worker", {}).get("pid") == process.pid
            for trial in trials_of(url)
        )

    return is_running


def wait_for(condition: Callable[[], bool], *processes: Child) -> None:
    for _ in range(2400):
        if condition():
            return
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("the study never came that far")


def check_books(trials: list[FrozenTrial], lines: list[dict[str, Any]], num_trials: int) -> None:
    """Nothing lost, nothing doubled, and as many trials as were asked for."""
    assert all(trial.state.is_finished() for trial in trials)
    counted = [line for line in lines if line["outcome"] != "infeasible"]
    assert len(counted) == num_trials
    asked = [t for t in trials if "spec" in t.user_attrs]
    # Those withdrawn are more than the study was to run; an orphan may be among them.
    begun = [t for t in asked if not t.user_attrs.get("withdrawn")]
    retries = Counter(t.user_attrs["spec"]["retry_of"] for t in asked)
    del retries[None]
    assert set(retries.values()) <= {1}, "an orphan was retried twice"
    given_up = {trial.number for trial in begun if "record" not in trial.user_attrs}
    assert given_up == set(retries), "an orphan was not retried"
    assert sorted(t.number for t in begun if t.number not in given_up) == [
        line["number"] for line in lines
    ]
    points = [
        (spec.configuration(), spec.seed)
        for t in begun
        if t.number not in given_up
        for spec in [TrialSpec.from_json(t.user_attrs["spec"])]
    ]
    assert len(set(points)) == len(points), "a point was run twice"


def test_four_workers_two_of_them_killed(url: str, tmp_path: Path) -> None:
    study, out = write_study(tmp_path, trials=TRIALS), tmp_path / "out"
    lose_workers(url, study, out, num_trials=TRIALS, num_workers=3, num_killed=2)
    assert (out / "best" / "adapter_model.safetensors").exists()
    assert not [p for p in (out / "adapters").iterdir() if p.name.startswith(".")]


def lose_workers(
    url: str, study: Path, out: Path, *, num_trials: int, num_workers: int, num_killed: int
) -> None:
    """Runs a study with workers of whom some die in the middle of a trial; checks its books."""
    trials_of(url)  # Optuna's tables; two that make them at the same moment hinder each other
    # Slow enough to leave trials for those who come later.
    host = command_line(
        "study", study, "--out", out, "--storage", url, "--no-report", step_seconds=0.5
    )
    workers = []
    try:
        wait_for(lambda: len(trials_of(url)) > 0, host)
        workers = [worker_at(url) for _ in range(num_workers)]
        for victim in workers[:num_killed]:
            wait_for(runs_a_trial(url, victim), host, victim)
            os.kill(victim.pid, signal.SIGKILL)
        output, _ = host.communicate(timeout=200)
        assert host.returncode == 0, output
        for worker in workers[num_killed:]:
            said, _ = worker.communicate(timeout=60)
            assert worker.returncode == 0, said
    finally:
        for process in (host, *workers):
            process.kill()
            process.wait()
    trials = trials_of(url)
    check_books(trials, records(out), num_trials)
    pids = {worker.pid for worker in workers[:num_killed]}
    lost = [
        t.number
        for t in trials
        if t.user_attrs.get("worker", {}).get("pid") in pids and "record" not in t.user_attrs
    ]
    assert len(lost) >= 1, "nobody was killed in the middle of a trial"
    assert len({line["worker"] for line in records(out)}) >= 2
    assert " by " in output, "the host shows what others settled"


def database(url: str, name: str) -> str:
    """A database of its own in the server."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    made = url.rsplit("/", 1)[0] + f"/{name}"
    trials_of(made)  # Optuna's tables; two that make them at the same moment hinder each other
    return made


def test_what_cannot_be_joined_is_told(url: str) -> None:
    own = database(url, "joining")
    optuna.create_study(study_name="foreign", storage=driver_url(own))
    with pytest.raises(InputError, match=r"no such study.*It has: foreign"):
        join_study(own, "tiny")
    with pytest.raises(InputError, match="must name the study"):
        join_study(own)
    with pytest.raises(InputError, match="was not begun by rsauto"):
        join_study(own, "foreign")
    nobody = own.replace("rsauto@127.0.0.1", "rsauto:secret@127.0.0.1").rsplit(":", 1)[0] + ":1/x"
    with pytest.raises(InputError, match="cannot be opened") as caught:
        join_study(nobody, "tiny")
    assert "secret" not in str(caught.value)


def test_a_worker_that_waits_keeps_no_connection(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg

    own, looks = database(url, "waiting"), 0
    stop = StopFlag()

    def connections() -> int:
        with psycopg.connect(url, autocommit=True) as asking:
            counted = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'waiting'"
            (found,) = asking.execute(counted).fetchone() or (0,)
            return int(found)

    def join_study_and_look(target: str, name: str | None) -> Joined:
        nonlocal looks
        looks += 1
        if looks == 12:
            assert connections() <= before + 1
            Ledger.open(open_storage(own, Path()), config_of()).set_attribute(
                "config", config_of().model_dump(mode="json")
            )
        return join_study(target, name)

    monkeypatch.setattr(workers, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(workers, "join_study", join_study_and_look)
    before = connections()
    name = config_of().name
    joined = join_when_begun(own, name, wait_seconds=60, stop=stop, on_wait=lambda _: None)
    assert joined.config == config_of() and looks == 12
    joined.leave()


def test_a_database_that_is_away_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(storage, "OPENING_PAUSES", (0.0,))
    said: list[str] = []
    away = f"postgresql://me@127.0.0.1:{postgres.free_port()}/x"
    with pytest.raises(StorageAwayError, match=r"cannot be opened.* It was waited for, 0\.2 s"):
        join_when_begun(away, "tiny", wait_seconds=0.2, stop=StopFlag(), on_wait=said.append)
    assert len(said) == 1
    with pytest.raises(InputError, match="Can't load plugin") as caught:
        join_when_begun("no://x", "tiny", wait_seconds=60, stop=StopFlag(), on_wait=said.append)
    assert not isinstance(caught.value, StorageAwayError)


def elsewhere(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """From now on this process seems to be on another host."""
    monkeypatch.setattr(liveness.socket, "gethostname", lambda: host)


def test_a_trial_of_a_host_that_went_silent_is_run_again_once(
    url: str, monkeypatch: pytest.MonkeyPatch, record_of: Records
) -> None:
    own = database(url, "heartbeats")

    def opened(host: str) -> Ledger:
        elsewhere(monkeypatch, host)
        storage = open_storage(own, Path(), heartbeat_seconds=1)
        storage.grace_period = 3  # type: ignore[attr-defined]
        return Ledger.open(storage, config_of())

    dead = opened("dead-host")
    trial, spec = dead.begin_new(spec_of(4))
    dead.close()  # no heartbeat, as of a process that was killed right away
    living = opened("living-host")
    other, _ = living.begin_new(spec_of(8))
    watching = opened("this-host")
    try:
        assert watching.recover_orphans() == 0, "silence has only just begun"
        wait_until = time.monotonic() + 20
        while watching.recover_orphans() == 0:
            assert time.monotonic() < wait_until
            time.sleep(0.2)
        time.sleep(4)
        assert watching.recover_orphans() == 0, "the other one goes on beating"
        assert watching.unfinished_specs() == [spec_of(8), spec_of(4, retry_of=trial.number)]

        # The host was only asleep, and settles what was given away: its result is dropped.
        begun = watching.begin(lambda: None)
        assert begun is not None and begun[1] == spec_of(4, retry_of=trial.number)
        settle(dead, trial, record_of(spec, trial.number, 1.5, "complete"))
        assert dead.records() == []
        settle(watching, begun[0], record_of(begun[1], begun[0].number, 1.5, "complete"))
        assert [r.number for r in dead.records()] == [begun[0].number]
    finally:
        living.close()
        watching.close()
    assert other.number == 1


def test_a_database_that_goes_away_interrupts_the_study(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    from rsauto.search import storage as storage_module

    own = database(url, "going")
    ledger = Ledger.open(open_storage(own, Path()), config_of())
    with psycopg.connect(url, autocommit=True) as connection:
        cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'going'"
        connection.execute(cut)
        ledger.begin_new(spec_of(4))  # the connection was lost, the next one works
        assert len(ledger.unfinished_specs()) == 1
        monkeypatch.setattr(storage_module, "PAUSES", (0.0, 0.0))
        monkeypatch.setattr(storage_module.patiently, "__defaults__", ((0.0, 0.0),))
        connection.execute(cut)
        connection.execute("ALTER DATABASE going ALLOW_CONNECTIONS false")
        connection.execute(cut)
        with pytest.raises(StudyInterrupted, match="does not answer"):
            ledger.records()
