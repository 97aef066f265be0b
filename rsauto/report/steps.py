"""What the recommendation costs in memory, and what the choices beside it cost and buy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from rsauto.report.kinds import kind_of, refit_text
from rsauto.report.standing import Standing
from rsauto.report.table import cost_bytes, is_refit
from rsauto.report.verdict import Verdict
from rsauto.units import (
    bytes_text,
    difference_text,
    objective_text,
    percent_text,
    rate_text,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The next choice along the Pareto front of objective against memory."""

    direction: Literal["up", "down"]
    """Towards more memory, or towards less."""
    setting: str | None
    """None where there is no such step."""
    sentence: str
    """'costs 13.5 MiB more memory and buys ...', without what is compared."""

    @property
    def title(self) -> str:
        if self.setting is None:
            return f"No step {self.direction}:"
        return f"One step {self.direction}: {self.setting}"


def steps(ranks: pd.DataFrame, verdict: Verdict) -> tuple[Step, ...]:
    """The neighbours of the recommended configuration, the one that needs less memory first.

    ``ranks`` is the table of ``rank_table``: every rank at its best configuration, a mean over its
    seeds. Up is what needs least memory of all that is better and fits, down the best of all that
    needs less memory. Nothing where no recommendation has a known need of memory.
    """
    chosen = verdict.standings.get("recommended")
    if chosen is None or chosen.need_bytes is None:
        return ()
    rows = ranks[ranks["objective"].notna() & ranks["fits"].fillna(True)]
    rows = rows.assign(cost=cost_bytes(rows))
    rows = rows[rows["cost"].notna()]
    better = _gains(rows, chosen, verdict) > 0
    above = rows[(rows["cost"] > chosen.need_bytes) & better]
    below = rows[rows["cost"] < chosen.need_bytes]
    return (
        _step("down", below, ["objective", "cost"], chosen, verdict)
        or Step(
            direction="down", setting=None, sentence="nothing that was tried needs less memory"
        ),
        _step("up", above, ["cost", "objective"], chosen, verdict)
        or Step(
            direction="up",
            setting=None,
            sentence="nothing that was tried and fits is better for more memory",
        ),
    )


def headline(ranks: pd.DataFrame, verdict: Verdict) -> tuple[str, ...]:
    """The verdict's sentences, with what was predicted and measured of memory after the first."""
    first, *rest = verdict.sentences
    memory = memory_sentence(ranks, verdict)
    return (first, *([] if memory is None else [memory]), *rest)


def memory_sentence(ranks: pd.DataFrame, verdict: Verdict) -> str | None:
    """What was predicted and what was measured of the recommended configuration; None where it is
    not known."""
    chosen = verdict.recommended
    if chosen is None or chosen.predicted_peak_bytes is None:
        return None
    predicted = chosen.predicted_peak_bytes
    text = f"Its peak memory is predicted to be {bytes_text(predicted)}"
    if chosen.micro_batch_size is not None:
        text += f" at micro-batch {chosen.micro_batch_size}"
    measured = chosen.measured_peak_bytes or _measured_of_its_rank(ranks, verdict)
    if measured is None:
        text += " and was not measured"
    else:
        text += f", and {bytes_text(measured)} were measured ({measured / predicted:.1%} of that)"
    if chosen.smallest_budget_bytes is not None:
        least = bytes_text(chosen.smallest_budget_bytes)
        text += f"; the smallest budget it can be trained in is {least}"
    return f"{text}."


def _measured_of_its_rank(ranks: pd.DataFrame, verdict: Verdict) -> int | None:
    """Of trials of the same rank that ran alone in the same micro-batches: what they need does not
    depend on learning rate or alpha."""
    chosen = verdict.recommended
    if chosen is None:
        return None
    alike = ranks[
        (ranks["rank"] == chosen.rank)
        & (ranks["kind"] == kind_of(chosen))
        & (ranks["refit"] == is_refit(chosen))
        & (ranks["predicted_peak_bytes"] == chosen.predicted_peak_bytes).fillna(False)
    ]
    peaks = alike["measured_peak_bytes"].dropna()
    return None if peaks.empty else int(peaks.iloc[0])


def _gains(rows: pd.DataFrame, chosen: Standing, verdict: Verdict) -> pd.Series[float]:
    """How much better each row is than what is recommended; positive is better."""
    values = rows["objective"].astype(float)
    return chosen.objective - values if verdict.minimize else values - chosen.objective


def _step(
    direction: Literal["up", "down"],
    rows: pd.DataFrame,
    order: list[str],
    chosen: Standing,
    verdict: Verdict,
) -> Step | None:
    """The first of the rows in that order, None of no rows."""
    if rows.empty:
        return None
    least_first = [name == "cost" or verdict.minimize for name in order]
    row = rows.sort_values(order, ascending=least_first, kind="stable").iloc[0]
    name = refit_text(str(row["kind"]), bool(row["refit"]))
    rate = rate_text(float(row["learning_rate"]))
    return Step(
        direction=direction,
        setting=f"rank {row['rank']} ({name}, alpha {row['alpha']}, learning rate {rate})",
        sentence=f"{_price(direction, row, chosen)} and {_worth(direction, row, chosen, verdict)}",
    )


def _price(direction: str, row: pd.Series[Any], chosen: Standing) -> str:
    """'saves 6.7 MiB of memory (20 %) and 24 % of the compute'."""
    need = chosen.need_bytes or 0
    memory = abs(int(row["cost"]) - need)
    is_up = direction == "up"
    text = f"costs {bytes_text(memory)} more" if is_up else f"saves {bytes_text(memory)} of"
    text += " memory"
    if need:
        text += f" ({percent_text(memory / need)})"
    if pd.isna(row["flops"]) or not chosen.record.flops:
        return text
    compute = float(row["flops"]) / chosen.record.flops - 1
    if abs(compute) < 0.005 or (compute > 0) != is_up:
        return text
    return f"{text} and {percent_text(abs(compute))} {'more' if is_up else 'of the'} compute"


def _worth(direction: str, row: pd.Series[Any], chosen: Standing, verdict: Verdict) -> str:
    """'buys 0.005 ± 0.027 of eval loss, which may be nothing'."""
    name = objective_text(verdict.objective)
    values = float(row["objective"]), chosen.objective
    gain = values[1] - values[0] if verdict.minimize else values[0] - values[1]
    seeds = int(row["num_seeds"])
    half_width = (
        None if verdict.noise is None else verdict.noise.half_width(seeds, chosen.num_seeds)
    )
    amount = difference_text(abs(gain), half_width)
    if direction == "up":
        text = f"buys {amount} of {name}"
    elif gain > 0:
        text = f"is even {amount} better in {name}"
    else:
        text = f"gives up {amount} of {name}"
    if half_width is None:
        return f"{text}, with nothing known about the noise"
    if abs(gain) <= half_width:
        text += ", which may be nothing"
    return f"{text} (it ran on one seed)" if seeds == 1 else text
