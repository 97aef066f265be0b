"""What people see of a training: a live line in a terminal, and plain lines at evaluations."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console

from rsauto.finetuning.request import Job
from rsauto.finetuning.run import Event, Finished, Ready, Remark, Saved
from rsauto.in_flight import InFlight
from rsauto.records import EvalPoint
from rsauto.search.events import Stage, TrialStarted, TrialStep
from rsauto.units import bytes_text, method_text, rank_text, rate_text, seconds_text, value_text


def watch(events: Iterable[Event], job: Job, console: Console) -> Finished | None:
    """Shows a training while it runs; returns its last event."""
    display = Display(job, console)
    ended = None
    with display.in_flight.shown():
        for event in events:
            display.handle(event)
            if isinstance(event, Finished):
                ended = event
    return ended


class Display:
    """Turns events into lines and, in a terminal, a live panel."""

    def __init__(self, job: Job, console: Console) -> None:
        self.job = job
        self.console = console
        self.in_flight = InFlight(console)
        self.steps_at_start = 0
        self.begin = time.monotonic()

    def handle(self, event: Event) -> None:
        match event:
            case Stage(name=name):
                self.console.print(f"{name} ...", style="dim")
            case Remark(text=text):
                self._line(text)
            case Ready():
                self._ready(event)
            case TrialStarted():
                self.begin = time.monotonic()
                self.in_flight.start(event)
            case TrialStep(number=number, point=point):
                self.in_flight.step(event)
                if point.evaluation is not None:
                    left = self._time_left(point.step, event.spec.steps)
                    self._line(evaluation_line(point.evaluation, event.spec.steps, left))
                if point.step == event.spec.steps:
                    self.in_flight.end(number)
            case Saved(step=step):
                if self.console.is_terminal:
                    return  # the bar shows that it goes on
                self.console.print(f"checkpoint of step {step}", style="dim", highlight=False)
            case Finished(values=values):
                self._finished(values, event.was_finished)

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def _ready(self, event: Ready) -> None:
        self.in_flight.budget_bytes = event.memory_budget_bytes
        self.steps_at_start = event.steps_done
        for line in plan_lines(event, self.job):
            self._line(line)

    def _time_left(self, step: int, steps: int) -> str:
        done = step - self.steps_at_start
        pace = (time.monotonic() - self.begin) / max(1, done)
        return seconds_text(pace * (steps - step))

    def _finished(self, values: Mapping[str, Any], was_finished: bool) -> None:
        if was_finished:
            self._line(f"{self.job.out}: was finished by an earlier run; choose another --out "
                       "to train it once more")  # fmt: skip
        for line in result_lines(values):
            self._line(line)
        self.console.print()
        for name, path in (("adapter", "adapter"), ("record", "record.json")):
            self.console.print(f"{name:<12} {self.job.out / path}", markup=False, highlight=False,
                               soft_wrap=True)  # fmt: skip


def plan_lines(event: Ready, job: Job) -> list[str]:
    """What is trained, what it needs, and where the test rows are from."""
    spec, found = event.spec, event.prediction
    peak = f"{'about ' if found.estimated else ''}{bytes_text(found.peak_bytes)}"
    times = -(-spec.batch_size // found.micro_batch_size)
    batch = f"batch {spec.batch_size}"
    if times > 1:
        batch += f" as {times} micro-batches of {found.micro_batch_size}"
    method = method_text(spec.method, is_refit=spec.rank_pattern is not None)
    lines = [
        f"training    trial {job.record.number} of {job.config.name}: {method} rank "
        f"{rank_text(spec.rank, spec.init_rank)}, alpha {spec.alpha}, learning rate "
        f"{rate_text(spec.learning_rate)}, {spec.optimizer}, seed {spec.seed}",
        f"length      {spec.steps} steps, {batch}; a checkpoint every {event.save_every} steps",
        f"memory      predicted peak {peak} of {bytes_text(event.memory_budget_bytes)}",
        f"test        {event.test_source}",
    ]
    if event.steps_done:
        lines.append(f"continuing after step {event.steps_done}")
    return lines


def evaluation_line(point: EvalPoint, steps: int, time_left: str) -> str:
    """One evaluation in a line."""
    metrics = "".join(f"  {name} {value_text(value)}" for name, value in point.metrics.items())
    left = f", {time_left} left" if point.step < steps else ""
    return (
        f"step {point.step}/{steps}  train_loss {value_text(point.train_loss)}  "
        f"eval_loss {value_text(point.eval_loss)}{metrics}{left}"
    )


def result_lines(values: Mapping[str, Any]) -> list[str]:
    """How good the adapter is, on the validation rows and on the test rows."""
    validation = {"eval_loss": values["eval_loss"], "perplexity": values["perplexity"]}
    lines = [_measured("validation", {**validation, **values["metrics"]})]
    if values["test"] is None:
        return [*lines, f"test        {values['test_source']}"]
    return [*lines, _measured("test", values["test"])]


def _measured(name: str, values: Mapping[str, Any]) -> str:
    shown = (
        f"{k} {v if k == 'rows' else value_text(v)}" for k, v in values.items() if v is not None
    )
    return f"{name:<12}" + "  ".join(shown)
