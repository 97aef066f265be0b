"""A PostgreSQL server of the tests' own: started on a free port, thrown away at the end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

USERS = ("postgres", "nobody")
"""PostgreSQL refuses to run as root; one of these takes its place."""


def binaries() -> Path:
    """The folder of initdb and postgres; skips the test where there is none."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    pytest.skip("no PostgreSQL server here: no initdb on the PATH or in /usr/lib/postgresql")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def unprivileged() -> str | None:
    """The user to run as; None where this is an ordinary one already."""
    if os.geteuid() != 0:
        return None
    import pwd

    known = {entry.pw_name for entry in pwd.getpwall()}
    found = next((user for user in USERS if user in known), None)
    if found is None:
        pytest.skip("PostgreSQL does not run as root, and there is no other user")
    return found


class Server:
    """One that can be stopped and started again over the same data."""

    def __init__(self, folder: Path, user: str | None) -> None:
        self._bin, self._data, self.port = binaries(), folder / "data", free_port()
        self._folder = folder
        self._options: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL}
        self._options |= {"stderr": subprocess.PIPE} | ({} if user is None else {"user": user})
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"postgresql://rsauto@127.0.0.1:{self.port}/postgres"
        make = [self._bin / "initdb", "-D", self._data, "-A", "trust", "-U", "rsauto", "--no-sync"]
        subprocess.run(make, check=True, **self._options)

    def start(self) -> None:
        """Returns when it answers."""
        self._process = subprocess.Popen(
            [self._bin / "postgres", "-D", self._data, "-p", str(self.port), "-k", self._folder,
             "-F", "-c", "listen_addresses=127.0.0.1", "-c", "max_connections=200"],
            **self._options,
        )  # fmt: skip
        wait_until_open(self._process, self.url)

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """At once, whoever is still connected; nothing where it is stopped already."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.communicate(timeout=30)
            self._process = None


@contextmanager
def running() -> Iterator[Server]:
    """A server with an empty database, started."""
    pytest.importorskip("psycopg", reason="psycopg is missing: pip install 'rsauto[postgres]'")
    binaries()
    user = unprivileged()
    # Not below pytest's folder, which other users may not enter.
    folder = Path(tempfile.mkdtemp(prefix="rsauto-pg-"))
    try:
        if user is not None:
            shutil.chown(folder, user)
        found = Server(folder, user)
        found.start()
        try:
            yield found
        finally:
            found.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database."""
    with running() as found:
        yield found.url


def wait_until_open(process: subprocess.Popen[bytes], url: str) -> None:
    import psycopg

    for _ in range(300):
        assert process.poll() is None, process.communicate()
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            time.sleep(0.1)
    raise AssertionError("PostgreSQL did not start")
