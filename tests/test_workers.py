"""Several processes at one study: who gives way to whom, what is recovered, who is started."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from processes import Child, command_line
from test_ledger import config_of, journal_ledger, settle, spec_of
from test_workers_postgres import check_books, wait_for
from tiny_study import records, write_study
from typer.testing import CliRunner

from rsauto import launch
from rsauto.cli import app
from rsauto.errors import InputError, NotBegunError, StudyInterrupted
from rsauto.records import TrialRecord, TrialSpec
from rsauto.search import work as work_module
from rsauto.search import workers
from rsauto.search.events import Event, Stage, StudyEnded
from rsauto.search.folder import StudyFolder
from rsauto.search.identity import claim
from rsauto.search.ledger import Ledger
from rsauto.search.storage import JournalUsers, driver_url, open_storage
from rsauto.search.work import Work
from rsauto.search.workers import Joined, join_study, join_when_begun, worker_events
from rsauto.stop import StopFlag
from rsauto.study_file import validate

Records = Callable[..., TrialRecord]


def two(folder: Path) -> tuple[Ledger, Ledger]:
    """One study as two processes have it open."""
    return journal_ledger(folder), journal_ledger(folder)


def test_of_two_that_begin_the_same_point_the_later_gives_way(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    proposals = [spec_of(16), spec_of(8)]

    def propose() -> TrialSpec:
        if len(proposals) == 2:  # while this one thinks, the other begins the same
            assert other.begin(lambda: spec_of(8)) is not None
        return proposals.pop()

    begun = one.begin(propose)
    assert begun is not None and begun[1] == spec_of(16)
    assert begun[0].number == 2, "1 was taken back"
    assert other.study.trials[1].state == TrialState.FAIL
    assert [trial.spec.rank for trial in other.history().trials] == [8, 16]
    assert other.recover_orphans() <= 2, "what was taken back is not run again"
    assert sorted(spec.rank for spec in other.unfinished_specs()) == [8, 16]


def test_a_point_that_was_known_may_be_repeated(tmp_path: Path, record_of: Records) -> None:
    ledger = journal_ledger(tmp_path)
    for _ in range(2):  # as where the opening has the very settings of the tuned default
        begun = ledger.begin(lambda: spec_of(8))
        assert begun is not None
        settle(ledger, begun[0], record_of(begun[1], begun[0].number, 1.5, "complete"))
    assert len(ledger.records()) == 2


def test_no_more_are_begun_than_the_study_is_to_have(tmp_path: Path, record_of: Records) -> None:
    one, other = two(tmp_path)
    refused, spec = one.begin_new(spec_of(2))
    settle(one, refused, record_of(spec, refused.number, 1.5, "infeasible"))
    assert one.begin(lambda: spec_of(4), limit=2) is not None

    def propose() -> TrialSpec | None:
        if one.history().num_unsettled == 2:
            return None
        assert other.begin(lambda: spec_of(8), limit=2) is not None
        return spec_of(16)

    assert one.begin(propose, limit=2) is None
    assert [trial.spec.rank for trial in one.history().trials] == [2, 4, 8]
    assert one.begin(lambda: spec_of(32), limit=3) is not None, "the study was made longer"


def test_an_orphan_put_back_by_two_is_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two(tmp_path)
    trial, _ = one.begin_new(spec_of(4))
    real = Ledger._put_back

    def slow(ledger: Ledger, number: int, spec: TrialSpec, deaths: int) -> None:
        """Between failing the orphan and putting it back, another process finds it lost."""
        monkeypatch.setattr(Ledger, "_put_back", real)
        assert other.recover_orphans(is_alone=True) == 1
        ledger._put_back(number, spec, deaths)

    monkeypatch.setattr(Ledger, "_put_back", slow)
    one.recover_orphans()
    assert one.unfinished_specs() == [spec_of(4, retry_of=trial.number)]
    begun = [ledger.begin(lambda: None) for ledger in (one, other, one)]
    assert sum(found is not None for found in begun) == 1
    assert len(one.history().trials) == 1
    assert all(t.state != TrialState.WAITING for t in one.study.trials)


def test_a_trial_of_which_three_processes_died_is_not_run_again(tmp_path: Path) -> None:
    ledger = journal_ledger(tmp_path)
    assert ledger.begin(lambda: spec_of(4)) is not None
    for put_back in (1, 1, 0):
        assert ledger.recover_orphans() == put_back
        # Given up on request in between, which counts for nothing.
        if put_back:
            begun = ledger.begin(lambda: None)
            assert begun is not None
            ledger.abandon(begun[0])
            assert ledger.begin(lambda: None) is not None
    (record,) = ledger.records()
    assert (record.number, record.outcome, record.rank) == (4, "failed", 4)
    assert record.error == "its process died 3 times"
    assert record.worker is not None and record.worker.endswith(f":{os.getpid()}")
    assert ledger.study.trials[4].state == TrialState.FAIL
    assert ledger.unfinished_specs() == []
    assert ledger.recover_orphans(is_alone=True) == 0, "it is settled, not lost"


def test_what_was_put_back_twice_is_taken_back_although_the_storage_did_not_answer_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = journal_ledger(tmp_path)
    trial, spec = ledger.begin_new(spec_of(4))
    ledger.abandon(trial)
    real, answers = ledger._storage.set_trial_state_values, iter([False, True])

    def write(*arguments: Any) -> bool:
        if not next(answers, True):
            raise StorageInternalError("no answer")
        return real(*arguments)

    monkeypatch.setattr(ledger._storage, "set_trial_state_values", write)
    ledger._put_back(trial.number, spec)
    assert ledger.study.trials[2].state == TrialState.FAIL
    assert ledger.unfinished_specs() == [spec_of(4, retry_of=0)]


def test_an_attempt_is_known_by_its_token_when_it_has_been_retried(tmp_path: Path) -> None:
    ledger = journal_ledger(tmp_path)
    trial, _ = ledger.begin_new(spec_of(4))
    ledger.abandon(trial)
    assert trial.token is not None
    found = ledger.attempts().with_token(trial.token)
    assert found is not None and found.number == 0


def test_a_trial_given_up_but_not_put_back_is_found(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    trial, _ = one.begin_new(spec_of(4))
    one.study.tell(trial.number, state=TrialState.FAIL)  # and killed before the next write
    assert other.recover_orphans() == 0, "it may be about to be put back"
    assert other.recover_orphans(is_alone=True) == 1
    assert other.unfinished_specs() == [spec_of(4, retry_of=0)]


def test_what_was_to_be_taken_back_is_not_run_again(tmp_path: Path) -> None:
    """Killed between beginning a trial too much and taking it back."""
    ledger = journal_ledger(tmp_path)
    assert ledger.begin(lambda: spec_of(4), limit=1) is not None
    ledger.begin_new(spec_of(8), unseen=1)
    assert ledger.recover_orphans(is_alone=True, limit=1) == 1
    assert ledger.unfinished_specs() == [spec_of(4, retry_of=0)]


def race(journal: str, results: Any, record_of: Records) -> None:
    """One of several processes that begin and settle trials as fast as they can."""
    ledger = Ledger.open(open_storage(None, Path(journal)), config_of())
    ran = []

    def propose() -> TrialSpec | None:
        begun = {trial.spec.rank for trial in ledger.history().trials}
        if len(begun) >= 30:
            return None
        return next((spec_of(rank) for rank in range(1, 41) if rank not in begun), None)

    while (begun := ledger.begin(propose, limit=30)) is not None:
        trial, spec = begun
        settle(ledger, trial, record_of(spec, trial.number))
        ran.append(spec.rank)
    results.put(ran)


def test_processes_that_race_run_every_point_once_and_stop_in_time(
    tmp_path: Path, record_of: Records
) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    journal = str(tmp_path / "journal.log")
    journal_ledger(tmp_path)
    racers = [context.Process(target=race, args=(journal, results, record_of)) for _ in range(4)]
    for racer in racers:
        racer.start()
    ran = [results.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join()
    assert sorted(chain.from_iterable(ran)) == list(range(1, 31))
    ledger = journal_ledger(tmp_path)
    assert len(ledger.records()) == 30
    withdrawn = [t for t in ledger.study.trials if t.user_attrs.get("withdrawn")]
    assert len(ledger.study.trials) == 30 + len(withdrawn)


def worker_at(ledger: Ledger, proposals: list[TrialSpec]) -> Work:
    """A worker's decisions, with proposals made up."""
    config = config_of(trials=8)
    setup = SimpleNamespace(config=config, space=None)
    work = Work(SimpleNamespace(ledger=ledger, setup=setup), None, is_shared=True)  # type: ignore[arg-type]
    work._propose = lambda: proposals.pop(0) if proposals else None  # type: ignore[method-assign]
    return work


def test_what_is_begun_after_the_study_has_ended_is_given_back(
    tmp_path: Path, record_of: Records
) -> None:
    host, worker = two(tmp_path)
    work = worker_at(worker, [spec_of(4), spec_of(8)])
    first = work._begin(work._propose)
    assert first is not None
    real = worker.begin

    def late(*arguments: Any, **options: Any) -> Any:
        host.set_attribute("ended", "the limit of 10 trained tokens was reached")
        return real(*arguments, **options)

    worker.begin = late  # type: ignore[method-assign]
    assert work._begin(work._propose) is None
    assert host.unfinished_specs() == [spec_of(4)], "the second was taken back"
    assert host.recover_orphans(is_alone=True) == 1
    assert work._begin(work._propose) is None
    (left,) = host.unfinished_specs()
    assert left.rank == 4, "for whoever continues the study"
    assert host.waiting_spec() == left


def test_a_worker_looks_for_orphans_in_the_middle_of_its_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, dead = two(tmp_path)
    monkeypatch.setattr(work_module, "RECOVERY_SECONDS", 0.0)
    work = worker_at(ledger, [spec_of(4)])
    assert work._begin(work._propose) is not None
    dead.begin_new(spec_of(8))

    def steps() -> Generator[Event, None, int]:
        yield Stage("a step")
        return 1

    list(work._with_news(steps()))
    assert ledger.unfinished_specs() == [spec_of(4), spec_of(8, retry_of=1)]


def test_who_else_has_a_journal_open(tmp_path: Path) -> None:
    first, second, third = (JournalUsers(tmp_path / "journal.log") for _ in range(3))
    assert first.join()
    assert not second.join()
    first.leave()
    assert not third.join(), "the second is still there"
    second.leave()
    third.leave()
    assert JournalUsers(tmp_path / "journal.log").join()


def test_adapters_of_running_trials_are_left_alone(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    for name in ("0001", "0002", ".0003.77.partial", ".0004.78.partial", "0005", ".0001.7.partial"):
        (folder.adapters / name).mkdir(parents=True)
    folder.remove_adapters(folder.adapter_entries(), kept=[1], running=[3, 5])
    left = sorted(entry.name for entry in folder.adapters.iterdir())
    assert left == [".0003.77.partial", "0001", "0005"]


def test_a_folder_is_known_by_more_than_its_path(tmp_path: Path) -> None:
    one, other = StudyFolder(tmp_path / "one"), StudyFolder(tmp_path / "other")
    for folder in (one, other):
        folder.path.mkdir()
    assert one.is_the_one(one.identity())
    assert not other.is_the_one(one.identity())
    assert one.identity() != other.identity()
    assert not StudyFolder(tmp_path / "nowhere").is_the_one(one.identity())


def test_a_url_names_the_driver_that_is_there() -> None:
    pytest.importorskip("psycopg")
    assert driver_url("postgresql://me@db/x") == "postgresql+psycopg://me@db/x"
    assert driver_url("postgres://me@db/x") == "postgresql+psycopg://me@db/x"
    pytest.importorskip("pymysql")
    assert driver_url("mysql://me@db/x") == "mysql+pymysql://me@db/x"
    assert driver_url("mariadb://me@db/x") == "mysql+pymysql://me@db/x"
    assert driver_url("mariadb+mysqldb://me@db/x") == "mysql+mysqldb://me@db/x"
    for url in ("postgresql+psycopg2://me@db/x", "sqlite:///a.db", "mysql+pymysql://me@db/x"):
        assert driver_url(url) == url


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsauto.search.storage.find_spec", lambda name: None)
    for url, extra in (("postgresql://me:secret@db/x", "postgres"), ("mysql://me@db/x", "mysql")):
        with pytest.raises(InputError, match=rf"pip install 'rsauto\[{extra}\]'"):
            driver_url(url)


@pytest.mark.parametrize(
    ("workers", "options", "message"),
    [
        (0, {}, "must be at least 1"),
        (3, {}, "this machine has 2 GPUs"),
        (2, {"launcher": "dask"}, "must be local or ray"),
        (2, {"launcher": "ray"}, "a storage that every node can reach"),
        (2, {"launcher": "ray", "storage": "sqlite:///x.db"}, "sqlite:///x.db is a file"),
    ],
)
def test_a_crew_that_cannot_be_is_refused(
    workers: int, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(launch, "find_spec", lambda name: True)
    with pytest.raises(InputError, match=message):
        launch.crew_of(workers, **{"launcher": "local", "storage": None, **options})


def test_a_missing_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'rsauto\[ray\]'"):
        launch.crew_of(2, "ray", "postgresql://db/x")


def test_each_worker_has_a_gpu_or_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "cores_each", lambda n: 12 // n)
    on_gpus = launch.LocalCrew(3, ["4", "5", "7"])
    assert [on_gpus._environment(k)["CUDA_VISIBLE_DEVICES"] for k in (2, 3)] == ["5", "7"]
    on_cores = launch.LocalCrew(3)
    assert on_cores._environment(2)["OMP_NUM_THREADS"] == "4"


def test_ray_on_one_machine_gives_no_worker_the_card_of_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray", reason="ray is missing: pip install 'rsauto[ray]'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match="Give --workers 2 at most"):
        launch.RayCrew(3, ["4", "5"])._connect(ray)
    launch.RayCrew(2, ["4", "5"])._connect(ray)
    try:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"
        assert ray.cluster_resources()["GPU"] == 1
        task = ray.remote(num_gpus=1)(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
        assert ray.get(task.remote(), timeout=60) == "5"
    finally:
        ray.shutdown()


def test_a_worker_stops_when_its_parent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopFlag()
    monkeypatch.setenv(launch.WITH_PARENT, str(os.getppid()))
    launch.stop_with_parent(stop)
    time.sleep(0.2)
    assert not stop.requested
    monkeypatch.setenv(launch.WITH_PARENT, "1" if os.getppid() != 1 else "2")
    launch.stop_with_parent(stop)
    for _ in range(100):
        if stop.requested:
            return
        time.sleep(0.05)
    raise AssertionError("it did not notice")


def test_no_study_folder_no_worker(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no study folder with a journal"):
        join_study(str(tmp_path))


def test_a_study_of_another_version_is_told_so(tmp_path: Path) -> None:
    ledger = journal_ledger(tmp_path)
    stored = config_of().model_dump(mode="json")
    stored["search"]["of_tomorrow"] = 1
    ledger.set_attribute("config", stored)
    for refused in (
        lambda: join_study(str(tmp_path)),
        lambda: claim(ledger, config_of(), cast(Any, None), StudyFolder(tmp_path)),
    ):
        with pytest.raises(InputError, match=r"another version of rsauto.*search.of_tomorrow"):
            refused()


def test_a_study_that_its_host_only_just_begins_is_not_joined_yet(tmp_path: Path) -> None:
    open_storage(None, tmp_path / "journal.log")
    for _ in range(2):
        with pytest.raises(InputError, match=r"only just being begun by its host"):
            join_study(str(tmp_path))
        journal_ledger(tmp_path)


def test_a_worker_may_wait_for_the_study_to_be_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "LOOK_SECONDS", 0.01)
    said: list[str] = []
    journal = tmp_path / "journal.log"

    def waiting(seconds: float, stop: StopFlag) -> Joined:
        return join_when_begun(
            str(tmp_path), wait_seconds=seconds, stop=stop, on_wait=lambda what: begin(what)
        )

    def begin(what: str) -> None:
        """The host comes once the worker has seen that there is nothing, and has it to itself."""
        said.append(what)
        host = JournalUsers(journal)
        assert host.join(), "who waits is not at work"
        host.leave()
        if len(said) == 3:
            journal_ledger(tmp_path).set_attribute("config", config_of().model_dump(mode="json"))

    with pytest.raises(NotBegunError, match="is no study folder"):
        waiting(0.0, StopFlag())
    with pytest.raises(NotBegunError, match=r"is no study folder.* It was waited for, 0\.1 s\."):
        waiting(0.1, StopFlag())
    with pytest.raises(StudyInterrupted, match="before the study was begun"):
        waiting(60.0, StopFlag(requested=True))
    open_storage(None, journal)
    joined = waiting(60.0, StopFlag())
    assert joined.config == config_of()
    assert not JournalUsers(journal).join(), "it is at work now"
    joined.leave()
    assert len(said) == 3, "told once for each"
    assert "is no study folder" in said[0] and "only just being begun" in said[2]


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf"])
def test_a_wait_that_is_no_time_is_refused(seconds: str) -> None:
    done = CliRunner().invoke(app, ["worker", "nowhere", "--wait", seconds])
    assert done.exit_code == 2
    assert f"--wait {seconds}: must be a number of seconds, 0 or more" in done.output


def test_another_study_is_not_waited_for_in_a_folder(tmp_path: Path) -> None:
    journal_ledger(tmp_path).set_attribute("config", config_of().model_dump(mode="json"))
    with pytest.raises(InputError, match=r"--study other: .* no such study") as caught:
        join_study(str(tmp_path), "other")
    assert not isinstance(caught.value, NotBegunError)


def test_a_finished_study_needs_no_worker_and_no_model(tmp_path: Path) -> None:
    ledger = journal_ledger(tmp_path)
    ledger.set_attribute("config", config_of().model_dump(mode="json"))
    ledger.set_attribute("ended", "every trial is done")
    (event,) = worker_events(join_study(str(tmp_path)))
    assert isinstance(event, StudyEnded)
    assert event.reason.startswith("the study is finished (every trial is done)")


@pytest.mark.parametrize("budget", ["auto", "24GiB"])
def test_a_worker_whose_gpu_is_smaller_than_the_budget_is_refused(
    budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = validate({"name": "tiny", "memory_budget": budget})
    ledger = journal_ledger(tmp_path)
    ledger.set_attribute("memory_budget_bytes", 24 * 2**30)
    ledger.set_attribute("config", config.model_dump(mode="json"))
    monkeypatch.setattr(workers, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(workers, "device_bytes", lambda device: 16 * 2**30)
    with pytest.raises(InputError, match=r"memory_budget: .*24.* GiB, and the device here 16"):
        list(worker_events(join_study(str(tmp_path))))


def workers_of(host: Child) -> list[int]:
    """Process ids of the workers that a study has started."""
    import psutil

    try:
        return [p.pid for p in psutil.Process(host.pid).children() if "worker" in p.cmdline()]
    except psutil.Error:
        return []


def test_a_journal_with_two_workers_one_killed_then_asked_to_stop_then_continued(
    tmp_path: Path,
) -> None:
    study, out = write_study(tmp_path, trials=8), tmp_path / "out"
    host = command_line("study", study, "--out", out, "--workers", "2", step_seconds=1.0)
    try:
        wait_for(lambda: bool(workers_of(host)), host)
        (worker,) = workers_of(host)

        def worker_has_begun() -> bool:
            ledger = Ledger.join(open_storage(None, out / "journal.log"), "tiny")
            return any(t.user_attrs.get("worker", {}).get("pid") == worker
                       for t in ledger.study.trials)  # fmt: skip

        wait_for(worker_has_begun, host)
        os.kill(worker, signal.SIGKILL)
        output, _ = host.communicate(timeout=200)
    finally:
        host.kill()
        host.communicate()
    assert host.returncode == 0, output
    assert "worker 2 was killed by signal 9" in output
    ledger = Ledger.join(open_storage(None, out / "journal.log"), "tiny")
    check_books(ledger.study.trials, records(out), 8)

    host = command_line(
        "study", study, "--out", out, "--workers", "2", "--trials", "12", step_seconds=0.5
    )
    try:
        wait_for(lambda: bool(workers_of(host)), host)
        (worker,) = workers_of(host)
        host.send_signal(signal.SIGTERM)
        output, _ = host.communicate(timeout=100)
    finally:
        host.kill()
        host.communicate()
    assert host.returncode == 4, output
    assert "Traceback" not in output + (out / "workers" / "2.log").read_text()
    assert not Path(f"/proc/{worker}").exists(), "the worker ends with its host"
