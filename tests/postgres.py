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


@contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database."""
    pytest.importorskip("psycopg", reason="psycopg is missing: pip install 'rsauto[postgres]'")
    bin_folder, user = binaries(), unprivileged()
    # Not below pytest's folder, which other users may not enter.
    folder = Path(tempfile.mkdtemp(prefix="rsauto-pg-"))
    try:
        if user is not None:
            shutil.chown(folder, user)
        data, port = folder / "data", free_port()
        options: dict[str, str] = {} if user is None else {"user": user}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": folder, **options}
        subprocess.run(
            [bin_folder / "initdb", "-D", data, "-A", "trust", "-U", "rsauto", "--no-sync"],
            check=True, **quiet,
        )  # type: ignore[call-overload]  # fmt: skip
        process = subprocess.Popen(
            [bin_folder / "postgres", "-D", data, "-p", str(port), "-k", folder, "-F",
             "-c", "listen_addresses=127.0.0.1", "-c", "max_connections=200"],
            **quiet,
        )  # type: ignore[call-overload]  # fmt: skip
        try:
            url = f"postgresql://rsauto@127.0.0.1:{port}/postgres"
            wait_until_open(process, url)
            yield url
        finally:
            process.send_signal(signal.SIGQUIT)  # at once, whoever is still connected
            process.communicate(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
