"""The journal of a study: Optuna's, every line of it sealed by a checksum.

Optuna reads it like any other journal. Its own file backend leaves a damaged last line unread and
writes behind it, and cannot tell a damaged number from a whole one.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from rsauto.atomic import naming
from rsauto.errors import InputError

_ENTRY = b'{"op_code":'
"""What every entry begins with."""

_SEAL = b',"crc32":"'
"""What comes between an entry and the checksum of it, 8 hexadecimal digits and two brackets."""


class Journal(BaseJournalBackend):
    """Entries in a file, one a line. Any number of processes may write it at the same time."""

    def __init__(self, path: Path) -> None:
        """Begins the journal, or mends its last line where that was not written to its end."""
        self._path = path
        self._lock_path = path.with_name(f".{path.name}.writer")
        self._offsets = [0]
        """Where each of the entries begins that have been read, and the next one will."""
        self._require_journal()
        with self._writing(), naming(path):
            path.touch()

    def _require_journal(self) -> None:
        """Nothing is mended, or written, in a file of somebody else. Raises InputError."""
        if not self._path.exists():
            return
        with naming(self._path), open(self._path, "rb") as file:
            start = file.read(len(_ENTRY))
        if not _ENTRY.startswith(start):
            raise self._damaged("line 1 does not begin as an entry does")

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Entries from a number on. Raises InputError for one that is not as it was written."""
        known = min(log_number_from, len(self._offsets) - 1)
        with naming(self._path), open(self._path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size < self._offsets[known]:
                raise self._damaged(f"it ends before entry {known + 1}, which was there")
            file.seek(self._offsets[known])
            # No further: somebody may cut off a torn line and write another meanwhile.
            content = file.read(size - self._offsets[known])
        # What follows the last line end is being written at this moment.
        for number, line in enumerate(content.split(b"\n")[:-1], start=known):
            try:
                entry = _opened(line)
            except ValueError as error:
                raise self._damaged(f"line {number + 1} {error}") from None
            if number + 1 == len(self._offsets):
                self._offsets.append(self._offsets[number] + len(line) + 1)
            if number >= log_number_from:
                yield entry

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Adds entries, and has the disk keep them. Raises OSError, which names the file."""
        with self._writing(), naming(self._path), open(self._path, "r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(_sealed(logs))
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Holds the journal for this process; its last line is then whole.

        Optuna's own locks are files that stay behind when their holder is killed; this one the
        kernel gives back at once.
        """
        with naming(self._lock_path), open(self._lock_path, "a+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with naming(self._path):
                drop_torn_line(self._path)
            yield

    def _damaged(self, what: str) -> InputError:
        return InputError(
            f"{self._path}: the journal is damaged: {what}. Bring back a copy of it, or choose "
            "another --out to begin anew; trials.jsonl still holds the records."
        )


def drop_torn_line(journal: Path) -> None:
    """Cuts off a last line that was not written to its end. Only for who holds the lock.

    A full disk or a power cut can leave half an entry. Left there, the next one would be written
    right behind it, and neither could be read again.
    """
    if not journal.exists():
        return
    with open(journal, "r+b") as file:
        if not file.seek(0, os.SEEK_END):
            return
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
        file.seek(0)
        content = file.read()
        end = content.rfind(b"\n") + 1
        if _is_sealed(content[end:-1]):  # whole but for its end, which is there and damaged
            file.seek(-1, os.SEEK_END)
            file.write(b"\n")
        elif _is_sealed(content[end:]):
            file.write(b"\n")
        else:
            file.truncate(end)


def _sealed(logs: Iterable[dict[str, Any]]) -> bytes:
    entries = [json.dumps(log, separators=(",", ":")).encode("utf-8") for log in logs]
    return b"".join(b'%b%b%08x"}\n' % (e[:-1], _SEAL, zlib.crc32(e)) for e in entries)


def _is_sealed(line: bytes) -> bool:
    """Whether an entry has its checksum."""
    try:
        _opened(line)
    except ValueError:
        return False
    return _SEAL in line


def _opened(line: bytes) -> dict[str, Any]:
    """An entry. Raises ValueError where it is not as it was written; older ones had no checksum."""
    entry, seal, checksum = line.rpartition(_SEAL)
    if seal and b'%08x"}' % zlib.crc32(entry + b"}") != checksum:
        raise ValueError("does not have its checksum")
    try:
        found = json.loads(line)
    except ValueError:  # bytes that are no text, too
        raise ValueError("is no JSON") from None
    if not isinstance(found, dict) or "op_code" not in found:
        raise ValueError("is no entry")
    return found
