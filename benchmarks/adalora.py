"""Step time of AdaLoRA beside LoRA of the same initial rank, ours and PEFT's, in one process.

    python benchmarks/adalora.py [--quick] [--json] [--out reports/benchmarks/adalora.json]

Every row is one shape. Four models with the same random weights take turns, a step of each after a
step of the others, so that whatever else the machine does falls on all of them; a ratio is the
median over rounds of the quotient of two steps of one round. The baseline of ours is the rsLoRA
adapter that `rsauto study` trains; that of PEFT its LoRA. All use fused AdamW and clip gradients;
ranks are allocated at every step.

ratio_allocating         ours while allocating, recovery paper, over rsLoRA
ratio_allocating_lambda  the same, scored by lambda alone
ratio_final              ours after the last allocation with recovery none, over rsLoRA
peft_ratio_allocating    PEFT's AdaLoRA while allocating over PEFT's LoRA
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from rsauto.adapters.adalora import add_adalora, allocator_of
from rsauto.adapters.lora import add_adapter, target_module_names, trainable_parameters
from rsauto.adapters.optimizers import build_optimizer
from rsauto.atomic import write_text
from rsauto.environment import describe_environment
from rsauto.records import AllocationSpec, TrialSpec
from rsauto.training.loop import clip_gradients, gradient_norms
from rsauto.training.loss import summed_cross_entropy, token_mean

TOTAL_STEP = 1_000_000
"""So long that the budget hardly falls while it is measured."""

Allocate = Callable[[int], None]


@dataclass(frozen=True)
class Shape:
    """A small Llama, and a step of it."""

    hidden_size: int
    num_layers: int
    batch_size: int
    max_length: int
    init_rank: int
    target_rank: int


SHAPES = (
    Shape(256, 4, 8, 64, 12, 8),
    Shape(256, 4, 8, 64, 96, 64),
    Shape(512, 4, 8, 128, 12, 8),
    Shape(512, 4, 8, 128, 96, 64),
    Shape(512, 4, 8, 128, 384, 256),
)


class Runner:
    """One adapted model, stepped again and again on the same batch."""

    def __init__(
        self, adapted: Any, optimizer: torch.optim.Optimizer, batch: Tensor, allocate: Allocate
    ) -> None:
        self.adapted = adapted
        self.optimizer = optimizer
        self._batch = batch
        self._allocate = allocate
        self._step = 0
        self.own_loss = False

    def step(self) -> float:
        """Seconds of one optimizer step."""
        self._step += 1
        parameters = list(trainable_parameters(self.adapted).values())
        begin = _now(self._batch)
        if self.own_loss:
            loss = self.adapted(input_ids=self._batch, labels=self._batch).loss
        else:
            logits = self.adapted(input_ids=self._batch).logits
            loss = token_mean(summed_cross_entropy(logits, self._batch), self._batch.numel())
        loss.backward()
        _, norm = gradient_norms(parameters)
        clip_gradients(parameters, norm, 1.0)
        self.optimizer.step()
        self._allocate(self._step)
        self.optimizer.zero_grad(set_to_none=True)
        return _now(self._batch) - begin


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _model(shape: Shape, device: torch.device) -> nn.Module:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=1024,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.hidden_size * 11 // 4,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).to(device)
    return model.train()


def _batch(shape: Shape, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (shape.batch_size, shape.max_length)
    return torch.randint(0, 1024, size, generator=generator).to(device)


def _spec(shape: Shape, method: str, **chosen: Any) -> TrialSpec:
    common: dict[str, Any] = {
        "role": "search", "alpha": 16, "scaling_rule": "rslora", "learning_rate": 1e-4,
    }  # fmt: skip
    if method == "rslora":
        return TrialSpec(method="rslora", rank=shape.init_rank, **common)
    return TrialSpec(
        method="rsadalora",
        rank=shape.target_rank,
        init_rank=shape.init_rank,
        target_rank=shape.target_rank,
        steps=TOTAL_STEP,
        allocation=AllocationSpec(**{"tinit": 0, "tfinal": 1, "recovery": "paper", **chosen}),
        **common,
    )


def _ours(shape: Shape, device: torch.device, method: str, **chosen: Any) -> Runner:
    spec = _spec(shape, method, **chosen)
    model = _model(shape, device)
    adapted = (add_adapter if method == "rslora" else add_adalora)(model, spec)
    optimizer = build_optimizer(adapted, name="adamw", learning_rate=1e-4)
    allocate: Allocate = lambda step: None  # noqa: E731
    if method != "rslora":
        allocator = allocator_of(adapted)
        allocate = lambda step: allocator.update_and_allocate(step, optimizer)  # noqa: E731
    return Runner(adapted, optimizer, _batch(shape, device), allocate)


def _final(shape: Shape, device: torch.device) -> Runner:
    """Ours with the pattern fixed and everything else given back."""
    runner = _ours(shape, device, "rsadalora", recovery="none")
    allocator = allocator_of(runner.adapted)
    tuner: Any = runner.adapted.base_model
    runner.step()
    allocator.config.total_step = 3
    for _ in range(2):
        runner.step()
    assert allocator.finished, tuner
    return runner


def _peft(shape: Shape, device: torch.device, method: str) -> Runner:
    model = _model(shape, device)
    targets = target_module_names(model, "all-linear")
    if method == "lora":
        config = LoraConfig(r=shape.init_rank, target_modules=targets, task_type="CAUSAL_LM")
    else:
        config = AdaLoraConfig(
            init_r=shape.init_rank,
            target_r=shape.target_rank,
            total_step=TOTAL_STEP,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
    adapted: Any = get_peft_model(model, config)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    allocate: Allocate = lambda step: None  # noqa: E731
    if method == "adalora":
        allocate = adapted.base_model.update_and_allocate
    runner = Runner(adapted, optimizer, _batch(shape, device), allocate)
    runner.own_loss = True
    return runner


def row(shape: Shape, rounds: int, device: torch.device) -> dict[str, Any]:
    """All ratios of one shape."""
    runners = {
        "rslora": _ours(shape, device, "rslora"),
        "paper": _ours(shape, device, "rsadalora"),
        "lambda": _ours(shape, device, "rsadalora", score="lambda"),
        "final": _final(shape, device),
        "lora": _peft(shape, device, "lora"),
        "adalora": _peft(shape, device, "adalora"),
    }
    for runner in runners.values():
        for _ in range(3):
            runner.step()
    seconds = [{name: runner.step() for name, runner in runners.items()} for _ in range(rounds)]

    def ratio(name: str, baseline: str) -> float:
        return statistics.median(one[name] / one[baseline] for one in seconds)

    return {
        **asdict(shape),
        "ratio_allocating": ratio("paper", "rslora"),
        "ratio_allocating_lambda": ratio("lambda", "rslora"),
        "ratio_final": ratio("final", "rslora"),
        "peft_ratio_allocating": ratio("adalora", "lora"),
        "rslora_seconds": statistics.median(one["rslora"] for one in seconds),
        "rounds": rounds,
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [" hidden  tokens  init->target  allocating  by lambda   final   PEFT's"]
    for one in rows:
        tokens = one["batch_size"] * one["max_length"]
        lines.append(
            f"{one['hidden_size']:>7} {tokens:>7} {one['init_rank']:>6}->{one['target_rank']:<6} "
            f"{one['ratio_allocating']:>9.3f} {one['ratio_allocating_lambda']:>10.3f} "
            f"{one['ratio_final']:>9.3f} {one['peft_ratio_allocating']:>8.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small shape, few rounds")
    parser.add_argument("--json", action="store_true", help="rows as one JSON object")
    parser.add_argument("--out", type=Path, default=None, help="file to write the rows to")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes, rounds = (SHAPES[1:2], 11) if arguments.quick else (SHAPES, 41)
    if device.type == "cuda":
        shapes = tuple(replace(shape, hidden_size=4 * shape.hidden_size) for shape in shapes)
    found = []
    for shape in shapes:
        found.append(row(shape, rounds, device))
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    result = {
        "rows": found,
        "environment": describe_environment(device),
        "command": " ".join(["python", *sys.argv]),
    }
    print(json.dumps(result) if arguments.json else summary(found))
    out = arguments.out or (None if arguments.quick else Path("reports/benchmarks/adalora.json"))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
