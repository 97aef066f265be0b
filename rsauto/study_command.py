"""What `rsauto study` and `rsauto worker` do with a terminal and signals. Light to import."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from rsauto.errors import InputError
from rsauto.garbage import collection_paused
from rsauto.launched import num_processes
from rsauto.stop import StopFlag

if TYPE_CHECKING:
    from rsauto.config import StudyConfig
    from rsauto.report.table import Study
    from rsauto.report.verdict import Verdict


def run_study(
    config: StudyConfig,
    out: Path,
    storage: str | None,
    as_json: bool,
    *,
    workers: int = 1,
    launcher: str = "local",
    report: bool = True,
) -> None:
    """Runs a study to its end, shown on the terminal."""
    if workers > 1 and num_processes() > 1:
        raise InputError(
            f"--workers {workers}: the launcher has started {num_processes()} processes that train "
            "every trial together. Leave --workers out, or start rsauto without the launcher."
        )
    from rich.console import Console

    console = Console(stderr=as_json, soft_wrap=False)
    console.print("loading libraries ...", style="dim")
    stop = StopFlag()
    with signals_set(stop):
        with collection_paused():
            quieten_libraries()
            from rsauto.console import print_verdict, watch
            from rsauto.launch import crew_of
            from rsauto.report.table import load_study
            from rsauto.report.verdict import judge
            from rsauto.search.driver import study_events

        crew = crew_of(workers, launcher, storage)
        events = study_events(config, out, storage=storage, stop=stop, crew=crew, report=report)
        ended = watch(events, config, console)
    assert ended is not None
    found = load_study(out)
    verdict = judge(found.config, found.records, found.environment)
    print_verdict(found, verdict, console, has_report=report)
    console.print(f"{ended.reason}, {ended.seconds:.0f} s", style="dim")
    if as_json:
        typer.echo(json.dumps(_result(found, verdict, ended.seconds), allow_nan=False))


def run_worker(target: str, study: str | None, wait_seconds: float) -> None:
    """Works on a study of others to its end, begun at most so many seconds from now."""
    if not 0 <= wait_seconds < math.inf:
        raise InputError(
            f"--wait {wait_seconds:g}: must be a number of seconds, 0 or more, such as 3600."
        )
    if num_processes() > 1:
        raise InputError(
            f"rsauto worker: the launcher has started {num_processes()} processes. A trial that is "
            "spread over several belongs to `rsauto study`; start a worker without the launcher."
        )
    from rich.console import Console

    console = Console(soft_wrap=False)
    console.print("loading libraries ...", style="dim")
    stop = StopFlag()
    with signals_set(stop):
        with collection_paused():
            quieten_libraries()
            from rsauto.console import watch
            from rsauto.launch import stop_with_parent
            from rsauto.search.workers import join_when_begun, worker_events

        stop_with_parent(stop)

        def say(what: str) -> None:
            told = f"{what}\nWaiting {wait_seconds:g} s for it at most ..."
            console.print(told, style="dim", markup=False, highlight=False)

        joined = join_when_begun(target, study, wait_seconds=wait_seconds, stop=stop, on_wait=say)
        ended = watch(worker_events(joined, stop=stop), joined.config, console)
    assert ended is not None
    console.print(f"{ended.reason}, {ended.seconds:.0f} s", style="dim")


def _result(study: Study, verdict: Verdict, seconds: float) -> dict[str, Any]:
    """What `study --json` ends with; the four trials are whole records, or null."""
    from rsauto.records import SETTLED_OUTCOMES

    chosen = {
        name: getattr(verdict, name) for name in ("best", "recommended", "default", "default_tuned")
    }
    return {
        "out": str(study.folder),
        "trials": sum(r.outcome in SETTLED_OUTCOMES for r in study.records),
        **{name: record.to_json() if record else None for name, record in chosen.items()},
        "seconds": round(seconds, 1),
    }


def quieten_libraries() -> None:
    """Progress bars and notes of the libraries would tear the live display."""
    # PyTorch tells of every block freed while memory is measured that was there before.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # bitsandbytes, where installed, warns on import of kernels that training has no use for.
    getLogger("bitsandbytes").setLevel(ERROR)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def signals_set(stop: StopFlag) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the study to stop cleanly; a second one stops at once."""

    def ask(_number: int, _frame: FrameType | None) -> None:
        # A launcher passes on what the terminal has sent already: that is no second one.
        if stop.requested and num_processes() == 1:
            raise KeyboardInterrupt
        stop.requested = True
        print("stopping cleanly, once more to stop at once ...", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
