"""What a terminal shows while trials run: one alone, several at once, and how each ended."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from rsauto.config import StudyConfig
from rsauto.console import Display, trial_line
from rsauto.in_flight import MOST_ROWS
from rsauto.memory.kinds import Prediction
from rsauto.records import StepPoint, TrialRecord, TrialSpec
from rsauto.search.events import Searching, TrialSettled, TrialStarted, TrialStep

MIB = 2**20
SPEC = TrialSpec(
    role="search",
    method="rslora",
    rank=8,
    alpha=16,
    scaling_rule="rslora",
    learning_rate=1e-3,
    micro_batch_size=4,
    steps=50,
)
RecordOf = Callable[..., TrialRecord]


def spec(number: int) -> TrialSpec:
    """The spec of a trial whose rank tells its number."""
    return replace(SPEC, rank=number)


def started(number: int) -> TrialStarted:
    found = Prediction(
        rank=number,
        micro_batch_size=4,
        peak_bytes=number * MIB,
        reserved_bytes=number * MIB,
        num_trainable_params=1,
        flops_per_token=1.0,
        breakdown={},
        phase="forward",
    )
    return TrialStarted(number, spec(number), found)


def stepped(number: int, step: int, measured: int | None = None) -> TrialStep:
    point = StepPoint(
        step=step, train_loss=step / 10, grad_norm=1, learning_rate=1e-3, tokens=1, seconds=1
    )
    return TrialStep(number, spec(number), point, measured)


@pytest.fixture
def display() -> Display:
    """That of a study of 24 trials which is about to search."""
    console = Console(width=120, file=io.StringIO(), force_terminal=True, color_system=None)
    shown = Display(StudyConfig(), console)
    shown.in_flight.budget_bytes = 64 * MIB
    shown.handle(Searching(0, 0))
    return shown


def panel(display: Display) -> list[str]:
    """The lines of the panel without their bars, and without blanks at their ends."""
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(display.in_flight.panel())
    lines = console.export_text().split("\n")
    lines = [re.sub(r"\s*[━╸╺]*\s+(?=\d+/)", " | ", line).strip() for line in lines]
    return [line for line in lines if line]


def test_a_trial_that_runs_alone_is_described_above_its_bar(display: Display) -> None:
    display.handle(started(3))
    display.handle(stepped(3, 7, 2 * MIB))
    assert panel(display) == [
        "trial 3: rsLoRA rank 3, alpha 16, learning rate 1e-3, micro-batch 4; "
        "predicted peak 3.00 MiB of 64.0 MiB",
        "study | 0/24",
        "trial 3 | 7/50 loss 0.700, peak 2.00 MiB",
    ]


def test_trials_at_once_have_a_row_each_until_they_settle(
    display: Display, record_of: RecordOf
) -> None:
    for number in (1, 2, 3):
        display.handle(started(number))
    for number, step in ((1, 1), (3, 1), (2, 1), (1, 2), (3, 2)):
        display.handle(stepped(number, step))
    head = "3 trials at once; predicted peak of the largest alone 3.00 MiB of 64.0 MiB"
    assert panel(display) == [
        head,
        "study | 0/24",
        "trial 1 | 2/50 r=1 lr=1e-3, loss 0.200",
        "trial 2 | 1/50 r=2 lr=1e-3, loss 0.100",
        "trial 3 | 2/50 r=3 lr=1e-3, loss 0.200",
    ]
    display.handle(TrialSettled(record_of(spec(2), 2, outcome="pruned"), 1))
    display.handle(started(4))
    display.handle(stepped(1, 3))
    rows = panel(display)
    assert rows[0] == "3 trials at once; predicted peak of the largest alone 4.00 MiB of 64.0 MiB"
    assert rows[1].startswith("study | 1/24 best -, ")
    assert rows[2:] == [
        "trial 1 | 3/50 r=1 lr=1e-3, loss 0.300",
        "trial 3 | 2/50 r=3 lr=1e-3, loss 0.200",
        "trial 4 | 0/50 r=4 lr=1e-3",
    ]


def test_the_last_of_several_is_shown_as_one_alone(display: Display, record_of: RecordOf) -> None:
    for number in (1, 2):
        display.handle(started(number))
        display.handle(stepped(number, 5))
    display.handle(TrialSettled(record_of(spec(1), 1), 1))
    rows = panel(display)
    assert rows[0].startswith("trial 2: rsLoRA rank 2, alpha 16")
    assert rows[2:] == ["trial 2 | 5/50 loss 0.500"]
    display.handle(TrialSettled(record_of(spec(2), 2), 2))
    assert [row[:5] for row in panel(display)] == ["study"]


def test_more_trials_than_rows_are_counted_and_move_up(
    display: Display, record_of: RecordOf
) -> None:
    for number in range(1, MOST_ROWS + 4):
        display.handle(started(number))
    display.handle(stepped(MOST_ROWS + 1, 9))
    rows = panel(display)
    assert len(rows) == 2 + MOST_ROWS + 1
    assert rows[-1] == "and 3 more"
    assert not any(row.startswith(f"trial {MOST_ROWS + 1} ") for row in rows)
    display.handle(TrialSettled(record_of(spec(1), 1), 1))
    rows = panel(display)
    assert rows[-2].startswith(f"trial {MOST_ROWS + 1} ") and "| 9/50" in rows[-2]
    assert rows[-1] == "and 2 more"
    for number in (2, 3):
        display.handle(TrialSettled(record_of(spec(number), number), number))
    assert len(panel(display)) == 2 + MOST_ROWS and "more" not in panel(display)[-1]


def test_a_trial_that_starts_again_has_one_row_from_zero(display: Display) -> None:
    """As after a pack ran out of memory and its trials are taken up again."""
    for number in (1, 2):
        display.handle(started(number))
    display.handle(stepped(1, 9))
    display.handle(started(1))
    assert panel(display)[2:] == ["trial 2 | 0/50 r=2 lr=1e-3", "trial 1 | 0/50 r=1 lr=1e-3"]


def test_what_was_never_started_settles_too(display: Display, record_of: RecordOf) -> None:
    display.handle(TrialSettled(record_of(spec(5), 5, outcome="infeasible"), 0))
    display.handle(stepped(5, 1))
    assert len(panel(display)) == 1


def test_where_nobody_watches_only_settled_trials_are_told(record_of: RecordOf) -> None:
    out = io.StringIO()
    display = Display(StudyConfig(), Console(width=120, file=out))
    with display.in_flight.shown():
        for event in (
            Searching(0, 0), started(1), started(2), stepped(2, 1), stepped(1, 1),
            TrialSettled(record_of(spec(2), 2), 1), TrialSettled(record_of(spec(1), 1), 2),
        ):  # fmt: skip
            display.handle(event)
    assert [line.split()[0] for line in out.getvalue().splitlines()] == ["2", "1"]


def test_a_live_terminal_draws_the_panel_and_clears_it(
    display: Display, record_of: RecordOf
) -> None:
    with display.in_flight.shown() as live:
        display.handle(started(1))
        display.handle(started(2))
        live.refresh()  # type: ignore[attr-defined]
        display.handle(TrialSettled(record_of(spec(1), 1), 1))
    written = display.console.file.getvalue()  # type: ignore[attr-defined]
    assert "2 trials at once" in written and "trial 2: rsLoRA" not in written.split("\n")[-1]


def test_a_packed_trial_says_so_where_one_alone_has_peak_and_time(record_of: RecordOf) -> None:
    alone = record_of(SPEC, measured_peak_bytes=14 * MIB, train_seconds=4.25)
    packed = record_of(SPEC, engine="packed", pack_id="p", pack_size=8, pack_peak_bytes=30 * MIB)
    lines = [trial_line(record, StudyConfig()) for record in (alone, packed)]
    assert lines[0].endswith(" 14.0 MiB  4.2 s")
    assert lines[1].endswith(" packed x8")
    assert len(lines[0]) == len(lines[1]), "the columns stay aligned"
    assert "30.0 MiB" not in lines[1]
    pruned = replace(packed, outcome="pruned", error="why", pack_size=None)
    assert trial_line(pruned, StudyConfig()).split()[-3:] == ["pruned", "packed", "why"]
