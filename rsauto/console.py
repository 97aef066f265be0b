"""What people see in a terminal: a live display, or plain lines where nobody watches.

Everything is drawn from the events of a study; the driver knows nothing of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from shlex import quote
from typing import Any, Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rsauto.config import StudyConfig
from rsauto.data import lines as preflight_lines
from rsauto.in_flight import InFlight
from rsauto.records import TrialRecord
from rsauto.report.cells import marks_text
from rsauto.report.kinds import kind_of, refit_text
from rsauto.report.notes import ROLE_NAMES, notes
from rsauto.report.ranks import rank_table
from rsauto.report.table import Study, is_refit
from rsauto.report.verdict import Verdict
from rsauto.report.wording import noise_remark
from rsauto.search.allowance import Allowance
from rsauto.search.events import (
    AllowanceRaised,
    CrewNotice,
    Event,
    PackingDecided,
    PackShrank,
    Planned,
    Searching,
    Stage,
    StudyEnded,
    TrialDropped,
    TrialSettled,
    TrialStarted,
    TrialStep,
)
from rsauto.search.pack_size import PackPlan
from rsauto.search.setup import Setup, probes
from rsauto.units import (
    bytes_text,
    count_text,
    mean_text,
    objective_text,
    rate_text,
    seconds_text,
    value_text,
)


def watch(events: Iterable[Event], config: StudyConfig, console: Console) -> StudyEnded | None:
    """Shows a study while it runs; returns its last event."""
    display = Display(config, console)
    ended = None
    with display.in_flight.shown():
        for event in events:
            display.handle(event)
            if isinstance(event, StudyEnded):
                ended = event
    return ended


class Display:
    """Turns events into lines and, in a terminal, a live panel."""

    def __init__(self, config: StudyConfig, console: Console) -> None:
        self.config = config
        self.console = console
        self.best: TrialRecord | None = None
        self.begin = time.monotonic()
        self.num_at_start = 0
        self.in_flight = InFlight(console)

    def handle(self, event: Event) -> None:
        match event:
            case Stage(name=name):
                self.console.print(f"{name} ...", style="dim")
            case Planned(setup=setup):
                self._planned(setup)
            case Searching():
                self._searching(event)
            case TrialStarted():
                self.in_flight.start(event)
            case TrialStep():
                self.in_flight.step(event)
            case TrialSettled(record=record, num_settled=num_settled, worker=worker):
                self._settled(record, num_settled, worker)
            case TrialDropped(number=number):
                self.in_flight.end(number)
                line = f"{number:>4} was given to another worker while this one did not answer"
                self.console.print(line, markup=False, highlight=False)
            case CrewNotice(text=text):
                self.console.print(text, markup=False, highlight=False)
            case AllowanceRaised(allowance=allowance, ranks=ranks):
                self.console.print(allowance_line(allowance, ranks), markup=False, highlight=False)
            case PackingDecided(plan=plan):
                self.console.print(packing_line(plan), markup=False, highlight=False)
            case PackShrank(size=size):
                line = f"out of memory: from now on {size} trials at once; nothing is lost"
                self.console.print(line, markup=False, highlight=False)
            case StudyEnded():
                pass

    def _planned(self, setup: Setup) -> None:
        self.in_flight.budget_bytes = setup.memory_budget_bytes
        for line in preflight_lines(setup.preflight):
            self.console.print(line, markup=False, highlight=False)
        self.console.print(plan_table(setup))

    def _searching(self, event: Searching) -> None:
        self.num_at_start = event.num_settled
        self.begin = time.monotonic()
        if event.num_settled:
            self.console.print(f"continuing after {event.num_settled} settled trials")
        if event.num_orphans:
            self.console.print(f"{event.num_orphans} interrupted trial(s) will be run again")
        self.in_flight.begin(self.config.search.trials, event.num_settled)

    def _settled(self, record: TrialRecord, num_settled: int, worker: str | None) -> None:
        if record.outcome == "complete" and self._is_better(record):
            self.best = record
        line = trial_line(record, self.config) + (f" by {worker}" if worker else "")
        self.console.print(line, markup=False, highlight=False)
        self.in_flight.end(record.number)
        note = f"best {self._best_text()}, {self._time_left(num_settled)} left"
        self.in_flight.settled(num_settled, note)

    def _is_better(self, record: TrialRecord) -> bool:
        new, old = objective_value(record, self.config), None
        if self.best is not None:
            old = objective_value(self.best, self.config)
        if new is None or old is None:
            return new is not None
        return new < old if self.config.search.minimize else new > old

    def _best_text(self) -> str:
        if self.best is None:
            return "-"
        value = value_text(objective_value(self.best, self.config))
        return f"{value} (rank {self.best.rank})"

    def _time_left(self, num_settled: int) -> str:
        done = num_settled - self.num_at_start
        if done < 1:
            return "?"
        pace = (time.monotonic() - self.begin) / done
        return seconds_text(pace * max(0, self.config.search.trials - num_settled))


def objective_value(record: TrialRecord, config: StudyConfig) -> float | None:
    """The study's objective of a record, None where it was not measured."""
    name = config.search.objective
    if name in ("eval_loss", "perplexity"):
        value: float | None = getattr(record, name)
        return value
    return record.metrics.get(name)


def _role_text(record: TrialRecord) -> str:
    """A refit on another seed is told from rsLoRA of one rank on another seed."""
    name = ROLE_NAMES[record.role]
    return f"refit, {record.role}" if is_refit(record) and record.role != "refit" else name


def trial_line(record: TrialRecord, config: StudyConfig) -> str:
    """One settled trial in a line."""
    value = objective_value(record, config)
    parts = [
        f"{record.number:>4} {_role_text(record):<13} {kind_of(record):<9} "
        f"r={record.rank:<4}alpha={record.alpha:<3}lr={rate_text(record.learning_rate):<8}"
        f"{value_text(value) if record.outcome == 'complete' else record.outcome:<8}",
    ]
    if record.engine == "packed":
        parts.append(f"{pack_text(record.pack_size):>15}")
    if record.measured_peak_bytes is not None:
        parts.append(f"{bytes_text(record.measured_peak_bytes):>8}")
    if record.train_seconds is not None:
        parts.append(f"{seconds_text(record.train_seconds):>6}")
    if record.error:
        parts.append(record.error)
    return " ".join(parts)


def pack_text(pack_size: int | None) -> str:
    """'packed x8', where a trial that ran alone has its peak and time."""
    return "packed" if pack_size is None else f"packed x{pack_size}"


def allowance_line(allowance: Allowance, ranks: tuple[int, ...]) -> str:
    """Why more memory is kept free from now on, and what that leaves."""
    fitting = f"rank {ranks[-1]} is the largest that fits" if ranks else "no rank fits any more"
    return (
        f"{allowance.reason}: {allowance.share:.1%} is added to every prediction from now on; "
        f"{fitting}"
    )


def plan_table(setup: Setup) -> Table:
    """Which ranks fit the budget, and with which micro-batch."""
    budget = setup.memory_budget_bytes
    each = f" of each of {setup.spread.size} devices" if setup.spread.size > 1 else ""
    title = f"memory plan, budget {bytes_text(budget)}{each}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("rank", "trainable", "predicted peak", "needs", "micro-batch", "fits"):
        table.add_column(name, justify="right")
    for rank in setup.config.search.ranks:
        spec = probes(setup, rank)[0]
        prediction = setup.predict(spec)
        shown = prediction or setup.smallest_prediction(spec)
        table.add_row(
            str(rank),
            count_text(shown.num_trainable_params),
            f"{'about ' if shown.estimated else ''}{bytes_text(shown.peak_bytes)}",
            bytes_text(setup.planner.needed_bytes(shown)),
            str(shown.micro_batch_size),
            "yes" if prediction else "no",
            style=None if prediction else "dim",
        )
    if shown.estimate_reason:
        why = "" if setup.spread.shards_base else "as a step cannot be traced: "
        table.caption = f"estimated, {why}{shown.estimate_reason}"
    return table


def print_verdict(
    study: Study, verdict: Verdict, console: Console, *, has_report: bool = True
) -> None:
    """The table of ranks, the sentence, and where the files are.

    Without a report of this run, how to make it: one that is there is of an earlier run.
    """
    console.print(ranks_as_table(study, verdict, console.width))
    for note in (noise_remark(verdict), *notes(study.records, verdict)):
        console.print(note, style="dim", markup=False, highlight=False)
    console.print()
    for sentence in verdict.sentences:
        console.print(sentence, markup=False, highlight=False)
    console.print()
    shown = {name: str(path) for name, path in study_paths(study.folder).items() if path.exists()}
    if not has_report:
        later = f"rsauto report {quote(str(study.folder))}"
        shown = {"report": later, **{n: p for n, p in shown.items() if n not in _PAGES}}
    for name, place in shown.items():
        console.print(f"{name:<12} {place}", markup=False, highlight=False, soft_wrap=True)


_PAGES = frozenset({"report", "table"})
"""Of what a study leaves for people, what is made of the records alone."""


def study_paths(folder: Path) -> dict[str, Path]:
    """What a finished study leaves for people."""
    return {
        "report": folder / "report.html",
        "table": folder / "tradeoff.csv",
        "best": folder / "best",
        "recommended": folder / "recommended",
    }


def ranks_as_table(study: Study, verdict: Verdict, width: int) -> Table:
    """What each rank costs and what it buys; a narrow terminal shows the columns that decide."""
    table = Table(
        title="what each rank costs and buys", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    columns = [c for c in RANK_COLUMNS if width >= WIDE or c.always]
    for column in columns:
        title = column.title.format(objective=objective_text(verdict.objective))
        # What a row is called may take several lines, so that its numbers are never cut.
        is_name = column in (RANK_COLUMNS[0], RANK_COLUMNS[-1])
        table.add_column(title, justify=column.justify, no_wrap=not is_name)
    rows = rank_table(study.records, verdict)
    for row in rows.astype(object).where(rows.notna(), None).to_dict("records"):
        table.add_row(
            *(column.text({str(key): value for key, value in row.items()}) for column in columns),
            style="bold" if "recommended" in (row["marks"] or "") else None,
        )
    return table


def _objective_text(row: dict[str, Any]) -> str:
    mean = row["objective"]
    return value_text(None) if mean is None else mean_text(mean, row["half_width"])


def _remark(row: dict[str, Any]) -> str:
    return "too large" if row["fits"] is False else marks_text(row["marks"], row["is_tied"])


class RankColumn(NamedTuple):
    """A column of the table of ranks."""

    title: str
    text: Callable[[dict[str, Any]], str]
    justify: Literal["left", "right"] = "right"
    always: bool = True
    """Shown in a narrow terminal too."""


RANK_COLUMNS = (
    RankColumn("method", lambda row: refit_text(row["kind"], row["refit"]), "left"),
    RankColumn("rank", lambda row: str(row["rank"])),
    RankColumn("largest", lambda row: str(row["r_max"] or "-"), always=False),
    RankColumn("{objective}", _objective_text),
    RankColumn("seeds", lambda row: str(row["num_seeds"] or "-"), always=False),
    RankColumn("alpha", lambda row: str(row["alpha"] or "-"), always=False),
    RankColumn("lr", lambda row: rate_text(row["learning_rate"])),
    RankColumn("predicted", lambda row: bytes_text(row["predicted_peak_bytes"]), always=False),
    RankColumn("measured", lambda row: bytes_text(row["measured_peak_bytes"]), always=False),
    RankColumn("needs", lambda row: bytes_text(row["smallest_budget_bytes"])),
    RankColumn("trainable", lambda row: count_text(row["num_trainable_params"]), always=False),
    RankColumn("time", lambda row: seconds_text(row["train_seconds"])),
    RankColumn("FLOPs", lambda row: count_text(row["flops"]), always=False),
    RankColumn("", _remark, "left"),
)

WIDE = 150
"""Columns of a terminal that shows every column of the table."""


def packing_line(plan: PackPlan) -> str:
    """How search trials are run, and why."""
    if plan.size == 1:
        return f"search trials run one by one: {plan.reason}"
    return (
        f"search trials run up to {plan.size} at once: {plan.ratio:.1f} times as fast as one by "
        "one in a short probe"
    )
