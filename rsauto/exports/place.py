"""The folder of an export: it is there whole, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rsauto.atomic import beside, clear_leftovers, put_in_place, write_text
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
    if not force and _written(place):
        raise InputError(
            f"--out {place}: holds an earlier export. Give --force to replace it, or choose "
            "another --out."
        )
    _require_nothing_else(place)


def _require_nothing_else(place: Path) -> None:
    """Raises InputError for files that no export wrote: they are not ours to delete."""
    written = _written(place)
    files = (path for path in place.rglob("*") if path.is_symlink() or not path.is_dir())
    others = sorted({str(path.relative_to(place)) for path in files} - written)
    if others and not written:
        raise InputError(
            f"--out {place}: the folder is not empty and holds no export of rsauto. "
            "Choose another --out, or empty it."
        )
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise InputError(
            f"--out {place}: beside the earlier export it holds {', '.join(others[:3])}{more}, "
            "which the export did not write and --force does not delete. Move them away, or choose "
            "another --out."
        )


def _written(place: Path) -> frozenset[str]:
    """The files of the export that a folder holds, relative to it; nothing where it holds none."""
    try:
        found = json.loads((place / MARK).read_text(encoding="utf-8"))
        return frozenset({MARK, *found["files"]}) if "to" in found else frozenset()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return frozenset()


@contextmanager
def built(place: Path) -> Iterator[Path]:
    """A folder to build the export in, which becomes ``place`` once nothing was raised.

    Raises InputError where it cannot be written.
    """
    partial = beside(place, "partial")
    try:
        clear_leftovers(place)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _require_nothing_else(place)  # Building takes minutes; something may have come meanwhile.
        put_in_place(partial, place)
    except OSError as error:
        raise InputError(f"--out {place}: cannot be written: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_mark(folder: Path, values: dict[str, Any]) -> None:
    """Says what the export is of."""
    write_text(folder / MARK, json.dumps(values, indent=2) + "\n")
