"""What a study found, made from its records alone: neither torch nor Optuna is needed.

    table     trials.jsonl as a pandas table
    noise     repeated seeds: means, pooled deviation, intervals
    pareto    the Pareto front, and which rank to take under a memory budget
    standing  a configuration over its seeds, and its gain over another
    verdict   default, tuned default, best and recommended, with the gain and its interval
    ranks     what each rank costs and what it buys
    rates     how learning rate moves with rank: the prior law against the fitted one
    notes     where tokens went, how trials ended
    page      report.html, report.md, tradeoff.csv and .parquet (imports plotly and matplotlib)

`page` is imported by name, since drawing takes a second to load.
"""

from __future__ import annotations

from rsauto.report.noise import Noise, configurations, seed_noise
from rsauto.report.pareto import pareto, select_rank
from rsauto.report.ranks import rank_table
from rsauto.report.standing import Gain, Standing
from rsauto.report.table import Study, load_study, read_records, table
from rsauto.report.verdict import TooLarge, Verdict, judge

__all__ = [
    "Gain",
    "Noise",
    "Standing",
    "Study",
    "TooLarge",
    "Verdict",
    "configurations",
    "judge",
    "load_study",
    "pareto",
    "rank_table",
    "read_records",
    "seed_noise",
    "select_rank",
    "table",
]
