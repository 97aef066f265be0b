"""Where a study is stored: Optuna's journal file or a database, and what can go wrong with them."""

from __future__ import annotations

import fcntl
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from sqlalchemy import text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from rsauto.errors import InputError, StorageAwayError, StudyInterrupted
from rsauto.search.journal import Journal
from rsauto.storage_url import shown, without_secrets

T = TypeVar("T")

HEARTBEAT_SECONDS = 30
"""Between two signs of life of a running trial, in a database."""

SILENT_BEATS = 4
"""Heartbeats a trial of another host may miss before it is run again elsewhere."""

PATIENCE_SECONDS = 90.0
"""For a database that does not answer: time to restart it, or for another to take its place. Less
than the silence after which others take this process for dead."""

PAUSES = (0.2, 0.5, 1.0, 2.0, *[4.0] * 22)
"""Seconds before each new attempt; a first Ctrl-C is heard no sooner."""

CONNECT_SECONDS = 10
"""For a PostgreSQL server whose machine does not answer at all."""

OPENING_PAUSES = (0.2, 0.5, 1.0)
"""The same before a study is begun, when the address may as well be wrong."""

DRIVERS = {
    "postgresql": ("psycopg", "psycopg2"),
    "mysql": ("pymysql", "MySQLdb", "mysql.connector"),
}
"""Modules that speak to a database, by SQLAlchemy's name of it; EXTRAS bring the first one."""

EXTRAS = {"postgresql": "postgres", "mysql": "mysql"}
"""What is installed for them: rsauto[postgres]."""

SCHEMES = {"postgresql": "postgresql", "postgres": "postgresql",
           "mysql": "mysql", "mariadb": "mysql"}  # fmt: skip
"""Of URLs without a driver. Optuna knows MariaDB by the name of MySQL alone."""

_MARIADB = "mariadb+"

_TRANSIENT = (StorageInternalError, SQLAlchemyError)


def open_storage(
    url: str | None, journal: Path, *, heartbeat_seconds: int = HEARTBEAT_SECONDS
) -> BaseStorage:
    """Optuna storage at ``url``, or a journal file.

    Raises StorageAwayError when a database does not answer, InputError for what will never do.
    """
    if url is None:
        return _journal_storage(journal)
    try:
        address = driver_url(url)
        return _again(lambda: _database(address, heartbeat_seconds), OPENING_PAUSES)
    except InputError:
        raise
    except (
        SQLAlchemyError, StorageInternalError, ImportError, ValueError, TypeError, OSError,
        RuntimeError,  # of pymysql, where a password needs the package cryptography
    ) as error:  # fmt: skip
        reason = without_secrets(str(error.__cause__ or error), url).strip().split("\n")[0]
        is_away = isinstance(error, (*_TRANSIENT, OSError)) and not isinstance(error, ArgumentError)
        raise (StorageAwayError if is_away else InputError)(
            f"--storage {shown(url)}: the study storage cannot be opened: "
            f"{reason}. Give a database URL such as postgresql://user@host/name or "
            "sqlite:///file.db."
        ) from None


def close_storage(storage: BaseStorage) -> None:
    """Ends the connections to a database that is no longer asked, which else last a while."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def _database(url: str, heartbeat_seconds: int) -> BaseStorage:
    waits: dict[str, int] = {}
    if url.startswith("sqlite"):
        # It has one writer at a time: the others wait their turn instead of giving up.
        waits = {"timeout": 60}
    elif url.startswith("postgresql") and "connect_timeout" not in url:
        waits = {"connect_timeout": CONNECT_SECONDS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = RDBStorage(
            url,
            engine_kwargs={"connect_args": waits},
            heartbeat_interval=heartbeat_seconds,
            grace_period=SILENT_BEATS * heartbeat_seconds,
        )
    if storage.engine.dialect.name in ("mysql", "mariadb"):
        _widen(storage)
    return storage


def _widen(storage: RDBStorage) -> None:
    """Gives MySQL room for whole records: Optuna's TEXT columns end there at 64 KiB.

    A record with a long curve is larger, and elsewhere TEXT has no such end.
    """
    narrow = text(
        "SELECT table_name FROM information_schema.columns WHERE table_schema = DATABASE() AND "
        "table_name IN ('study_user_attributes', 'trial_user_attributes') AND "
        "column_name = 'value_json' AND data_type = 'text'"
    )
    with storage.engine.begin() as connection:
        for table in connection.execute(narrow).scalars().all():
            connection.execute(text(f"ALTER TABLE {table} MODIFY value_json LONGTEXT"))


def driver_url(url: str) -> str:
    """The URL with the database driver that is installed. Raises InputError where none is.

    SQLAlchemy takes postgresql:// to mean psycopg2, and mysql:// mysqlclient.
    """
    if url.startswith(_MARIADB):
        return f"mysql+{url.removeprefix(_MARIADB)}"
    scheme, separator, rest = url.partition("://")
    kind = SCHEMES.get(scheme)
    if not separator or kind is None:
        return url
    for module in DRIVERS[kind]:
        if _is_installed(module):
            return f"{kind}+{module.lower().replace('.', '')}://{rest}"
    raise InputError(
        f"--storage {shown(url)}: {scheme}:// needs a driver. "
        f"Run pip install 'rsauto[{EXTRAS[kind]}]'."
    )


def _is_installed(module: str) -> bool:
    with suppress(ModuleNotFoundError):  # of the package around it
        return find_spec(module) is not None
    return False


def patiently(call: Callable[[], T], pauses: Sequence[float] = PAUSES) -> T:
    """What ``call`` returns, asked again a few times where the database does not answer.

    ``call`` may have been carried out although its answer was lost, so it must bear being done
    twice. Raises StudyInterrupted when the last attempt fails too.
    """
    try:
        return _again(call, pauses)
    except _TRANSIENT as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise StudyInterrupted(
            f"The study's storage does not answer any more: {reason}. Settled trials are safe; "
            "run the same command again when it does."
        ) from None


def _again(call: Callable[[], T], pauses: Sequence[float]) -> T:
    """What ``call`` returns, or raises when patience has come to its end."""
    end = time.monotonic() + PATIENCE_SECONDS
    for pause in pauses:
        try:
            return call()
        except _TRANSIENT as error:
            if isinstance(error, ArgumentError) or time.monotonic() + pause > end:
                raise  # a URL that is none will not be one in a second
            time.sleep(pause)
    return call()


def _journal_storage(journal: Path) -> BaseStorage:
    try:
        return JournalStorage(Journal(journal.resolve()))
    except (KeyError, AssertionError) as error:  # of an entry that has no checksum yet
        raise InputError(
            f"{journal}: the journal is damaged ({error!r}). Bring back a copy of it, or choose "
            "another --out to begin anew; trials.jsonl still holds the records."
        ) from None
    except OSError as error:
        raise InputError(
            f"{error.filename or journal}: cannot be read and written: {error.strerror}. Make room "
            "or put the permissions right, and run the same command again."
        ) from None


class JournalUsers:
    """Who works with a journal at this moment, told by a lock that all of them share.

    The kernel takes it from a process that dies, so nobody is counted who does not live.
    """

    def __init__(self, journal: Path) -> None:
        self._path = journal.with_name(f".{journal.name}.users")
        self._file: Any = None

    def join(self) -> bool:
        """Counts this process in; whether it is the only one."""
        self._file = open(self._path, "a+b")
        is_alone = False
        with suppress(BlockingIOError):
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_alone = True
        fcntl.flock(self._file, fcntl.LOCK_SH)
        return is_alone

    def leave(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
