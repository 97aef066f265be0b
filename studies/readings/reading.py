"""What a reading is made of, and the page that is written of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from matplotlib.figure import Figure

from rsauto.intervals import t_quantile
from rsauto.rate_law import RateLaw, fit_sweeps
from rsauto.records import TrialRecord
from rsauto.report.table import Study

Verdict = Literal["reproduced", "partly", "not reproduced", "answered", "open"]
"""answered: there was a question, and no claim. open: too few seeds for the interval that the
criterion needs."""

Arms = Mapping[str, Study]
"""The study as its file has it under '', and each of its further presets by its name."""


@dataclass(frozen=True, kw_only=True)
class Table:
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [f"| {' | '.join(self.headers)} |", "|---" + "|--:" * (len(self.headers) - 1) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return f"{self.title}\n\n" + "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class Drawing:
    file: str
    alt: str
    figure: Figure


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The paper's claim beside what was measured."""

    claim: str
    verdict: Verdict
    measured: str
    """What was found, in a sentence or two with numbers: the summary's cell."""
    criterion: str
    """By what the verdict was decided, stated so that it could have fallen otherwise."""
    tables: Sequence[Table] = ()
    drawings: Sequence[Drawing] = ()
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Mean:
    """Over seeds, with the half width of its 95 % interval (None for a single seed)."""

    mean: float
    half_width: float | None
    num: int

    @property
    def low(self) -> float:
        """NaN, which no comparison holds for, where there is no interval."""
        return math.nan if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float:
        return math.nan if self.half_width is None else self.mean + self.half_width

    def text(self, digits: int = 3) -> str:
        if self.num == 0:
            return "-"
        if not math.isfinite(self.mean):
            return "not finite (a trial diverged)"
        if self.half_width is None:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.half_width:.{digits}f}"


def mean_of(values: Sequence[float]) -> Mean:
    """Student's interval. Without one for a single value, and NaN where one is not finite."""
    if not values or not all(map(math.isfinite, values)):
        return Mean(math.nan, None, len(values))
    if len(values) < 2:
        return Mean(values[0], None, 1)
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Mean(fmean(values), half, len(values))


def unless_open(verdict: Verdict, *means: Mean) -> Verdict:
    """The verdict, or open where it was decided by means of too few seeds.

    A single seed has no interval. That of two is so wide that it shows large effects, but that it
    shows none says nothing.
    """
    least = min(mean.num for mean in means)
    return "open" if least == 1 or (least < 3 and verdict == "not reproduced") else verdict


def final_loss(record: TrialRecord) -> float:
    """Validation loss after the last step; infinite where the trial diverged."""
    done = record.outcome == "complete" and record.eval_loss is not None
    return float(record.eval_loss or 0.0) if done else math.inf


def label(record: TrialRecord) -> str:
    """How gamma_r is made, as tables and legends have it."""
    if record.scaling_exponent is not None:
        power = record.scaling_exponent
        name = "alpha" if power == 0 else f"alpha r^{power:g}"
        return name if record.init_scale is None else f"{name}, A scaled"
    return {"lora": "LoRA", "rslora": "rsLoRA", "adalora": "AdaLoRA", "rsadalora": "rsAdaLoRA"}[
        record.method
    ]


Cells = Mapping[tuple[str, int], Sequence[TrialRecord]]
"""Records by label and rank, of several seeds."""


def by_rank(study: Study) -> Cells:
    """Every trial that ran, complete or diverged."""
    cells: dict[tuple[str, int], list[TrialRecord]] = defaultdict(list)
    for record in sorted(study.records, key=lambda r: (r.seed, r.number)):
        if record.outcome in ("complete", "diverged", "pruned"):
            cells[label(record), record.rank].append(record)
    return dict(sorted(cells.items()))


def labels_of(cells: Cells) -> list[str]:
    return list(dict.fromkeys(name for name, _ in cells))


def ranks_of(cells: Cells) -> list[int]:
    return sorted({rank for _, rank in cells})


def paired(after: Sequence[TrialRecord], before: Sequence[TrialRecord]) -> Mean:
    """Mean over common seeds of the one's final loss less the other's."""
    known = {record.seed: final_loss(record) for record in before}
    both = [final_loss(r) - known[r.seed] for r in after if r.seed in known]
    return mean_of(both)


def power_of_rank(points: Sequence[tuple[int, float]]) -> RateLaw | None:
    """Slope of log(value) over log(rank), least squares, with its 95 % interval."""
    return fit_sweeps([(rank, value) for rank, value in points if value > 0])


def power_text(law: RateLaw | None) -> str:
    if law is None:
        return "-"
    return f"{law.exponent:+.2f} ({law.low:+.2f} to {law.high:+.2f})"


def loss_table(cells: Cells, title: str) -> Table:
    ranks = ranks_of(cells)
    rows = [
        [name, *(_losses(cells.get((name, rank), ())) for rank in ranks)]
        for name in labels_of(cells)
    ]
    return Table(title=title, headers=["", *(f"rank {rank}" for rank in ranks)], rows=rows)


def _losses(records: Sequence[TrialRecord]) -> str:
    return mean_of([final_loss(r) for r in records]).text() if records else "-"


def page(title: str, question: str, reading: Reading, footer: str) -> str:
    """The study's README.md."""
    parts = [
        f"# {title}: {reading.verdict}\n",
        f"{question}\n",
        f"**The claim.** {reading.claim}\n",
        f"**Measured.** {reading.measured}\n",
        f"**Verdict: {reading.verdict}.** {reading.criterion}\n",
        *(f"![{drawing.alt}]({drawing.file})\n" for drawing in reading.drawings),
        *(table.markdown() for table in reading.tables),
        *(f"- {remark}" for remark in reading.remarks),
        "" if reading.remarks else None,
        footer,
    ]
    return "\n".join(part for part in parts if part is not None)
