"""What every rank of studies/rslora-guide.yaml needs on a GPU, without a GPU and without weights.

    python studies/plan_rslora_guide.py [--out reports/rslora-guide/plan.md]

The model is gated, but its shape is public, and a plan needs nothing else. Every row is the exact
trace of one optimizer step with rows as long as `data.max_length`, plus the allowance and the CUDA
context that `rsauto study` adds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rsauto import study_file
from rsauto.config import StudyConfig
from rsauto.memory.kinds import Bits
from rsauto.memory.plan import Plan, plan
from rsauto.units import bytes_text

STUDY = Path(__file__).parent / "rslora-guide.yaml"


def plan_on(quant_bits: Bits | None, config: StudyConfig, ranks: tuple[int, ...]) -> Plan:
    """The plan of the study on a GPU, for rows of max_length tokens."""
    return plan(
        "llama-3.1-8b",
        ranks=ranks,
        batch_size=config.training.batch_size,
        micro_batch_size=1,
        max_length=config.data.max_length,
        target_modules=config.model.target_modules,
        optimizer=config.training.optimizer,
        quant_bits=quant_bits,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )


def table(config: StudyConfig, ranks: tuple[int, ...]) -> list[str]:
    """Rows of a Markdown table: a rank, and what it needs at micro-batch 1 for each base."""
    rows = [
        "| rank | trained parameters | 8 bit (the guide) | 4 bit | bfloat16 |",
        "|--:|--:|--:|--:|--:|",
    ]
    bases: tuple[Bits | None, ...] = (8, 4, None)
    plans = [plan_on(bits, config, ranks) for bits in bases]
    for rank in ranks:
        planned = [one.at(rank) for one in plans]
        needs = " | ".join(bytes_text(row.needed_bytes) for row in planned)
        parameters = f"{planned[0].prediction.num_trainable_params / 1e6:.1f} M"
        rows.append(f"| {rank} | {parameters} | {needs} |")
    return rows


def main() -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description="Plan the guide's study.")
    default = Path("reports/rslora-guide/plan.md")
    parser.add_argument("--out", type=Path, default=default, help="file to write")
    out: Path = parser.parse_args().out
    config = study_file.load(STUDY)
    lines = [
        "# What the guide's configuration needs",
        "",
        f"Llama 3.1 8B, all linear layers, {config.training.optimizer}, gradient checkpointing, "
        f"rows of {config.data.max_length} tokens, micro-batch 1 accumulated to "
        f"{config.training.batch_size}, float32 adapters. `memory_budget` needed on a GPU, with "
        "2 % allowance, CUDA context and workspaces; predicted, not measured. "
        "Made by `python studies/plan_rslora_guide.py`.",
        "",
        *table(config, config.search.ranks),
        "",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
