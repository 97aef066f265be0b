"""Predictions beside memory that others measured on GPUs and published.

    python studies/published_memory.py [--out reports/published-memory/table.md]

Needs no GPU and no weights; about a minute. Two sources:

- IBM's fms-acceleration, A100 80 GB, `scripts/benchmarks/refs/a100_80gb.csv` at commit 876e2ed of
  github.com/foundation-model-stack/fms-acceleration: Mistral 7B, LoRA and QLoRA of rank 16 on the
  attention's projections, dropout 0.1, gradient checkpointing, flash-attn, sequences of 4096
  tokens; `torch.cuda.max_memory_allocated`.
- PEFT's method comparison, L40S, `method_comparison/MetaMathQA/results` at commit 5d602fd of
  github.com/huggingface/peft: Llama 3.2 3B, batches of 4, no checkpointing; the most that was
  reserved. The length of the longest batch is not published. It is the one number fitted here, in
  steps of 8 to the first row; the others then are predictions.

What differs from today's libraries, or from `rsauto study`, is written out below: adapted layers
are PEFT's own, the loss of transformers 4.48 copies the logits once more and runs inside of the
model's forward, and PEFT's loop holds on to the outputs of a step until the next one has its own.
Everything else is traced with what is installed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rsauto.atomic import write_text
from rsauto.memory.allocator import reserved_bytes
from rsauto.memory.kinds import StepKind, StepSize
from rsauto.memory.methods import METHODS
from rsauto.memory.presets import model_preset
from rsauto.memory.profile import GRANULE_BYTES, StepProfile
from rsauto.memory.profiles import Profiles
from rsauto.memory.shape import model_shape

GIB = 2**30
CUBLAS_BYTES = 2 * 8_519_680
"""Workspaces of an A100 in the forward and the backward thread; inside max_memory_allocated."""

MISTRAL = {**model_preset("mistral-7b"), "vocab_size": 32000}
LONGEST = 680
"""Tokens; fitted."""


@dataclass(frozen=True)
class Published:
    """A measurement that others published."""

    name: str
    model: Any
    rank: int
    batch_size: int
    length: int
    measured_bytes: float
    is_reserved: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
A100: dict[str, Any] = {
    "method": "lora_4_48",
    "target_modules": ATTENTION,
    "lora_dropout": 0.1,
    "gradient_checkpointing": True,
    "use_reentrant": True,
    "attn_implementation": "flash_attention_2",
    "optimizer": "adamw_foreach",
    "padded": False,
}
QLORA = A100 | {"quant_bits": 4, "autocast": "bfloat16"}
QLORA_NORMS = QLORA | {"method": "lora_4_48_norms_in_float32"}
L40S: dict[str, Any] = {
    "method": "lora_keeping_outputs",
    "target_modules": ("q_proj", "v_proj"),
    "optimizer": "adamw_foreach",
}
MLP = {"target_modules": ("gate_proj", "up_proj", "down_proj")}

ROWS = (
    Published("A100, LoRA, batch 4", MISTRAL, 16, 4, 4096, 24.8706 * GIB, settings=A100),
    Published("A100, LoRA, batch 8", MISTRAL, 16, 8, 4096, 36.0821 * GIB, settings=A100),
    Published("A100, QLoRA, batch 4", MISTRAL, 16, 4, 4096, 15.2493 * GIB, settings=QLORA),
    Published("A100, QLoRA, batch 8", MISTRAL, 16, 8, 4096, 26.4609 * GIB, settings=QLORA),
    Published("A100, QLoRA, float32 norms, batch 4", MISTRAL, 16, 4, 4096, 19.2498 * GIB,
              settings=QLORA_NORMS),
    Published("A100, QLoRA, float32 norms, batch 8", MISTRAL, 16, 8, 4096, 34.4614 * GIB,
              settings=QLORA_NORMS),
    Published("L40S, LoRA r 32", "llama-3.2-3b", 32, 4, LONGEST, 22.293e9, True, L40S),
    Published("L40S, LoRA r 64", "llama-3.2-3b", 64, 4, LONGEST, 22.553e9, True, L40S),
    Published("L40S, LoRA MLP r 10", "llama-3.2-3b", 10, 4, LONGEST, 24.698e9, True, L40S | MLP),
    Published("L40S, DoRA r 32", "llama-3.2-3b", 32, 4, LONGEST, 24.532e9, True,
              L40S | {"method": "dora_keeping_outputs"}),
    Published("L40S, AdaLoRA r 64", "llama-3.2-3b", 64, 4, LONGEST, 22.781e9, True,
              L40S | {"method": "peft_adalora_keeping_outputs"}),
)  # fmt: skip


def loss_of_4_48(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """transformers 4.48: logits in float32, then without the last position, which copies them.

    It ran inside of the model's forward, which holds on to the last hidden states meanwhile.
    """
    config: Any = model.config
    hidden_states = torch.empty(*batch["labels"].shape, config.hidden_size, dtype=torch.bfloat16)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    outputs = model(**inputs)
    logits = outputs.logits.float()
    shifted = logits[..., :-1, :].contiguous()
    labels = batch["labels"][..., 1:].contiguous()
    loss = F.cross_entropy(shifted.view(-1, shifted.shape[-1]), labels.view(-1))
    del hidden_states
    return loss


def loss_keeping_outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """As a loop has it whose variable keeps the outputs until the next forward pass has ended."""
    config: Any = model.config
    logits_before = torch.empty(*batch["labels"].shape, config.vocab_size, dtype=torch.bfloat16)
    model.kept_outputs = outputs = model(**batch)
    del logits_before
    loss: Tensor = outputs.loss
    return loss


def adapt_with_norms_in_float32(model: PreTrainedModel, kind: StepKind, rank: int) -> PeftModel:
    """As PEFT's prepare_model_for_kbit_training leaves them."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    return STOCK.adapt(model, kind, rank)


STOCK = replace(METHODS["lora"], adapt=partial(METHODS["lora"].adapt, fused=False))
METHODS["lora_4_48"] = replace(STOCK, loss=loss_of_4_48)
METHODS["lora_4_48_norms_in_float32"] = replace(
    METHODS["lora_4_48"], adapt=adapt_with_norms_in_float32
)
for name, method in (("lora", STOCK), *((n, METHODS[n]) for n in ("dora", "peft_adalora"))):
    METHODS[f"{name}_keeping_outputs"] = replace(method, loss=loss_keeping_outputs)


def predicted_bytes(row: Published, profiles: Profiles) -> int:
    """What the row's number should have been."""
    shape = model_shape(row.model, task="CAUSAL_LM")
    kind = StepKind(model_config=shape.config_json, dtype="bfloat16", **row.settings)
    size = StepSize(row.rank, row.batch_size, row.length, 0)
    profile = profiles.of(kind, size)
    assert isinstance(profile, StepProfile)
    sizes = profile.sizes(size, GRANULE_BYTES["cuda"])
    if not row.is_reserved:
        return int(sizes.cumsum().max()) + CUBLAS_BYTES
    # Without a limit nothing makes the allocator give back what it holds.
    return reserved_bytes(list(zip(profile.storages.tolist(), sizes.tolist(), strict=True)))


def table() -> list[str]:
    """Rows of a Markdown table."""
    profiles = Profiles()
    lines = ["| row | predicted | measured | error |", "|---|--:|--:|--:|"]
    for row in ROWS:
        predicted = predicted_bytes(row, profiles)
        lines.append(
            f"| {row.name} | {predicted / GIB:.3f} GiB | {row.measured_bytes / GIB:.3f} GiB "
            f"| {predicted / row.measured_bytes - 1:+.2%} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description="Predictions beside published measurements.")
    default = Path("reports/published-memory/table.md")
    parser.add_argument("--out", type=Path, default=default, help="file to write")
    out: Path = parser.parse_args().out
    text = ["# Predicted memory beside published measurements", "", *table(), ""]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "\n".join(text))


if __name__ == "__main__":
    main()
