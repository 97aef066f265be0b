"""Plans as pandas data frames, and what a study over a plan's ranks would take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd

from rsauto.memory.kinds import Bits
from rsauto.memory.planner import MicroBatch

if TYPE_CHECKING:
    from rsauto.memory.plan import Plan

_COLUMNS = (
    "rank", "micro_batch_size", "peak_bytes", "reserved_bytes", "needed_bytes", "fits",
    "num_trainable_params", "adapter_bytes", "flops_per_token", "phase", "operation", "estimated",
)  # fmt: skip


def plan_frame(plan: Plan) -> pd.DataFrame:
    """One row a rank, indexed by it; `weights_bytes` and the like break the peak down."""
    rows = []
    for row in plan.to_json()["ranks"]:
        parts = {f"{tag}_bytes": num_bytes for tag, num_bytes in row["breakdown"].items()}
        rows.append({name: row[name] for name in _COLUMNS} | parts)
    return pd.DataFrame(rows).set_index("rank")


def feasible_frame(
    plan: Plan, combinations: Iterable[tuple[Bits | None, bool, int, MicroBatch, int]]
) -> pd.DataFrame:
    """One row for every (quant_bits, gradient_checkpointing, max_length, micro-batch, rank)."""
    rows = []
    for bits, checkpointing, length, micro, rank in combinations:
        kind = replace(plan.planner.kind, quant_bits=bits, gradient_checkpointing=checkpointing)
        planner = plan.planner.changed(kind, length)
        found = planner.largest_or_smallest(
            rank,
            memory_budget_bytes=plan.memory_budget_bytes,
            batch_size=plan.batch_size,
            micro_batch_size=micro,
        )
        needed = planner.needed_bytes(found)
        budget = plan.memory_budget_bytes
        rows.append(
            {
                "rank": rank,
                "micro_batch_size": found.micro_batch_size,
                "max_length": length,
                "gradient_checkpointing": checkpointing,
                "quant_bits": bits,
                "peak_bytes": found.peak_bytes,
                "reserved_bytes": found.reserved_bytes,
                "needed_bytes": needed,
                "fits": None if budget is None else needed <= budget,
            }
        )
    return pd.DataFrame(rows).astype({"quant_bits": "Int64"})
