"""A MariaDB server of the tests' own, which speaks MySQL: thrown away at the end."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from postgres import free_port, unprivileged

DATABASES = ("killed", "wide")
"""Empty ones."""


@contextmanager
def server() -> Iterator[str]:
    """Its URL, to which a name of DATABASES is added."""
    pytest.importorskip("pymysql", reason="pymysql is missing: pip install 'rsauto[mysql]'")
    install, daemon = shutil.which("mariadb-install-db"), shutil.which("mariadbd")
    if install is None or daemon is None:
        pytest.skip("no MariaDB server here: no mariadb-install-db and mariadbd on the PATH")
    user = unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="rsauto-mariadb-"))
    options = ["--no-defaults", f"--datadir={folder / 'data'}"]
    if user is not None:
        shutil.chown(folder, user)
        options.append(f"--user={user}")
    port = free_port()
    make = [install, *options, "--auth-root-authentication-method=normal", "--skip-test-db"]
    serve = [daemon, *options, f"--port={port}", f"--socket={folder / 'socket'}",
             "--bind-address=127.0.0.1", "--skip-name-resolve"]  # fmt: skip
    try:
        subprocess.run(make, check=True, capture_output=True)
        process = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            connection = _connected(process, port)
            with connection, connection.cursor() as cursor:
                for name in DATABASES:
                    cursor.execute(f"CREATE DATABASE {name}")
            yield f"mysql://root@127.0.0.1:{port}/"
        finally:
            process.kill()
            process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _connected(process: subprocess.Popen[bytes], port: int) -> Any:
    import pymysql

    for _ in range(300):
        assert process.poll() is None, "mariadbd ended by itself"
        try:
            return pymysql.connect(host="127.0.0.1", port=port, user="root")
        except pymysql.OperationalError:
            time.sleep(0.1)
    raise AssertionError("MariaDB did not start")
