"""What `rsauto train` does with a terminal and signals. Light to import."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from rsauto.errors import InputError
from rsauto.garbage import collection_paused
from rsauto.launched import num_processes
from rsauto.stop import StopFlag
from rsauto.study_command import quieten_libraries, signals_set

if TYPE_CHECKING:
    from rsauto.finetuning.request import Request


def run_training(request: Request, as_json: bool) -> None:
    """Trains what was asked for to its end, shown on the terminal."""
    if num_processes() > 1:
        raise InputError(
            f"rsauto train: the launcher has started {num_processes()} processes, but a training "
            "runs in one. Start it without the launcher."
        )
    from rich.console import Console

    from rsauto.finetuning.out_folder import OutFolder
    from rsauto.finetuning.request import resolve

    job = resolve(request)
    OutFolder(job.out).check(job)
    console = Console(stderr=as_json, soft_wrap=False)
    console.print("loading libraries ...", style="dim")
    stop = StopFlag()
    with signals_set(stop):
        with collection_paused():
            quieten_libraries()
            from rsauto.finetuning.display import watch
            from rsauto.finetuning.run import training_events
            from rsauto.finetuning.trackers import tracked

        ended = watch(tracked(training_events(job, stop), job), job, console)
    assert ended is not None
    if as_json:
        values = {"out": str(job.out), "record": ended.values, "test": ended.values["test"]}
        typer.echo(json.dumps(values, allow_nan=False))
