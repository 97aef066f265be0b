"""The ledger keeps every trial through reopening, giving up, and a kill at the worst moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial
from sqlalchemy import event

from rsauto.config import StudyConfig
from rsauto.errors import InputError
from rsauto.records import TrialRecord, TrialSpec
from rsauto.search import ledger as ledger_module
from rsauto.search.attempts import Attempt
from rsauto.search.ledger import DIVERGENCE, MEMORY, Ledger
from rsauto.search.liveness import born, this_worker, worker_lives
from rsauto.search.space import STORED_DISTRIBUTIONS, stored_params
from rsauto.search.storage import open_storage
from rsauto.study_file import validate

Records = Callable[..., TrialRecord]


def spec_of(rank: int = 8, **changes: Any) -> TrialSpec:
    settings = {"alpha": 16, "learning_rate": 1e-3, "target_modules": ("q_proj",), **changes}
    return TrialSpec(role="search", method="rslora", scaling_rule="rslora", rank=rank, **settings)


def config_of(**search: Any) -> StudyConfig:
    return validate({"name": "tiny", "search": search})


def journal_ledger(folder: Path) -> Ledger:
    """A ledger as a new process would open it."""
    return Ledger.open(open_storage(None, folder / "journal.log"), config_of())


def settle(ledger: Ledger, trial: Attempt, record: TrialRecord, value: float | None = 1.5) -> None:
    states = {"pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    ledger.settle(
        trial,
        record,
        value=value,
        state=states.get(record.outcome, TrialState.COMPLETE),
        constraints={MEMORY: -0.25, DIVERGENCE: 0.0},
    )


def test_records_survive_closing_and_opening_the_journal(
    tmp_path: Path, record_of: Records
) -> None:
    ledger = journal_ledger(tmp_path)
    expected = []
    for rank, outcome in ((4, "complete"), (8, "pruned"), (16, "failed"), (2, "infeasible")):
        trial, spec = ledger.begin_new(spec_of(rank))
        record = record_of(spec, trial.number, 1.5, outcome)
        settle(ledger, trial, record)
        expected.append((spec_of(rank), record))
    assert ledger.settled() == expected
    again = journal_ledger(tmp_path)
    assert again.settled() == expected
    assert [r.number for r in again.records()] == [0, 1, 2, 3]
    assert again.unfinished_specs() == []


def test_optuna_sees_values_states_constraints_and_settings(
    tmp_path: Path, record_of: Records
) -> None:
    ledger = journal_ledger(tmp_path)
    for outcome in ("complete", "pruned", "failed"):
        trial, spec = ledger.begin_new(spec_of(rank=12))
        settle(ledger, trial, record_of(spec, trial.number, 1.5, outcome))
    study = optuna.load_study(
        study_name="tiny", storage=open_storage(None, tmp_path / "journal.log")
    )
    trials = study.trials
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert trials[0].value == 1.5
    assert all(t.constraints == {MEMORY: -0.25, DIVERGENCE: 0.0} for t in trials)
    assert trials[0].params == {
        "method": "rslora", "rank": 12, "alpha": 16, "learning_rate": 1e-3, "lr_ratio": 1.0,
    }  # fmt: skip
    assert study.best_trial.number == 0


def test_a_running_trial_is_no_record_yet_but_known(tmp_path: Path) -> None:
    ledger = journal_ledger(tmp_path)
    ledger.begin_new(spec_of(4))
    assert ledger.records() == []
    assert ledger.unfinished_specs() == [spec_of(4)]


def test_nothing_is_begun_when_nothing_is_proposed(tmp_path: Path) -> None:
    assert journal_ledger(tmp_path).begin(lambda: None) is None


def test_an_abandoned_trial_is_run_again_before_anything_new(
    tmp_path: Path, record_of: Records
) -> None:
    ledger = journal_ledger(tmp_path)
    trial, _ = ledger.begin_new(spec_of(4))
    ledger.report(trial, 2.0, step=5)
    ledger.abandon(trial)
    assert ledger.records() == []
    begun = journal_ledger(tmp_path).begin(lambda: pytest.fail("asked for something new"))
    assert begun is not None
    retried, again = begun
    assert (retried.number, again) == (1, spec_of(4, retry_of=0))
    # A new trial, not the old one: nothing it had reported is left.
    settle(ledger, retried, record_of(again, 1))
    frozen = ledger.study.trials[1]
    assert frozen.intermediate_values == {}
    assert ledger.study.trials[0].state == TrialState.FAIL
    assert [r.number for r in ledger.records()] == [1]


def test_a_trial_left_by_this_process_is_taken_up_again_once(tmp_path: Path) -> None:
    ledger = journal_ledger(tmp_path)
    ledger.begin_new(spec_of(4))
    assert ledger.recover_orphans() == 1
    assert ledger.recover_orphans() == 0
    assert ledger.unfinished_specs() == [spec_of(4, retry_of=0)]


def test_a_kill_between_requeueing_and_failing_does_not_double_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = journal_ledger(tmp_path)
    ledger.begin_new(spec_of(4))

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ledger._storage, "set_trial_state_values", killed)
    with pytest.raises(KeyboardInterrupt):
        ledger.recover_orphans()
    again = journal_ledger(tmp_path)
    assert again.recover_orphans() == 1
    assert again.unfinished_specs() == [spec_of(4, retry_of=0)]


KILLED = """
import os, signal, sys
from pathlib import Path
from rsauto.records import TrialRecord, TrialSpec
from rsauto.search.ledger import Ledger
from rsauto.search.storage import open_storage
from rsauto.study_file import validate
from optuna.trial import TrialState

ledger = Ledger.open(open_storage(None, Path(sys.argv[1])), validate({"name": "tiny"}))
spec = dict(role="search", method="rslora", scaling_rule="rslora", alpha=16, learning_rate=1e-3)
ledger.begin_new(TrialSpec(rank=4, **spec))
trial, done = ledger.begin_new(TrialSpec(rank=8, **spec))
record = TrialRecord(number=trial.number, outcome="complete", gamma_r=1.0, rank=8,
    target_modules="all-linear", lr_ratio=1.0, optimizer="adamw", schedule="linear",
    batch_size=16, max_length=512, seed=0, eval_loss=0.5, **spec)
ledger._storage.set_trial_state_values = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
ledger.settle(trial, record, value=0.5, state=TrialState.COMPLETE, constraints={"memory": -0.5})
"""


def test_a_killed_process_loses_no_trial_and_doubles_none(tmp_path: Path) -> None:
    """One trial was running, the record of another was just written when the process was killed."""
    journal = tmp_path / "journal.log"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(journal)])
    # Not waited for: a killed child stays a zombie until its parent asks, as in many containers.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
    try:
        ledger = journal_ledger(tmp_path)
        states = [trial.state for trial in ledger.study.trials]
        assert states == [TrialState.RUNNING, TrialState.RUNNING]
        assert ledger.recover_orphans() == 1
    finally:
        assert child.wait() == -signal.SIGKILL

    (record,) = ledger.records()
    assert (record.number, record.rank, record.eval_loss) == (1, 8, 0.5)
    finished = ledger.study.trials[1]
    assert (finished.state, finished.value) == (TrialState.COMPLETE, 0.5)
    assert finished.constraints == {"memory": -0.5}

    begun = ledger.begin(lambda: pytest.fail("asked for something new"))
    assert begun is not None
    trial, spec = begun
    assert (trial.number, spec.rank, spec.retry_of) == (2, 4, 0)
    assert len(ledger.study.trials) == 3
    assert ledger.study.trials[0].state == TrialState.FAIL


def test_trials_of_a_living_process_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = psutil.Process(os.getppid())
    worker = {**this_worker(), "pid": other.pid, "born": born(other.pid)}
    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "this_worker", lambda: worker)
        journal_ledger(tmp_path).begin_new(spec_of(4))
    ledger = journal_ledger(tmp_path)
    assert ledger.recover_orphans() == 0
    assert ledger.study.trials[0].state == TrialState.RUNNING


def test_a_worker_lives_while_its_process_does() -> None:
    parent = psutil.Process(os.getppid())
    living = {**this_worker(), "pid": parent.pid, "born": born(parent.pid)}
    assert worker_lives(living)
    assert not worker_lives({**living, "born": "another boot:1"}), "the pid was reused"
    assert not worker_lives({**living, "pid": 2**22 + 1}), "no such process"
    assert not worker_lives(this_worker()), "an own trial is left from an earlier call"
    assert not worker_lives(None)
    assert worker_lives({"host": "another-host", "pid": 1, "born": 0.0}), "cannot be known"


def test_a_worker_lives_on_when_the_system_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("only Linux counts from its boot")
    parent, own = os.getppid(), this_worker()
    living = {**own, "pid": parent, "born": born(parent)}
    real = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: real(process) + 3600)
    assert worker_lives(living)
    assert this_worker() == own


@pytest.mark.parametrize(
    ("search", "direction"),
    [({}, "MINIMIZE"), ({"objective": "exact_match"}, "MAXIMIZE"),
     ({"objective": "exact_match", "direction": "minimize"}, "MINIMIZE")],
)  # fmt: skip
def test_the_study_has_the_direction_of_its_objective(
    search: dict[str, Any], direction: str
) -> None:
    ledger = Ledger.open(InMemoryStorage(), config_of(**search))
    assert ledger.study.direction.name == direction


def storage_of(kind: str, folder: Path) -> Any:
    url = f"sqlite:///{folder}/study.db" if kind == "sqlite" else None
    return open_storage(url, folder / "journal.log")


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_what_is_read_bit_by_bit_is_what_is_read_at_once(
    kind: str, tmp_path: Path, record_of: Records
) -> None:
    """Whatever two processes do, a third that looks on all the time knows what a new one reads."""
    one, other, watching = (Ledger.open(storage_of(kind, tmp_path), config_of()) for _ in range(3))
    generator = random.Random(0)
    begun: list[tuple[Ledger, Attempt, TrialSpec]] = []

    def begin(ledger: Ledger, rival: Ledger | None, rank: int) -> None:
        proposals = [spec_of(rank)]

        def propose() -> TrialSpec | None:
            if rival is not None and proposals:
                begin(rival, None, rank)
            return proposals.pop() if proposals else None

        found = ledger.begin(propose)
        begun.extend([] if found is None else [(ledger, *found)])

    for step in range(24):
        ledger = generator.choice([one, other])
        what = generator.choice(["begin", "begin", "settle", "abandon", "recover"])
        if what == "begin":
            begin(ledger, generator.choice([None, one, other]), 1 + step % 7)
        elif what == "recover":
            ledger.recover_orphans()
        elif begun:
            whose, trial, spec = begun.pop(generator.randrange(len(begun)))
            if what == "abandon":
                whose.abandon(trial)
            else:
                settle(whose, trial, record_of(spec, trial.number))
        watching.attempts()
        if step % 6 == 5:
            fresh = Ledger.open(storage_of(kind, tmp_path), config_of())
            assert watching.history() == fresh.history()
            assert watching.settled() == fresh.settled()
            for state in TrialState:
                assert watching.seen.in_state(state) == fresh.seen.in_state(state)
    attempts = watching.attempts()
    assert any(trial.spec.retry_of is not None for trial in attempts.history.trials)
    assert any(trial.user_attrs.get("withdrawn") for trial in one.study.trials)


def test_a_trial_costs_the_database_the_same_however_many_there_are(
    tmp_path: Path, record_of: Records
) -> None:
    """Counted on a real one: statements, and trials that are read."""
    ledger = Ledger.open(storage_of("sqlite", tmp_path), config_of())
    engine, real = ledger._storage._backend.engine, Attempt.of  # type: ignore[attr-defined]
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *said: statements.append(said[2]))
    costs, num_read = [], 0

    def counting(trial: Any) -> Attempt | None:
        nonlocal num_read
        num_read += 1
        return real(trial)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attempt, "of", counting)
        for number in range(12):
            statements.clear()
            num_read = 0
            begun = ledger.begin(lambda: spec_of(1 + number), limit=40)  # noqa: B023
            assert begun is not None
            settle(ledger, begun[0], record_of(begun[1], begun[0].number))
            costs.append((len(statements), num_read))
    assert costs[-1] == costs[2], "it does not grow"
    num_statements, num_read = costs[-1]
    assert num_read == 2, "the one before as it ended, and this one as it was begun"
    assert num_statements <= 30
    reads = [said for said in statements if "FROM trials" in said and " IN " in said]
    assert len(reads) <= 3


@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.WAITING])
def test_a_trial_is_added_to_a_database_as_optuna_adds_it(
    state: TrialState, tmp_path: Path
) -> None:
    ledger = Ledger.open(storage_of("sqlite", tmp_path), config_of())
    template = create_trial(
        state=state, params=stored_params(spec_of(12)), user_attrs={"spec": {}, "deaths": 0},
        distributions=dict(STORED_DISTRIBUTIONS),
    )  # fmt: skip
    ledger.study.add_trial(template)
    ledger._stored.add(template)
    optunas, own = ledger.study.trials
    own.number, own._trial_id = optunas.number, optunas._trial_id
    assert own == optunas
    assert [trial.number for trial in ledger._stored.changed()] == [0, 1]


def test_what_this_process_is_at_is_left_alone_while_it_runs(tmp_path: Path) -> None:
    ledger = journal_ledger(tmp_path)
    ledger.begin_new(spec_of(2))
    left = journal_ledger(tmp_path)  # by an earlier call in this process
    left.begin_new(spec_of(4))
    assert ledger.recover_orphans(spares_own=True) == 1
    assert ledger.unfinished_specs() == [spec_of(2), spec_of(4, retry_of=1)]
    again = ledger.begin(lambda: None)
    assert again is not None
    assert ledger.recover_orphans(spares_own=True) == 0, "one that was taken up is its own, too"
    assert ledger.recover_orphans() == 2


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no/such/folder/x.db", "unknowndb://x/y"])
def test_a_storage_that_cannot_be_opened_is_told_with_its_url(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="study storage cannot be opened") as caught:
        open_storage(url, tmp_path / "journal.log")
    assert f"--storage {url}" in str(caught.value)


def test_a_url_that_is_none_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rsauto.search.storage.time.sleep", lambda _: pytest.fail("tried again"))
    with pytest.raises(InputError, match="study storage cannot be opened"):
        open_storage("unknowndb://x/y", tmp_path / "journal.log")


def test_the_same_ledger_works_on_a_database(tmp_path: Path, record_of: Records) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    for number in range(2):
        ledger = Ledger.open(open_storage(url, tmp_path / "unused"), config_of())
        trial, spec = ledger.begin_new(spec_of(4 + number))
        settle(ledger, trial, record_of(spec, trial.number))
    assert [r.rank for r in ledger.records()] == [4, 5]
    assert not (tmp_path / "unused").exists()


def test_what_is_begun_is_what_was_asked_for_whoever_waits() -> None:
    ledger = Ledger.open(InMemoryStorage(), config_of())
    waiting = [ledger.begin_new(spec_of(rank)) for rank in (4, 8)]
    for trial, _ in waiting:
        ledger.abandon(trial)
    trial, spec = ledger.begin_new(spec_of(16))
    assert trial.begun.spec == spec == spec_of(16)
    assert [s.rank for s in ledger.unfinished_specs()] == [4, 8, 16]
    again = [ledger.begin(lambda: None) for _ in range(3)]
    assert [None if found is None else found[1].rank for found in again] == [4, 8, None]


def test_a_waiting_trial_that_another_process_takes_first_is_let_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger = Ledger.open(InMemoryStorage(), config_of())
    ledger.abandon(ledger.begin_new(spec_of(4))[0])
    real = ledger._storage.set_trial_state_values

    def too_late(trial_id: int, state: TrialState, values: Any = None) -> bool:
        if state == TrialState.RUNNING:
            assert real(trial_id, state), "by the other process"
        return real(trial_id, state, values)

    monkeypatch.setattr(ledger._storage, "set_trial_state_values", too_late)
    found = ledger.begin(lambda: spec_of(32))
    assert found is not None and found[1].rank == 32
    assert [trial.spec.rank for trial in ledger.history().trials] == [4, 32]
    assert len(ledger.study.trials) == 3, "no empty one was made"


def test_a_waiting_trial_is_taken_once_where_no_rows_are_locked(tmp_path: Path) -> None:
    """With SQLite another process may take it in the middle of this one's doing so."""
    one, other = (Ledger.open(storage_of("sqlite", tmp_path), config_of()) for _ in range(2))
    one.abandon(one.begin_new(spec_of(4))[0])
    found: list[Any] = []

    def other_is_quicker(*said: Any) -> None:
        if said[2].startswith("UPDATE trials") and not found:
            found.append("a place")
            found[0] = other.begin(lambda: None)

    engine = one._storage._backend.engine  # type: ignore[attr-defined]
    event.listen(engine, "before_cursor_execute", other_is_quicker)
    found.append(one.begin(lambda: None))
    assert found[1] is None and found[0] is not None
    assert found[0][1] == spec_of(4, retry_of=0)
    trial = other.study.trials[1]
    assert trial.state == TrialState.RUNNING and trial.datetime_start is not None


def test_half_a_line_is_cut_off_while_others_have_the_journal_open(tmp_path: Path) -> None:
    """The disk of one was full in the middle of a line; the next to write is another."""
    one, other = journal_ledger(tmp_path), journal_ledger(tmp_path)
    one.begin_new(spec_of(4))
    with open(tmp_path / "journal.log", "ab") as file:
        file.write(b'{"op_code":4,"worker_id":"full')
    other.begin_new(spec_of(8))
    for ledger in (one, other, journal_ledger(tmp_path)):
        assert [spec.rank for spec in ledger.unfinished_specs()] == [4, 8]
