"""Files written whole or not at all, whatever kills the process."""

from __future__ import annotations

import glob
import os
import re
import shutil
import socket
from pathlib import Path

import psutil


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces ``path`` by ``data``: a reader sees the old file or the new one, never a part.

    Raises OSError when the disk refuses; the old file is then untouched.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text with newlines as given."""
    write_bytes(path, text.encode("utf-8"))


def beside(path: Path, ending: str) -> Path:
    """A hidden name next to ``path`` that no other process has, for a folder being replaced."""
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


def clear_leftovers(folder: Path) -> None:
    """Removes what killed processes of this host left `beside` a folder.

    A folder that was renamed, and to whose place the new one never came, is put back. Those of
    other hosts are let be: whether a process lives there is not known here.
    """
    host = re.escape(socket.gethostname())
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.{host}\.(\d+)\.(partial|old)")
    for entry in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        found = pattern.fullmatch(entry.name)
        if found is None or psutil.pid_exists(int(found[1])):
            continue
        if found[2] == "old" and not folder.exists():
            os.replace(entry, folder)
        else:
            shutil.rmtree(entry, ignore_errors=True)
