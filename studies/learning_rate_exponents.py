"""How the best learning rate moves with rank: exponents fitted from sweeps on the embedded task.

    python studies/learning_rate_exponents.py            about half an hour on one idle core
    python studies/learning_rate_exponents.py --quick    AdamW, 24 steps, no files, a minute
    python studies/learning_rate_exponents.py --table    table and figure of the sweeps so far

Three multipliers on B A x (alpha/sqrt(r), alpha/r, alpha) under AdamW and under SGD. A sweep is the
trials of one multiplier, optimizer, rank and seed over learning rates sqrt(2) apart. It begins a
factor of 2 to both sides of where the prior expects the best (seeds after the first: where the
first had it), and walks on until the lowest loss has been tried on both sides. Its best rate is the
vertex of the parabola through those three; the exponent is the slope of log2(best rate) over
log2(rank), all seeds together, and its 95 % interval that of a slope.

Every trial is appended to reports/learning-rate-exponents/sweeps.jsonl as it ends, and a run goes
on from there. table.json and rate-against-rank.svg are made of that file alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rate_sweeps import (
    ANCHOR,
    MAX_GRAD_NORM,
    RULES,
    Lab,
    Row,
    RuleName,
    Sweep,
    SweepKey,
    is_complete,
    rate_of,
    read_rows,
    sweep_all,
    sweeps_of,
)

from rsauto.atomic import write_text
from rsauto.environment import describe_environment
from rsauto.packing.optimizer import PackedOptimizer
from rsauto.rate_law import RateLaw, best_rate, fit_sweeps

OUT = Path(__file__).parents[1] / "reports" / "learning-rate-exponents"
SEEDS = (0, 1, 2)
OPTIMIZERS: tuple[PackedOptimizer, ...] = ("adamw", "sgd")
STAGES: tuple[tuple[int, ...], ...] = ((ANCHOR,), (2, 128), (4, 64), (8, 32))
"""Ranks that are swept together, the ends early: they say most of a slope."""
DIVERGED_LOSS = 12.0
"""Stands for the loss of a trial that diverged, above the 10.7 of the untrained adapter."""

NAMES: Mapping[RuleName, str] = {"rslora": "alpha/√r", "lora": "alpha/r", "constant": "alpha"}
TITLES: Mapping[PackedOptimizer, str] = {"adamw": "AdamW", "sgd": "SGD"}
COLOURS: Mapping[RuleName, str] = {"rslora": "#0072B2", "lora": "#D55E00", "constant": "#009E73"}
MARKERS = "os^Dv"


@dataclass(frozen=True)
class Finding:
    """What was found for one multiplier and optimizer."""

    optimizer: PackedOptimizer
    rule: RuleName
    law: RateLaw | None
    """None with fewer than three sweeps, or at one rank."""
    best: Mapping[int, Mapping[int, float]]
    """Rank to seed to the best learning rate."""

    @property
    def prior(self) -> float:
        return RULES[self.rule].prior(self.optimizer) + 0.0  # no -0.0

    @property
    def means(self) -> dict[int, float]:
        """Rank to the geometric mean of the best rates over seeds."""
        return {r: statistics.geometric_mean(seeds.values()) for r, seeds in self.best.items()}


def best_of(sweep: Sweep) -> float | None:
    """None while the lowest has not been tried on both sides."""
    if not is_complete(sweep):
        return None
    points = [
        (rate_of(k), DIVERGED_LOSS if math.isinf(loss) else loss) for k, loss in sweep.items()
    ]
    return best_rate(points)


def findings(rows: Sequence[Row]) -> list[Finding]:
    """One for each optimizer and multiplier; the sweep at rank ANCHOR counts for all three."""
    sweeps = sweeps_of(rows)
    trained = sorted({(key.rank, key.seed) for key in sweeps})
    found = []
    for optimizer in OPTIMIZERS:
        for rule in RULES:
            best: dict[int, dict[int, float]] = defaultdict(dict)
            for rank, seed in trained:
                sweep = sweeps.get(SweepKey(optimizer, rule, rank, seed).trained_as)
                rate = None if sweep is None else best_of(sweep)
                if rate is not None:
                    best[rank][seed] = rate
            pairs = [(rank, rate) for rank, seeds in best.items() for rate in seeds.values()]
            found.append(Finding(optimizer, rule, fit_sweeps(pairs), dict(best)))
    return found


def verdict(finding: Finding) -> str:
    if finding.law is None:
        return "too few sweeps"
    return "no" if finding.law.contradicts(finding.prior) else "yes"


def table(found: Sequence[Finding]) -> str:
    """Exponents and best rates as Markdown."""
    ranks = sorted({rank for finding in found for rank in finding.best})
    text = "| optimizer | multiplier | prior | fitted | 95 % interval | sweeps | prior inside |\n"
    text += "|---|---|--:|--:|---|--:|---|\n"
    for finding in found:
        law = finding.law
        cells = ("-", "-", "-")
        if law is not None:
            interval = f"{law.low:+.2f} to {law.high:+.2f}"
            cells = (f"{law.exponent:+.2f}", interval, str(law.num_trials))
        text += f"| {_name(finding)} | {finding.prior:+.2f} | {' | '.join(cells)} "
        text += f"| {verdict(finding)} |\n"
    text += "\n| best rate (geometric mean over seeds) | "
    text += " | ".join(f"rank {rank}" for rank in ranks) + " |\n"
    text += "|---|" + "--:|" * len(ranks) + "\n"
    for finding in found:
        means = finding.means
        rates = [f"{means[rank]:.2e}" if rank in means else "-" for rank in ranks]
        text += f"| {_name(finding).replace(' | ', ', ')} | {' | '.join(rates)} |\n"
    return text


def _name(finding: Finding) -> str:
    return f"{TITLES[finding.optimizer]} | {NAMES[finding.rule]}"


def as_json(finding: Finding) -> dict[str, Any]:
    law = finding.law
    return {
        "optimizer": finding.optimizer,
        "max_grad_norm": MAX_GRAD_NORM[finding.optimizer],
        "rule": finding.rule,
        "alpha": RULES[finding.rule].alpha,
        "prior": finding.prior,
        "fit": None if law is None else {**asdict(law), "low": law.low, "high": law.high},
        "prior_inside": None if law is None else not law.contradicts(finding.prior),
        "best_rates": finding.best,
    }


def draw(found: Sequence[Finding]) -> str:
    """Best rate against rank, a panel for each optimizer and multiplier, as SVG."""
    mpl.rcParams["svg.hashsalt"] = "rate-against-rank"
    figure = Figure(figsize=(9, 6), layout="constrained")
    grid = figure.subplots(len(OPTIMIZERS), len(RULES), sharex=True, sharey="row", squeeze=False)
    for finding, axis in zip(found, grid.flat, strict=True):
        _draw_panel(axis, finding)
    for row in grid:
        row[0].set_ylabel("best learning rate")
    for axis in grid[-1]:
        axis.set_xlabel("rank")
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _draw_panel(axis: Axes, finding: Finding) -> None:
    ranks = sorted(finding.best)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_title(f"{TITLES[finding.optimizer]}, {NAMES[finding.rule]}")
    axis.grid(alpha=0.3)
    seeds = sorted({seed for rates in finding.best.values() for seed in rates})
    for seed, marker in zip(seeds, MARKERS, strict=False):
        points = [(rank, finding.best[rank][seed]) for rank in ranks if seed in finding.best[rank]]
        colour = COLOURS[finding.rule]
        axis.plot(
            *zip(*points, strict=True), marker, color=colour, mfc="none", label=f"seed {seed}"
        )
    if finding.law is None:
        return
    pairs = [(rank, rate) for rank, rates in finding.best.items() for rate in rates.values()]
    rank = statistics.geometric_mean(rank for rank, _ in pairs)
    rate = statistics.geometric_mean(rate for _, rate in pairs)
    lines = (("fit", "-", finding.law.exponent), ("prior", "--", finding.prior))
    for name, style, exponent in lines:
        ends = [rate * (end / rank) ** exponent for end in (ranks[0], ranks[-1])]
        colour = "black" if name == "fit" else "#777777"
        label = f"{name} {exponent:+.2f}"
        axis.plot([ranks[0], ranks[-1]], ends, style, color=colour, lw=1.2, label=label)
    axis.legend(fontsize=7)
    axis.set_xticks(ranks, [str(rank) for rank in ranks])


def write(rows: Sequence[Row]) -> None:
    """table.json and the figure."""
    found = findings(rows)
    command = "python studies/learning_rate_exponents.py"
    whole = {
        "command": command,
        "trials": len(rows),
        "seconds": round(sum(row.seconds for row in rows)),
        "environment": describe_environment(torch.device("cpu")),
        "findings": [as_json(finding) for finding in found],
    }
    write_text(OUT / "table.json", json.dumps(whole, indent=1) + "\n")
    write_text(OUT / "rate-against-rank.svg", draw(found))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", choices=OPTIMIZERS, help="two can run side by side")
    chosen = parser.parse_args()
    file = OUT / "sweeps.jsonl"
    if chosen.quick:
        stages = ((ANCHOR,), (4, 64))
        rows = sweep_all(Lab(steps=24).train, stages, seeds=(0,), optimizers=("adamw",), file=None)
        print(table(findings(rows)))
        return
    OUT.mkdir(parents=True, exist_ok=True)
    if not chosen.table:
        optimizers = (chosen.only,) if chosen.only else OPTIMIZERS
        sweep_all(Lab().train, STAGES, seeds=SEEDS, optimizers=optimizers, file=file)
    rows = read_rows(file)
    write(rows)
    print(table(findings(rows)))


if __name__ == "__main__":
    main()
