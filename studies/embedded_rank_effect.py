"""What rank buys on the embedded model and task, on seeds that chose nothing.

The task and the learning rates were chosen on seeds 0 to 2 (studies/embedded_task_choice.py, its
table is reports/embedded/task-choice.csv). Here both are frozen: every configuration runs once on
each of the seeds 3 to 7, through rsauto's own training loop, and is evaluated at the end on the
validation rows and, this once, on the test rows.

    python studies/embedded_rank_effect.py            about 6 minutes on two cores
    python studies/embedded_rank_effect.py --quick    two configurations, one seed, no files

Writes reports/embedded/rank-effect.json and rank-effect.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from rsauto.atomic import write_text
from rsauto.base import load_weights, open_base, pick_device
from rsauto.config import DataConfig, ModelConfig
from rsauto.data import TokenisedData, load_rows, tokenise
from rsauto.data.template import Row
from rsauto.embedded import load_split
from rsauto.environment import describe_environment
from rsauto.records import TrialSpec
from rsauto.training.evaluate import Evaluation, evaluate
from rsauto.training.loop import train
from rsauto.training.trial import Bench, Trial

OUT = Path(__file__).parents[1] / "reports" / "embedded"
SEEDS = (3, 4, 5, 6, 7)

Rule = Literal["lora", "rslora"]
ADAPTERS: tuple[tuple[str, Rule, int, int, float], ...] = (
    ("LoRA, PEFT default rate", "lora", 8, 8, 5e-5),
    ("LoRA, default tuned", "lora", 8, 8, 1.6e-2),
    ("LoRA", "lora", 2, 16, 8e-3),
    ("LoRA", "lora", 8, 16, 8e-3),
    ("LoRA", "lora", 64, 16, 8e-3),
    ("rsLoRA", "rslora", 2, 16, 8e-3),
    ("rsLoRA", "rslora", 4, 16, 8e-3),
    ("rsLoRA", "rslora", 8, 16, 8e-3),
    ("rsLoRA", "rslora", 16, 16, 4e-3),
    ("rsLoRA", "rslora", 32, 16, 4e-3),
    ("rsLoRA", "rslora", 64, 16, 4e-3),
)
"""Name, rule, rank, alpha and the learning rate that was best on seeds 0 to 2."""
FULL_RATE = 8e-3
"""Of full fine-tuning, tuned on the same seeds."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    adapters = ADAPTERS[1:6:4] if arguments.quick else ADAPTERS
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    rows = measure(adapters, seeds)
    environment = describe_environment(pick_device())
    command = "python studies/embedded_rank_effect.py"
    text = report(rows, environment, command)
    print(text)
    if not arguments.quick:
        found = {"rows": rows, "environment": environment, "command": command}
        OUT.mkdir(parents=True, exist_ok=True)
        write_text(OUT / "rank-effect.json", json.dumps(found, indent=1) + "\n")
        write_text(OUT / "rank-effect.md", text)


def measure(
    adapters: tuple[tuple[str, Rule, int, int, float], ...], seeds: tuple[int, ...]
) -> list[dict[str, Any]]:
    """One row for every configuration and seed."""
    bench, test = open_bench()
    rows = []
    for seed in seeds:
        for name, rule, rank, alpha, rate in adapters:
            spec = specification(rule, rank, alpha, rate, seed)
            with Trial(bench, spec) as trial:
                for _ in trial.steps():
                    pass
                assert trial._adapted is not None
                rows.append(
                    row(name, spec, *judge(trial._adapted, bench, test), trial.train_seconds)
                )
        rows.append(full_fine_tuning(bench, test, seed))
        print(f"seed {seed} done", flush=True)
    return rows


def full_fine_tuning(bench: Bench, test: TokenisedData, seed: int) -> dict[str, Any]:
    """All weights of a copy of the base, by the same loop."""
    spec = specification("lora", 1, 1, FULL_RATE, seed)
    torch.manual_seed(seed)
    model = copy.deepcopy(bench.model).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=FULL_RATE, weight_decay=0.0, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = FULL_RATE
    seconds = 0.0
    for point in train(model, optimizer, bench.data, spec, device=bench.device):
        seconds += point.seconds
    found = row("full fine-tuning", spec, *judge(model, bench, test), seconds)
    return {**found, "rank": None, "alpha": None}


def specification(rule: Rule, rank: int, alpha: int, rate: float, seed: int) -> TrialSpec:
    """72 steps of 16 rows, warm-up over 7, then linear decay: as when the rates were chosen."""
    base = TrialSpec(
        role="search", method=rule, rank=rank, alpha=alpha, scaling_rule=rule, learning_rate=rate
    )
    return replace(
        base, steps=72, batch_size=16, micro_batch_size=16, warmup_share=0.09, schedule="linear",
        max_length=32, num_evals=1, seed=seed,
    )  # fmt: skip


def open_bench() -> tuple[Bench, TokenisedData]:
    """The embedded model with its data, and the same with test rows in validation's place."""
    model_config, device = ModelConfig(name="embedded"), pick_device()
    source = open_base(model_config)
    data_config = DataConfig(name="embedded", max_length=32, validation_rows=200)
    splits = load_rows(data_config)
    data = tokenise(splits, data_config, source.tokenizer)
    test_rows = tuple(
        Row(number, line["prompt"], line["completion"])
        for number, line in enumerate(load_split("test"), start=1)
    )
    test = tokenise(replace(splits, validation=test_rows), data_config, source.tokenizer)
    model = load_weights(source, model_config, device)
    return Bench(model=model, base_name="embedded", data=data, device=device), test


def judge(
    model: torch.nn.Module, bench: Bench, test: TokenisedData
) -> tuple[Evaluation, Evaluation]:
    """On the validation rows and on the test rows."""
    found = [
        evaluate(
            model, data.validation, batch_size=64, pad_token_id=data.pad_token_id,
            device=bench.device,
        )
        for data in (bench.data, test)
    ]  # fmt: skip
    return found[0], found[1]


def row(
    name: str, spec: TrialSpec, validation: Evaluation, test: Evaluation, seconds: float
) -> dict[str, Any]:
    return {
        "name": name,
        "rank": spec.rank,
        "alpha": spec.alpha,
        "learning_rate": spec.learning_rate,
        "seed": spec.seed,
        "eval_loss": validation.eval_loss,
        "exact_match": validation.metrics["exact_match"],
        "test_loss": test.eval_loss,
        "test_exact_match": test.metrics["exact_match"],
        "train_seconds": seconds,
    }


def report(rows: list[dict[str, Any]], environment: dict[str, Any], command: str) -> str:
    """Means and standard deviations over seeds."""
    lines = [
        "# What rank buys on the embedded model and task",
        "",
        f"`{command}`, {environment['device']}, {environment['num_threads']} threads, torch "
        f"{environment['packages']['torch']}, peft {environment['packages']['peft']}. Task and "
        "learning rates were chosen on seeds 0 to 2 ([task-choice.md](task-choice.md)); the seeds "
        f"here are {sorted({r['seed'] for r in rows})}. Mean ± standard deviation over seeds; 72 "
        "steps of 16 rows. The rates were chosen without gradient clipping; here gradients are "
        "clipped to norm 1, rsauto's default, which may be why most losses are lower than when "
        "the rates were chosen.",
        "",
        "| adapter | rank | alpha | learning rate | validation loss | exact match | test loss | "
        "test exact match | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((r["name"], r["rank"]) for r in rows):
        group = [r for r in rows if (r["name"], r["rank"]) == key]
        first = group[0]
        lines.append(
            f"| {key[0]} | {key[1] or '-'} | {first['alpha'] or '-'} | {first['learning_rate']:g} "
            f"| {spread(group, 'eval_loss')} | {spread(group, 'exact_match', 100)} % "
            f"| {spread(group, 'test_loss')} | {spread(group, 'test_exact_match', 100)} % "
            f"| {statistics.median(r['train_seconds'] for r in group):.1f} |"
        )
    return "\n".join(lines) + "\n"


def spread(group: list[dict[str, Any]], key: str, factor: float = 1.0) -> str:
    values = [factor * r[key] for r in group]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    digits = 1 if factor > 1 else 3
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
