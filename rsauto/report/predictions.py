"""How far the memory that was predicted is from the memory that was measured."""

from __future__ import annotations

from typing import Any

import pandas as pd

from rsauto.report.panel import BLUE, GREY, Layer, Panel
from rsauto.units import byte_unit, bytes_text

PREDICTED, MEASURED = "predicted_peak_bytes", "measured_peak_bytes"


def predictions_panel(trials: pd.DataFrame) -> Panel | None:
    """Every trial that was measured alone, beside the line on which prediction and truth agree."""
    rows = trials[trials[PREDICTED].notna() & trials[MEASURED].notna()]
    if rows.empty:
        return None
    predicted, measured = (rows[name].astype(float) for name in (PREDICTED, MEASURED))
    divisor, unit = byte_unit(float(max(predicted.max(), measured.max())))
    ends = tuple(float(end) / divisor for end in (predicted.min(), predicted.max()))
    shares = measured / predicted
    return Panel(
        key="predictions",
        title="What was predicted: measured against predicted peak memory",
        caption=f"{len(rows)} trials that ran alone: the measured peak is {shares.min():.1%} to "
        f"{shares.max():.1%} of the predicted one. A trial that met no batch of the longest rows "
        "needs less than predicted. Above the line, more was needed.",
        x_label=f"predicted peak ({unit})",
        y_label=f"measured peak ({unit})",
        layers=(
            Layer(name="as predicted", x=ends, y=ends, colour=GREY, dash="dash"),
            Layer(
                name="trials",
                x=tuple(float(n) / divisor for n in predicted),
                y=tuple(float(n) / divisor for n in measured),
                colour=BLUE,
                symbol="circle",
                opacity=0.9,
                hover=tuple(_hover(row) for _, row in rows.iterrows()),
            ),
        ),
    )


def _hover(row: pd.Series[Any]) -> str:
    """Lines about a trial, joined by newlines."""
    predicted, measured = int(row[PREDICTED]), int(row[MEASURED])
    return "\n".join(
        (
            f"trial {row['number']}, rank {row['rank']}, micro-batch {row['micro_batch_size']}",
            f"predicted {bytes_text(predicted)}",
            f"measured {bytes_text(measured)} ({measured / predicted - 1:+.1%})",
        )
    )
