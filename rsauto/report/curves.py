"""How the loss fell in each trial."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rsauto.records import TrialRecord
from rsauto.report.panel import RANK_COLOURS, Layer, Panel
from rsauto.report.table import is_refit
from rsauto.units import method_text


def curves_panel(records: Sequence[TrialRecord]) -> Panel | None:
    """Validation loss over the steps: solid where the trial finished, dotted where it did not."""
    kinds = sorted({(r.rank, r.method, is_refit(r)) for r in records})
    layers = []
    named: set[tuple[int, str, bool]] = set()
    for record in sorted(records, key=lambda r: (r.rank, r.method, r.number)):
        points = [p for p in record.curve if math.isfinite(p.eval_loss)]
        if not points:
            continue
        kind = (record.rank, record.method, is_refit(record))
        label = f"{method_text(record.method, is_refit=is_refit(record))} {record.rank}"
        layers.append(
            Layer(
                name=label,
                x=tuple(float(p.step) for p in points),
                y=tuple(p.eval_loss for p in points),
                colour=RANK_COLOURS[kinds.index(kind) % len(RANK_COLOURS)],
                symbol="circle",
                size=4.0,
                dash="solid" if record.outcome == "complete" else "dot",
                opacity=0.8,
                hover=tuple(f"trial {record.number}, {label}, {record.outcome}" for _ in points),
                in_legend=kind not in named,
            )
        )
        named.add(kind)
    if not layers:
        return None
    return Panel(
        key="curves",
        title="Loss curves",
        caption="Validation loss at every evaluation; trials that were stopped are dotted.",
        x_label="step",
        y_label="eval loss",
        layers=tuple(layers),
    )
