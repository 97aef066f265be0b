"""Predicted peak memory beside the measured one, over ranks, batches, checkpointing and bases.

    python benchmarks/memory.py [--quick] [--json] [--out reports/benchmarks/memory.json]

On a GPU: Qwen 2.5 0.5B and Llama 2 7B with random weights, `torch.cuda.max_memory_allocated` of
the second step (optimizer states exist from then on), and the least memory with which a process
gets through two steps, found by halving `set_per_process_memory_fraction`; every case in a process
of its own. Without a GPU: a small Llama on the CPU, whose allocations torch.profiler reports.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rsauto.atomic import write_text
from rsauto.base import prepare
from rsauto.environment import describe_environment
from rsauto.memory.kinds import Bits, PlannedMethod, StepKind, StepSize
from rsauto.memory.measure import PeakMeter
from rsauto.memory.methods import METHODS, adapt
from rsauto.memory.profiles import Profiles
from rsauto.memory.shape import model_shape
from rsauto.memory.trace import architecture, build_model
from rsauto.memory.traced_optimizers import planned_optimizer
from rsauto.training.loop import clip_gradients, gradient_norms
from rsauto.training.loss import summed_cross_entropy

MIB = 2**20
SMALL = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "dtype": "float32",
}  # fmt: skip
CUBLAS_BYTES = {9: 2 * 32 * MIB, 10: 2 * 32 * MIB, 12: 2 * 32 * MIB}
"""Workspaces, which max_memory_allocated counts, by compute capability; 2 x 8.125 MiB elsewhere."""


@dataclass(frozen=True)
class Case:
    """One step to predict and to measure."""

    model: str
    method: PlannedMethod
    rank: int
    batch_size: int
    max_length: int
    gradient_checkpointing: bool
    quant_bits: Bits | None


def cases(on_cuda: bool, quick: bool) -> Iterator[Case]:
    """The grid, or a corner of it."""
    models = ["qwen2.5-0.5b", "llama-2-7b"] if on_cuda else ["small"]
    ranks = (8, 256) if quick else (4, 32, 256, 2048) if on_cuda else (4, 16, 64, 256)
    batches = (2,) if quick else (1, 4, 8)
    bases: tuple[Bits | None, ...] = (None,) if quick else (None, 4)
    methods: tuple[PlannedMethod, ...] = ("rslora",) if quick else ("rslora", "peft_adalora")
    length = 512 if on_cuda else 128
    grid = itertools.product(
        models[: 1 if quick else 2], methods, bases, (False, True), batches, ranks
    )
    for model, method, bits, checkpointing, batch, rank in grid:
        if method == "peft_adalora" and (rank > 256 or bits):
            continue  # AdaLoRA starts at a multiple of the rank it ends at
        yield Case(model, method, rank, batch, length, checkpointing, bits)


def kind_of(case: Case, on_cuda: bool) -> StepKind:
    """What is predicted and what is built."""
    shape = model_shape(SMALL if case.model == "small" else case.model, task="CAUSAL_LM")
    return StepKind(
        model_config=shape.config_json,
        dtype="bfloat16" if on_cuda else "float32",
        method=case.method,
        quant_bits=case.quant_bits,
        gradient_checkpointing=case.gradient_checkpointing,
        padded=case.batch_size > 1,
        device_type="cuda" if on_cuda else "cpu",
    )


def predicted(case: Case, profiles: Profiles, on_cuda: bool) -> tuple[int, int]:
    """(peak, reserved) bytes, with cuBLAS's workspaces on CUDA."""
    size = StepSize(case.rank, case.batch_size, case.max_length, 0)
    found = profiles.predict(kind_of(case, on_cuda), size)
    extra = 0
    if on_cuda:
        extra = CUBLAS_BYTES.get(torch.cuda.get_device_capability()[0], 2 * 8_519_680)
    return found.peak_bytes + extra, found.reserved_bytes + extra


def measured(case: Case, on_cuda: bool, fraction: float | None = None) -> int:
    """Peak bytes of the second of two steps. Raises OutOfMemoryError above the fraction."""
    device = torch.device("cuda" if on_cuda else "cpu")
    if fraction is not None:
        torch.cuda.set_per_process_memory_fraction(fraction)
    kind = kind_of(case, on_cuda)
    with device:
        model = _real_model(kind, case.rank)
    optimizer = planned_optimizer(model, kind.optimizer, kind.device_type)
    parameters = [p for p in model.parameters() if p.requires_grad]
    batch = _batch(case, device)
    model.train()
    meter = PeakMeter(device, model, optimizer)
    for step in range(2):
        # What the method keeps beside the optimizer is there when the step begins.
        optimizer.state["kept"] = dict(enumerate(METHODS[kind.method].kept(model)))
        with meter.watch(heavy=step > 0):
            del optimizer.state["kept"]
            loss_of = METHODS[kind.method].loss
            if loss_of is not None:
                loss = loss_of(model, batch)
            else:
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
                loss = summed_cross_entropy(model(**inputs).logits, batch["labels"])
            loss.backward()
            _, norm = gradient_norms(parameters)
            clip_gradients(parameters, norm, max_norm=1.0)
            optimizer.step()
            after_step = METHODS[kind.method].after_step
            if after_step is not None:
                after_step(model)
            del loss
            optimizer.zero_grad()
    assert meter.peak_bytes is not None
    return meter.peak_bytes


def _real_model(kind: StepKind, rank: int) -> PeftModel:
    """As `build_model` makes it, but with the layers of bitsandbytes instead of stand-ins."""
    if kind.quant_bits is None:
        return build_model(kind, rank)
    config, _ = architecture(kind)
    base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, kind.dtype))
    for name, module in list(base.named_modules()):
        if type(module) is nn.Linear and module is not base.get_output_embeddings():
            base.set_submodule(name, _quantised(module))
    prepare(base, kind.gradient_checkpointing)
    return adapt(base, kind, rank)


def _quantised(linear: nn.Linear) -> nn.Module:
    """In 4 bit: nf4, double quantisation."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, quant_type="nf4",
        compute_dtype=linear.weight.dtype, device="meta",
    )  # fmt: skip
    weight = linear.weight.detach().cpu()
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer.weight.module = layer
    return layer.to(linear.weight.device)


def _batch(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Sequences of which the last has one token of padding, unless it is the only one."""
    ids = torch.randint(1, 1000, (case.batch_size, case.max_length), device=device)
    mask = torch.ones_like(ids)
    if case.batch_size > 1:
        mask[-1, -1] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def smallest_limit(case: Case, reserved_bytes: int) -> int:
    """Least bytes that a process gets through two steps with, to 1 %; each try is a process."""
    total = torch.cuda.get_device_properties(0).total_memory
    fails, works = int(0.8 * reserved_bytes), int(1.2 * reserved_bytes)
    while works - fails > 0.01 * reserved_bytes:
        middle = (works + fails) // 2
        if _in_process(case, middle / total) is None:
            fails = middle
        else:
            works = middle
    return works


def _in_process(case: Case, fraction: float | None = None) -> int | None:
    """`measured` in a new process; None where memory runs out."""
    words = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    if fraction is not None:
        words += ["--fraction", repr(fraction)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        return None
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return int(done.stdout.splitlines()[-1])


def rows(quick: bool, on_cuda: bool) -> Iterator[dict[str, Any]]:
    """One for every case; memory that ran out is null."""
    profiles = Profiles.on_disk()
    for case in cases(on_cuda, quick):
        peak, reserved = predicted(case, profiles, on_cuda)
        found = _in_process(case) if on_cuda else measured(case, on_cuda)
        row = asdict(case) | {"predicted_bytes": peak, "measured_bytes": found}
        if on_cuda and found is not None and case.rank in (8, 256) and case.batch_size > 1:
            row |= {
                "predicted_reserved_bytes": reserved,
                "smallest_limit_bytes": smallest_limit(case, reserved),
            }
        yield row


def summary(found: list[dict[str, Any]]) -> str:
    """Mean and worst error in a sentence."""
    errors = [
        row["predicted_bytes"] / row["measured_bytes"] - 1 for row in found if row["measured_bytes"]
    ]
    mean = sum(abs(error) for error in errors) / len(errors)
    return (
        f"{len(errors)} cases: mean error {mean:.2%}, lowest {min(errors):+.2%}, "
        f"highest {max(errors):+.2%}"
    )


def main() -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description="Predicted beside measured peak memory.")
    parser.add_argument("--quick", action="store_true", help="a corner of the grid")
    parser.add_argument("--json", action="store_true", help="rows as one JSON object")
    parser.add_argument("--out", type=Path, default=None, help="file to write the rows to")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--fraction", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    on_cuda = torch.cuda.is_available()
    if arguments.case is not None:
        try:
            print(measured(Case(**json.loads(arguments.case)), on_cuda, arguments.fraction))
        except torch.OutOfMemoryError:
            sys.exit(3)
        return
    found = []
    for row in rows(arguments.quick, on_cuda):
        found.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    result = {
        "rows": found,
        "environment": describe_environment(torch.device("cuda" if on_cuda else "cpu")),
        "command": " ".join(["python", *sys.argv]),
    }
    print(json.dumps(result) if arguments.json else summary(found))
    out = arguments.out or (None if arguments.quick else Path("reports/benchmarks/memory.json"))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
