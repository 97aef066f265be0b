"""Files written whole or not at all, whatever kills the process."""

from __future__ import annotations

import os
from pathlib import Path


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
