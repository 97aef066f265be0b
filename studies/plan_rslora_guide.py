"""What every rank of studies/rslora-guide.yaml needs on a GPU, without a GPU and without weights.

    python studies/plan_rslora_guide.py [--out reports/rslora-guide/plan.md]

The model is gated, but its shape is public: the configuration below is that of Llama 3.1 8B, and a
plan needs nothing else. Every row is the exact trace of one optimizer step with rows as long as
`data.max_length`, plus the allowance and the CUDA context that `rsauto study` adds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig

from rsauto import study_file
from rsauto.config import StudyConfig
from rsauto.memory.plan import MemoryPlanner
from rsauto.report.units import bytes_text

STUDY = Path(__file__).parent / "rslora-guide.yaml"

LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)


def planner_of(config: StudyConfig, quant_bits: int | None) -> MemoryPlanner:
    """The planner that `rsauto study` would use on a GPU, for rows of max_length tokens."""
    assert quant_bits in (None, 4, 8)
    return MemoryPlanner(
        model_config=LLAMA_3_1_8B,
        dtype=torch.bfloat16,
        quant_bits=quant_bits,
        gradient_checkpointing=config.model.gradient_checkpointing,
        train_length=config.data.max_length,
        eval_length=config.data.max_length,
        device_type="cuda",
    )


def table(config: StudyConfig, ranks: tuple[int, ...]) -> list[str]:
    """Rows of a Markdown table: a rank, and what it needs at micro-batch 1 for each base."""
    rows = [
        "| rank | trained parameters | 8 bit (the guide) | 4 bit | bfloat16 |",
        "|--:|--:|--:|--:|--:|",
    ]
    planners = {bits: planner_of(config, bits) for bits in (8, 4, None)}
    for rank in ranks:
        needs = []
        for planner in planners.values():
            prediction = planner.predict(
                rank,
                target_modules=config.model.target_modules,
                optimizer=config.training.optimizer,
                batch_size=config.training.batch_size,
                micro_batch_size=1,
            )
            needs.append(bytes_text(planner.needed_bytes(prediction)))
        parameters = f"{prediction.num_trainable_params / 1e6:.1f} M"
        rows.append(f"| {rank} | {parameters} | {' | '.join(needs)} |")
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
