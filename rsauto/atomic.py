"""Files written whole or not at all, whatever kills the process."""

from __future__ import annotations

import glob
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces ``path`` by ``data``: a reader sees the old file or the new one, never a part.

    Raises OSError, which names ``path``, when the disk refuses; the old file is then untouched.
    """
    clear_leftovers(path)
    partial = beside(path, "partial")
    try:
        with naming(path):
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        with suppress(OSError):  # the first error is the one to tell
            partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Says of an OSError which file it was about: that of a full disk does not know."""
    try:
        yield
    except OSError as error:
        named = error.filename  # a name that ends with the error is of no use to the user
        if error.errno is None or (isinstance(named, str) and ".partial" not in named):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text with newlines as given."""
    write_bytes(path, text.encode("utf-8"))


def beside(path: Path, ending: str) -> Path:
    """A hidden name next to ``path`` that no other process has, for what is to take its place."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{ending}")


def put_in_place(new: Path, folder: Path) -> None:
    """Renames ``new`` to ``folder``; what was there goes only when that has worked."""
    old = beside(folder, "old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(path: Path) -> None:
    """Removes what killed processes of this host left `beside` a file or folder.

    A folder that was renamed, and to whose place the new one never came, is put back. Those of
    other hosts are let be: whether a process lives there is not known here.
    """
    host = re.escape(socket.gethostname())
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{host}\.(\d+)\.(partial|old)")
    for entry in path.parent.glob(f".{glob.escape(path.name)}.*"):
        found = pattern.fullmatch(entry.name)
        if found is None or psutil.pid_exists(int(found[1])):
            continue
        if found[2] == "old" and not path.exists():
            os.replace(entry, path)
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
