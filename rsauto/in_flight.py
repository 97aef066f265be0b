"""The trials that are running at this moment, as rows of the live panel.

A trial that runs alone is described in full above its row. Of several, each row says which one it
is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from rsauto.records import StepPoint
from rsauto.search.events import TrialStarted, TrialStep
from rsauto.units import bytes_text, method_text, rank_text, rate_text

MOST_ROWS = 8
"""Trials with a row of their own; of more, only the number is told."""


@dataclass(slots=True)
class _Row:
    """A running trial, how far it is, and its bar."""

    start: TrialStarted
    task: TaskID
    point: StepPoint | None = None
    measured_peak_bytes: int | None = None


class InFlight:
    """A bar for the study and one for every running trial."""

    def __init__(self, console: Console) -> None:
        self.budget_bytes: int | None = None
        """The study's memory budget, once it is known."""
        self._console = console
        self._rows: dict[int, _Row] = {}
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._study: TaskID | None = None

    def shown(self) -> AbstractContextManager[object]:
        """The live panel in a terminal; elsewhere nothing, lines are printed as they come."""
        if not self._console.is_terminal:
            return nullcontext()
        return Live(
            get_renderable=self.panel,
            console=self._console,
            refresh_per_second=6,
            transient=True,
        )

    def panel(self) -> Group:
        """What runs, drawn anew whenever the terminal is."""
        # The terminal is drawn by a thread of its own: rows come and go while it looks at them.
        starts = [row.start for row in list(self._rows.values())]
        parts: list[RenderableType] = [Text(self._head(starts)), self._bars]
        if len(starts) > MOST_ROWS:
            parts.append(Text(f"and {len(starts) - MOST_ROWS} more", style="dim"))
        return Group(*parts)

    def begin(self, num_trials: int, num_settled: int) -> None:
        """The bar of the study itself."""
        self._study = self._bars.add_task("study", total=num_trials, completed=num_settled, note="")

    def settled(self, num_settled: int, note: str) -> None:
        """Moves the bar of the study."""
        if self._study is not None:
            self._bars.update(self._study, completed=num_settled, note=note)

    def start(self, event: TrialStarted) -> None:
        """A row for a trial; one that starts again starts at zero."""
        self._drop(event.number)
        task = self._bars.add_task(f"trial {event.number}", total=event.spec.steps, note="")
        self._rows[event.number] = _Row(event, task)
        self._arrange()

    def step(self, event: TrialStep) -> None:
        row = self._rows.get(event.number)
        if row is not None:
            row.point, row.measured_peak_bytes = event.point, event.measured_peak_bytes
            self._bars.update(row.task, completed=event.point.step, note=self._note(row))

    def end(self, number: int) -> None:
        """Takes the trial's row away, also of one that was never started."""
        self._drop(number)
        self._arrange()

    def _drop(self, number: int) -> None:
        row = self._rows.pop(number, None)
        if row is not None:
            self._bars.remove_task(row.task)

    def _arrange(self) -> None:
        """Shows the trials that have run the longest. Alone or not, a row is worded differently."""
        for position, row in enumerate(self._rows.values()):
            self._bars.update(row.task, visible=position < MOST_ROWS, note=self._note(row))

    def _head(self, starts: list[TrialStarted]) -> str:
        if not starts:
            return ""
        peak = max(start.prediction.peak_bytes for start in starts)
        if len(starts) > 1:
            return (
                f"{len(starts)} trials at once; predicted peak of the largest alone "
                f"{bytes_text(peak)} of {bytes_text(self.budget_bytes)}"
            )
        spec = starts[0].spec
        return (
            f"trial {starts[0].number}: "
            f"{method_text(spec.method, is_refit=spec.rank_pattern is not None)} "
            f"rank {rank_text(spec.rank, spec.init_rank)}, "
            f"alpha {spec.alpha}, learning rate {rate_text(spec.learning_rate)}, "
            f"micro-batch {spec.micro_batch_size}; predicted peak "
            f"{bytes_text(peak)} of {bytes_text(self.budget_bytes)}"
        )

    def _note(self, row: _Row) -> str:
        parts = []
        if len(self._rows) > 1:
            spec = row.start.spec
            parts = [f"r={spec.rank} lr={rate_text(spec.learning_rate)}"]
        if row.point is not None:
            parts.append(f"loss {row.point.train_loss:.3f}")
        if row.measured_peak_bytes is not None:
            parts.append(f"peak {bytes_text(row.measured_peak_bytes)}")
        return ", ".join(parts)
