"""Several processes at one study in MySQL; a MariaDB server is started for the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mariadb_server
import optuna
import pytest
from test_ledger import config_of, settle, spec_of
from test_workers_postgres import lose_workers
from tiny_study import write_study

from rsauto.errors import InputError
from rsauto.records import EvalPoint, TrialRecord
from rsauto.search.ledger import Ledger
from rsauto.search.storage import driver_url, open_storage


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with mariadb_server.server() as found:
        yield found


def test_a_worker_is_killed_and_nothing_is_lost(url: str, tmp_path: Path) -> None:
    study = write_study(tmp_path, trials=12)
    lose_workers(
        url + "killed", study, tmp_path / "out", num_trials=12, num_workers=2, num_killed=1
    )


def test_a_record_of_any_length_is_kept(
    url: str, tmp_path: Path, record_of: Callable[..., TrialRecord]
) -> None:
    """Also where Optuna has made the tables before, in which 64 KiB are the most."""
    url += "wide"
    optuna.create_study(storage=driver_url(url), study_name="before")
    ledger = Ledger.open(open_storage(url, tmp_path), config_of())
    trial, spec = ledger.begin_new(spec_of(4))
    curve = tuple(
        EvalPoint(step=step, train_loss=1.0 / step, eval_loss=1.0 / step, grad_norm=1.0)
        for step in range(1, 2000)
    )
    record = record_of(spec, trial.number, 1.5, "complete", curve=curve)
    assert len(str(record.to_json())) > 100_000
    settle(ledger, trial, record)
    (kept,) = Ledger.open(open_storage(url, tmp_path), config_of()).records()
    assert kept.curve == curve


def test_a_password_stays_out_of_the_error(url: str, tmp_path: Path) -> None:
    wrong = url.replace("root@", "nobody:s3cr3t@")
    with pytest.raises(InputError, match=r"cannot be opened: .*nobody") as caught:
        open_storage(wrong, tmp_path)
    assert "s3cr3t" not in str(caught.value)
