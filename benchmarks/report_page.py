"""How soon the report of a large study can be used, in headless Chromium.

    python benchmarks/report_page.py [--quick] [--json] [--out reports/benchmarks/report_page.json]

A row is a study of so many invented trials: its page is written from the records and opened from
disk in a new browser, several times; times are medians, in milliseconds.

write_ms      from the records to all files of the report, in Python, figures for report.md included
table_ms      from navigation until the table can be sorted and filtered
ready_ms      from navigation until all scripts have run and what is near the window is drawn
cpu_ms        processor time that the page itself took until then, whatever else the machine did
figure_ms     from scrolling to the first figure until it is drawn
show_ms       from scrolling to the table until it is laid out
sort_ms, filter_ms, toggle_ms
              until the page is laid out again after a click on a column's head, a word in the
              filter, and a figure's trace hidden
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from browser import find_chromium, opened

from rsauto import study_file
from rsauto.atomic import write_text
from rsauto.config import SearchConfig, StudyConfig, TrainingConfig
from rsauto.environment import describe_environment
from rsauto.records import EvalPoint, Outcome, TrialRecord, dump_line
from rsauto.report.page import write_report
from rsauto.scaling import gamma_r

MIB = 2**20
RANKS = (2, 4, 8, 16, 32, 64, 128, 256)
READY = "document.documentElement.dataset.ready"

# The page is laid out before the clock is read again, or a table's size would not count.
CLOCK = """(async () => {{
    const start = performance.now();
    await {};
    document.body.offsetHeight;
    return performance.now() - start;
}})()"""
FIGURE = """(async () => {
    document.getElementById('plot-memory').scrollIntoView();
    while (!document.querySelector('#plot-memory .main-svg')) {
        await new Promise((next) => setTimeout(next, 5));
    }
})()"""
SHOW = "document.getElementById('trials').scrollIntoView()"
SORT = "document.querySelector('#trials th[data-name=eval_loss] button').click()"
FILTER = """(() => {
    const form = document.getElementById('filter');
    form.elements.words.value = 'rank>=32 complete';
    form.dispatchEvent(new Event('input', { bubbles: true }));
})()"""
TOGGLE = (
    """Plotly.restyle(document.getElementById('plot-memory'), { visible: 'legendonly' }, [1])"""
)

_ACTIONS = (("figure_ms", FIGURE), ("toggle_ms", TOGGLE), ("show_ms", SHOW), ("sort_ms", SORT),
            ("filter_ms", FILTER))  # fmt: skip


def invented(count: int, seed: int = 0) -> list[TrialRecord]:
    """Trials over eight ranks and two methods, most of them pruned or beaten, each fifth packed."""
    draw = random.Random(seed)
    return [_trial(number, draw) for number in range(count)]


def write_study(folder: Path, count: int) -> Path:
    """A study folder with ``count`` invented trials."""
    folder.mkdir(parents=True, exist_ok=True)
    config = StudyConfig(name=f"trials-{count}", memory_budget=48 * MIB,
                         training=TrainingConfig(steps=100),
                         search=SearchConfig(trials=count))  # fmt: skip
    write_text(folder / "study.yaml", study_file.dump(config))
    lines = [dump_line(record) + "\n" for record in invented(count)]
    write_text(folder / "trials.jsonl", "".join(lines))
    return folder


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """The row of a study folder."""
    program = find_chromium()
    if program is None:
        raise SystemExit("no Chromium was found: install chromium and try again")
    start = time.perf_counter()
    verdict = write_report(folder)
    row: dict[str, Any] = {
        "trials": verdict.num_trials,
        "page_bytes": (folder / "report.html").stat().st_size,
        "write_ms": round(1e3 * (time.perf_counter() - start)),
    }
    times = [_times(program, folder / "report.html") for _ in range(rounds)]
    medians = {name: round(statistics.median(one[name] for one in times)) for name in times[0]}
    return row | medians


def _times(program: str, page: Path) -> dict[str, float]:
    with opened(program) as tab:
        tab.resize(1280, 900)
        before = tab.cpu_seconds()
        tab.open(page, READY)
        marks = "performance.getEntriesByType('mark').map((mark) => [mark.name, mark.startTime])"
        found = dict(tab.run(marks))
        times = {
            "table_ms": found["table ready"],
            "ready_ms": found["figures ready"],
            "cpu_ms": 1e3 * (tab.cpu_seconds() - before),
        }
        for name, script in _ACTIONS:
            times[name] = tab.run(CLOCK.format(script))
        if tab.complaints():
            raise SystemExit(f"the page complains: {tab.complaints()}")
    return times


def _trial(number: int, draw: random.Random) -> TrialRecord:
    rank = draw.choice(RANKS)
    method = "lora" if number % 7 == 3 else "rslora"
    best = 2e-3 if method == "lora" else 2.4e-3 * (rank / 8) ** -0.25
    octaves = draw.uniform(-2.5, 2.5)
    loss = 1.215 + 0.22 / rank**0.62 + 0.03 * octaves**2 + draw.gauss(0, 0.004)
    outcome: Outcome = "complete"
    if rank == 256 and number % 3 == 0:
        outcome = "infeasible"
    elif loss > 1.40:
        outcome = "pruned"
    share = {"complete": 1.0, "pruned": 0.5}.get(outcome)
    is_packed = number % 5 == 0
    alpha = draw.choice((8, 16, 32))
    peak = int((13.5 + 0.123 * rank) * MIB)
    done = share is not None
    return TrialRecord(
        number=number,
        outcome=outcome,
        role="search",
        method=method,
        engine="packed" if is_packed else "peft",
        rank=rank,
        r_max=rank,
        alpha=alpha,
        scaling_rule=method,
        gamma_r=gamma_r(method, alpha, rank),
        target_modules="all-linear",
        learning_rate=float(f"{best * 2**octaves:.3g}"),
        lr_ratio=draw.choice((1.0, 4.0)),
        optimizer="adamw",
        schedule="linear",
        batch_size=16,
        micro_batch_size=16,
        max_length=128,
        seed=number % 3,
        steps=None if share is None else round(100 * share),
        tokens=None if share is None else round(64_000 * share),
        fidelity=share,
        eval_loss=loss if done else None,
        perplexity=math.exp(loss) if done else None,
        curve=_curve(loss, share, rank) if share is not None else (),
        num_trainable_params=4608 * rank,
        adapter_bytes=4 * 4608 * rank,
        flops=None if share is None else share * (1.1e12 + 3.2e9 * rank),
        smallest_budget_bytes=peak,
        predicted_peak_bytes=peak,
        measured_peak_bytes=None if is_packed or not done else int(peak * draw.uniform(0.97, 1.0)),
        train_seconds=None if is_packed or share is None else share * (8.0 + 0.02 * rank),
        memory_budget_bytes=48 * MIB,
        worker=f"worker-{number % 8}",
        started_at="2026-01-05T10:00:00Z",
    )


def _curve(loss: float, share: float, rank: int) -> tuple[EvalPoint, ...]:
    shares = [n / 8 for n in range(1, 9) if n / 8 <= share]
    return tuple(
        EvalPoint(
            step=round(100 * done),
            train_loss=loss + math.exp(-4 * done),
            eval_loss=loss + math.exp(-4 * done) - math.exp(-4 * share),
            grad_norm=0.4 + 0.2 / (1 + done) + 0.01 * math.log2(rank),
        )
        for done in shares
    )


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    return "\n".join(", ".join(f"{name} {value}" for name, value in row.items()) for row in rows)


def main(words: Sequence[str] | None = None) -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1 000 trials, opened once")
    parser.add_argument("--json", action="store_true", help="rows as one JSON object")
    parser.add_argument("--out", type=Path, default=None, help="file to write the rows to")
    arguments = parser.parse_args(words)
    counts, rounds = ((1000,), 1) if arguments.quick else ((30, 300, 1000), 5)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            found.append(measure(write_study(Path(folder) / str(count), count), rounds))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    result = {
        "rows": found,
        "environment": describe_environment(torch.device("cpu")),
        "command": " ".join(["python", *sys.argv]),
    }
    print(json.dumps(result) if arguments.json else summary(found))
    out = arguments.out or (
        None if arguments.quick else Path("reports/benchmarks/report_page.json")
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
