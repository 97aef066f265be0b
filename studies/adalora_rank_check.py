"""Rank coordinate check: how the size of the adapters' output moves with rank, early in training.

    python studies/adalora_rank_check.py            about 6 minutes on one core
    python studies/adalora_rank_check.py --quick    two ranks, one seed, no files

After 1, 4 and 16 AdamW steps at one learning rate for every rank, on the embedded model and data:
the root mean square, over tokens, features and adapted modules, of gamma_r P diag(lambda) Q x (of
gamma_r B A x for LoRA), and the exponent of rank in it, fitted on a log-log scale over seeds. With
the right factor it does not move with rank (rsLoRA, arXiv:2312.03732, theorem 3.2, says so of
LoRA). AdaLoRA stays at its initial rank here, 1.5 times the target rank that gamma_r is for.

Writes reports/adalora/rank-check.json, rank-check.md and rank-check.svg.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from rsauto import study_file
from rsauto.adapters.lora import lora_layers
from rsauto.atomic import write_text
from rsauto.data import collate
from rsauto.environment import describe_environment
from rsauto.records import ADALORA_METHODS, AllocationSpec, Method, TrialSpec
from rsauto.search.setup import Setup, set_up
from rsauto.search.space import SCALING_RULES
from rsauto.training.trial import Bench, Trial

OUT = Path(__file__).parents[1] / "reports" / "adalora"
METHODS: tuple[Method, ...] = ("lora", "rslora", "adalora", "rsadalora")
NAMES = {"lora": "LoRA", "rslora": "rsLoRA", "adalora": "AdaLoRA", "rsadalora": "rsAdaLoRA"}
COLOURS = {"lora": "#E69F00", "rslora": "#0072B2", "adalora": "#009E73", "rsadalora": "#CC79A7"}
RANKS = (4, 8, 16, 32, 64, 128, 256)
STEPS = (1, 4, 16)
SEEDS = (0, 1, 2)
RATE = 1e-3


def spec_of(setup: Setup, method: Method, rank: int, seed: int) -> TrialSpec:
    """A trial at a constant learning rate, the same for every rank and method."""
    spec = replace(
        setup.space.middle(rank, "rslora"),
        method=method,
        scaling_rule=SCALING_RULES[method],
        alpha=16,
        learning_rate=RATE,
        schedule="constant",
        warmup_share=0.0,
        steps=max(STEPS),
        num_evals=1,
        seed=seed,
        micro_batch_size=16,
    )
    if method not in ADALORA_METHODS:
        return spec
    allocation = AllocationSpec(tinit=max(STEPS) - 1, tfinal=0)
    return replace(
        spec, init_rank=rank * 3 // 2, target_rank=rank, lambda_lr_ratio=1.0, allocation=allocation
    )


def sizes(setup: Setup, bench: Bench, spec: TrialSpec) -> dict[int, float]:
    """Step to the root mean square of the adapters' output on the first validation rows."""
    batch = collate(bench.data.validation[:16], bench.data.pad_token_id).to(setup.device)
    found: dict[int, float] = {}
    with Trial(bench, spec) as trial:
        for point in trial.steps():
            if point.step in STEPS:
                found[point.step] = output_size(trial, batch.inputs())
    return found


def output_size(trial: Trial, inputs: dict[str, Tensor]) -> float:
    """By hooks on the adapted layers: what each adds to its base layer's output."""
    squares: list[Tensor] = []

    def measure(layer: Any, args: tuple[Tensor, ...], _out: Tensor) -> None:
        delta = layer.get_delta_weight("default")
        squares.append((args[0] @ delta.T).square().mean())

    adapted = trial._adapted
    assert adapted is not None
    hooks = [layer.register_forward_hook(measure) for layer in lora_layers(adapted)]
    with torch.no_grad():
        adapted(**inputs)
    for hook in hooks:
        hook.remove()
    return float(torch.stack(squares).mean().sqrt())


def exponent(points: list[tuple[int, float]]) -> float:
    """Slope of log size over log rank."""
    ranks, values = zip(*points, strict=True)
    return float(np.polyfit(np.log(ranks), np.log(values), 1)[0])


def measure(ranks: tuple[int, ...], seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    setup = set_up(study_file.load(sets=["memory_budget=8GiB"]))
    bench = Bench(
        model=setup.load_model().model, base_name="embedded", data=setup.data, device=setup.device
    )
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        for rank in ranks:
            for seed in seeds:
                found = sizes(setup, bench, spec_of(setup, method, rank, seed))
                rows += [
                    {"method": method, "rank": rank, "seed": seed, "step": step, "size": size}
                    for step, size in found.items()
                ]
            print(rows[-1], flush=True)
    return rows


def exponents(rows: list[dict[str, Any]]) -> dict[tuple[str, int], list[float]]:
    """Of every method and step, one for each seed."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for method in METHODS:
        for step in STEPS:
            for seed in sorted({row["seed"] for row in rows}):
                points = [
                    (row["rank"], row["size"])
                    for row in rows
                    if (row["method"], row["step"], row["seed"]) == (method, step, seed)
                ]
                found[method, step].append(exponent(points))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The exponents as Markdown."""
    text = "| method | " + " | ".join(f"after {step} steps" for step in STEPS) + " |\n"
    text += "|---|" + "---|" * len(STEPS) + "\n"
    found = exponents(rows)
    for method in METHODS:
        cells = []
        for step in STEPS:
            values = found[method, step]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):+.2f} (sd {spread:.2f})")
        text += f"| {NAMES[method]} | " + " | ".join(cells) + " |\n"
    return text


def draw(rows: list[dict[str, Any]]) -> str:
    """The figure as SVG, the same for the same numbers."""
    mpl.rcParams["svg.hashsalt"] = "rank-check"
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, len(STEPS), sharey=True)
    for axis, step in zip(axes, STEPS, strict=True):
        for method in METHODS:
            ranks = sorted({row["rank"] for row in rows})
            means = [
                statistics.mean(
                    row["size"]
                    for row in rows
                    if (row["method"], row["rank"], row["step"]) == (method, rank, step)
                )
                for rank in ranks
            ]
            axis.loglog(ranks, means, "o-", color=COLOURS[method], label=NAMES[method], base=2)
        axis.set_title(f"after {step} step{'s' if step > 1 else ''}")
        axis.set_xlabel("rank")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("size of the adapters' output (rms)")
    axes[-1].legend(fontsize=8)
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rows = measure(*(((4, 64), SEEDS[:1]) if quick else (RANKS, SEEDS)))
    text = table(rows)
    print(text)
    if quick:
        return
    OUT.mkdir(parents=True, exist_ok=True)
    command = "python studies/adalora_rank_check.py"
    environment = describe_environment(torch.device("cpu"))
    found = {"rows": rows, "environment": environment, "command": command}
    write_text(OUT / "rank-check.json", json.dumps(found, indent=1) + "\n")
    write_text(OUT / "rank-check.md", text)
    write_text(OUT / "rank-check.svg", draw(rows))


if __name__ == "__main__":
    main()
