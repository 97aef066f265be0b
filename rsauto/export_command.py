"""What `rsauto export` says on a terminal. Light to import."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rsauto.exports.request import checked_request
from rsauto.garbage import collection_paused
from rsauto.report.choice import Choice
from rsauto.study_command import quieten_libraries

if TYPE_CHECKING:
    from rsauto.exports.run import Exported


def run_export(
    folder: Path,
    to: str,
    choice: Choice,
    as_json: bool,
    *,
    out: Path | None,
    padded: bool,
    dtype: str | None,
    force: bool,
) -> None:
    """Exports, and says what was written, how it was checked and what to do with it."""
    request = checked_request(folder, to, choice, out=out, padded=padded, dtype=dtype, force=force)
    typer.echo("loading libraries ...", err=True)
    with collection_paused():
        quieten_libraries()
        from rsauto.exports.run import run

    exported = run(request)
    for line in _lines(exported):
        typer.echo(line, err=as_json)
    if as_json:
        typer.echo(json.dumps(exported.to_json(), allow_nan=False))


def _lines(exported: Exported) -> list[str]:
    lines = [f"export       trial {exported.trial} as {exported.to}: {exported.out}"]
    if exported.weights is not None:
        lines.append(f"weights      {exported.weights}, trained for {exported.steps} steps")
    if exported.parity is not None:
        lines.append(f"parity       {exported.parity}")
    if exported.command is not None:
        lines.append(f"run          cd {shlex.quote(str(exported.out))} && {exported.command}")
    return lines + [f"differs      {note}" for note in exported.notes]
