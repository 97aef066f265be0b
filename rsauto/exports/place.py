"""The folder of an export: it is there whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rsauto.adapters.export import put_in_place
from rsauto.atomic import write_text
from rsauto.errors import InputError

MARK = "export.json"
"""In every export: what it is of. A folder that has it may be replaced."""


def require_free(place: Path, force: bool) -> None:
    """Raises InputError for a folder that holds something, unless it is an export to replace."""
    if place.exists() and not place.is_dir():
        raise InputError(f"--out {place}: is a file, not a folder. Choose another --out.")
    here = Path.cwd()
    if place.resolve() in (here, *here.parents):
        raise InputError(
            f"--out {place}: holds the folder this runs in, which is not replaced under your feet. "
            "Name a folder below it, or another one."
        )
    if not place.is_dir() or not any(place.iterdir()):
        return
    if not _is_export(place):
        raise InputError(
            f"--out {place}: the folder is not empty and holds no export of rsauto. "
            "Choose another --out, or empty it."
        )
    if not force:
        raise InputError(
            f"--out {place}: holds an earlier export. Give --force to replace it, or choose "
            "another --out."
        )


def _is_export(place: Path) -> bool:
    try:
        found = json.loads((place / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "to" in found


@contextmanager
def built(place: Path) -> Iterator[Path]:
    """A folder to build the export in, which becomes ``place`` once nothing was raised.

    Raises InputError where it cannot be written.
    """
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        put_in_place(partial, place)
    except OSError as error:
        raise InputError(f"--out {place}: cannot be written: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_mark(folder: Path, values: dict[str, Any]) -> None:
    """Says what the export is of."""
    write_text(folder / MARK, json.dumps(values, indent=2) + "\n")
