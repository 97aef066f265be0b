"""A study folder that came from elsewhere: nothing in it may lead out of it.

A link in a folder that somebody shares could make `rsauto report` write into another folder of
whoever opens it, or show them one of their own files as part of the study.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rsauto.errors import InputError


def require_enclosed(folder: Path) -> None:
    """Raises InputError where a link below ``folder`` leads out of it, or something is no file.

    The folder itself may be a link. What is not there yet leads nowhere.
    """
    try:
        root = folder.resolve()
        wrong = next(_leading_out(root, root), None)
    except (OSError, ValueError, RuntimeError) as error:  # such as links in a circle
        raise InputError(f"{str(folder)!r}: cannot be looked through: {error}.") from None
    if wrong is not None:
        path, reason = wrong
        raise InputError(
            f"{folder}: {path.relative_to(root)} {reason}. What reads or writes it could be made "
            "to touch other files. Put the file or folder itself there, or remove it."
        )


def _leading_out(folder: Path, root: Path) -> Iterator[tuple[Path, str]]:
    for entry in _entries(folder):
        path = Path(entry.path)
        if entry.is_symlink():
            target = path.resolve()
            if not target.is_relative_to(root):
                yield path, f"is a link to {target}, which is outside of the study folder"
        elif entry.is_dir(follow_symlinks=False):
            yield from _leading_out(path, root)
        elif not entry.is_file(follow_symlinks=False) and path.exists():
            yield path, "is neither a file nor a folder"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """None of a folder that is not there, or that a running study has just removed."""
    try:
        return list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
