"""What the paper-size presets need on a GPU at every rank, without a GPU and without weights.

    python studies/plan_papers.py [--out reports/paper-memory/README.md]

Each row is the exact trace of one optimizer step of a study's `--preset paper` with rows as long as
its context, at micro-batch 1 accumulated to its batch, plus the allowance, CUDA context and
workspaces that `rsauto study` adds. The presets differ in what memory depends on in four ways only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rsauto import study_file
from rsauto.atomic import write_text
from rsauto.memory.plan import Plan, plan
from rsauto.units import bytes_text

STUDIES = Path(__file__).parent
SHAPES = {"meta-llama/Llama-2-7b-hf": "llama-2-7b", "EleutherAI/gpt-j-6b": "gpt-j-6b"}
PLANNED = {
    "rank-sweep": "Llama 2 7B, all linear layers, AdamW (the main studies)",
    "attention-only": "Llama 2 7B, attention layers, AdamW (B.5)",
    "sgd-stability": "Llama 2 7B, all linear layers, SGD (B.1)",
    "other-optimizer": "GPT-J 6B, all linear layers, Adafactor (B.2)",
}


def plan_of(name: str) -> Plan:
    """The plan of a study's paper preset, its ranks included."""
    config = study_file.load(STUDIES / f"{name}.yaml", preset="paper")
    return plan(
        SHAPES[config.model.name],
        ranks=config.search.ranks,
        batch_size=config.training.batch_size,
        micro_batch_size=1,
        max_length=config.data.max_length,
        target_modules=config.model.target_modules,
        optimizer=config.training.optimizer,
        dtype="bfloat16",
        gradient_checkpointing=config.model.gradient_checkpointing,
        clip=config.training.max_grad_norm is not None,
    )


def table(plans: dict[str, Plan]) -> list[str]:
    """Rows of a Markdown table: a rank, and what it needs in each study."""
    ranks = [row.rank for row in next(iter(plans.values())).ranks]
    lines = ["| rank | trained parameters | " + " | ".join(PLANNED[name] for name in plans) + " |"]
    lines.append("|--:" * (2 + len(plans)) + "|")
    for rank in ranks:
        rows = [one.at(rank) for one in plans.values()]
        parameters = f"{rows[0].prediction.num_trainable_params / 1e6:.1f} M"
        needs = " | ".join(bytes_text(row.needed_bytes) for row in rows)
        lines.append(f"| {rank} | {parameters} | {needs} |")
    return lines


def main() -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("reports/paper-memory/README.md"))
    out: Path = parser.parse_args().out
    lines = [
        "# What the papers' own sizes need",
        "",
        "Memory budget that `--preset paper` needs at every rank of arXiv:2312.03732: bfloat16 "
        "base, float32 adapters and optimizer states, gradient checkpointing, rows of 512 tokens, "
        "micro-batch 1 accumulated to 32; 2 % allowance, CUDA context and workspaces included. "
        "Predicted without a GPU, not measured. Trained parameters are those of the first column. "
        "Made by `python studies/plan_papers.py`.",
        "",
        *table({name: plan_of(name) for name in PLANNED}),
        "",
        "A study leaves out the ranks that do not fit its `memory_budget`, and says so.",
        "",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
