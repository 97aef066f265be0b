"""AdaLoRA on the embedded task: what its defaults were chosen from, and a first comparison.

    python studies/adalora_embedded.py defaults     initialisation x learning rate of lambda
    python studies/adalora_embedded.py recovery     triplets that can come back or not; the scores
    python studies/adalora_embedded.py overlap      the triplets that both scores keep
    python studies/adalora_embedded.py compare      rslora, adalora, rsadalora, PEFT's AdaLoRA

Every trial is one of the embedded study: 64 steps of 16 sequences, alpha 16, AdamW, linear
schedule. A stage goes on where it was stopped; its rows are in reports/adalora/STAGE.jsonl, its
table in STAGE.md. Learning rates are chosen on seed 0, results are from seeds 3 to 7.
About 5 seconds a trial on one core: 5, 9, 1 and 12 minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import AdaLoraConfig, get_peft_model

from rsauto import study_file
from rsauto.adalora.allocator import RankAllocator
from rsauto.adalora.budget import keep_best
from rsauto.adalora.importance import Importance
from rsauto.adapters.adalora import allocator_of
from rsauto.adapters.lora import remove_adapter, target_module_names, trainable_parameters
from rsauto.data import batch_plan, collate
from rsauto.records import ADALORA_METHODS, AllocationSpec, Method, TrialSpec
from rsauto.search.setup import Setup, set_up
from rsauto.search.space import SCALING_RULES
from rsauto.training.evaluate import evaluate
from rsauto.training.schedule import rate_multiplier, warmup_steps
from rsauto.training.trial import Bench, Trial

OUT = Path(__file__).parents[1] / "reports" / "adalora"
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
WIDE = (1e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
TUNING_SEED, SEEDS = 0, (3, 4, 5, 6, 7)
ALPHA = 16
INIT_RATIO = 1.5

Row = dict[str, Any]


class Lab:
    """The embedded model and task, and one trial after another."""

    def __init__(self) -> None:
        self.setup: Setup = set_up(study_file.load(sets=["memory_budget=4GiB"]))
        self.bench = Bench(
            model=self.setup.load_model().model,
            base_name="embedded",
            data=self.setup.data,
            device=self.setup.device,
        )

    def spec(
        self, method: Method, rank: int, rate: float, seed: int, ratio: float = 1.0, **chosen: Any
    ) -> TrialSpec:
        """A trial; ``chosen`` are fields of `AllocationSpec`."""
        spec = replace(
            self.setup.space.middle(rank, "rslora"),
            method=method,
            scaling_rule=SCALING_RULES[method],
            alpha=ALPHA,
            learning_rate=rate,
            seed=seed,
            num_evals=1,
            micro_batch_size=16,
        )
        if method not in ADALORA_METHODS:
            return spec
        allocation = AllocationSpec(
            tinit=int(0.1 * spec.steps),
            tfinal=int(0.3 * spec.steps),
            **{"recovery": "paper", **chosen},
        )
        return replace(
            spec,
            init_rank=int(INIT_RATIO * rank),
            target_rank=rank,
            lambda_lr_ratio=ratio,
            allocation=allocation,
        )

    def loss(self, spec: TrialSpec) -> Row:
        """Validation loss after the last step, and the time of its steps."""
        with Trial(self.bench, spec) as trial:
            try:
                for _ in trial.steps():
                    pass
            except ArithmeticError:
                return {"eval_loss": None, "seconds": None}
            pattern = trial.rank_pattern
            return {
                "eval_loss": trial.curve[-1].eval_loss,
                "seconds": trial.train_seconds,
                "r_max": max(pattern.values()) if pattern else spec.rank,
            }

    def overlap(self, spec: TrialSpec) -> Row:
        """Share of the triplets kept by the full score that lambda alone would keep as well.

        At every step of one trial between warm-up and the last allocation, both from the same
        gradients.
        """
        shares = []
        with Trial(self.bench, spec) as trial:
            for point in trial.steps():
                assert trial._adapted is not None
                allocator = allocator_of(trial._adapted)
                schedule = allocator.config.schedule(len(allocator.layers))
                if schedule.tinit < point.step < schedule.final_step:
                    shares.append(_overlap(allocator, schedule.budget(point.step)))
        return {"mean": statistics.mean(shares), "least": min(shares), "last": shares[-1]}

    def stock(self, rank: int, rate: float, seed: int) -> Row:
        """PEFT's AdaLoRA as its documentation trains it, at its own scale and initialisation."""
        spec = self.spec("adalora", rank, rate, seed)
        assert spec.allocation is not None and spec.init_rank is not None
        torch.manual_seed(seed)
        config = AdaLoraConfig(
            init_r=spec.init_rank,
            target_r=rank,
            lora_alpha=ALPHA,
            tinit=spec.allocation.tinit,
            tfinal=spec.allocation.tfinal,
            total_step=spec.steps,
            orth_reg_weight=spec.allocation.orth_reg_weight,
            target_modules=target_module_names(self.bench.model, "all-linear"),
            task_type="CAUSAL_LM",
        )
        adapted: Any = get_peft_model(self.bench.model, config)
        parameters = list(trainable_parameters(adapted).values())
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
        data = self.bench.data
        adapted.train()
        plan = batch_plan(len(data.train), spec.batch_size, spec.steps, seed)
        for step, indices in enumerate(plan, start=1):
            warm = warmup_steps(spec.steps, spec.warmup_share)
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_multiplier(spec.schedule, step - 1, spec.steps, warm)
            batch = collate([data.train[i] for i in indices], data.pad_token_id)
            adapted(**batch.inputs(), labels=batch.labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            adapted.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        found = evaluate(
            adapted, data.validation, batch_size=16, pad_token_id=data.pad_token_id,
            device=self.bench.device,
        )  # fmt: skip
        remove_adapter(adapted)
        return {"eval_loss": found.eval_loss, "seconds": None}


def _overlap(allocator: RankAllocator, budget: int) -> float:
    states = [layer.triplets["default"] for layer in allocator.layers.values()]
    active = [state.mask for state in states]
    found = []
    for factors in (("E", "A", "B"), ("E",)):
        scores = []
        for state in states:
            assert state.importance is not None
            tables = state.importance.sensitivity, state.importance.uncertainty
            part = Importance(
                *({n: t for n, t in table.items() if n in factors} for table in tables)
            )
            scores.append(part.of_triplets())
        found.append(torch.cat(keep_best(scores, active, budget)))
    return float((found[0] & found[1]).sum() / budget)


class Rows:
    """The rows of a stage, kept in a file as they come."""

    def __init__(self, stage: str) -> None:
        self._file = OUT / f"{stage}.jsonl"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self.by_key: dict[str, Row] = {row["key"]: row for row in map(json.loads, lines)}

    def run(self, lab: Lab, key: str, one: Callable[[Lab], Row]) -> None:
        if key in self.by_key:
            return
        row = {"key": key, **one(lab)}
        self.by_key[key] = row
        OUT.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)

    def loss(self, key: str) -> float:
        found = self.by_key.get(key, {}).get("eval_loss")
        return float("inf") if found is None else float(found)


def defaults(lab: Lab, rows: Rows) -> str:
    """Seed 0 only: what the defaults were chosen on is not reported as a result."""
    text = "| rank | init | lambda's rate / Q's | " + " | ".join(f"{r:g}" for r in WIDE)
    text += " |\n|---|---|---|" + "---|" * len(WIDE) + "\n"
    for rank in (8, 64):
        for init in (None, 0.02):
            for ratio in (1.0, 4.0, 16.0):
                cells = []
                for rate in WIDE:
                    key = f"r{rank} std={init} ratio={ratio:g} lr={rate:g}"
                    spec = lab.spec(
                        "rsadalora", rank, rate, TUNING_SEED, ratio=ratio, init_std=init
                    )
                    rows.run(lab, key, lambda lab, spec=spec: lab.loss(spec))
                    cells.append(f"{rows.loss(key):.3f}")
                name = "unit vectors" if init is None else "0.02"
                text += f"| {rank} | {name} | {ratio:g} | " + " | ".join(cells) + " |\n"
    return text


VARIANTS: tuple[tuple[str, str, str], ...] = (
    ("paper", "full", "masked triplets can come back"),
    ("none", "full", "gone for good"),
    ("paper", "lambda", "scored by lambda alone"),
    ("none", "lambda", "gone for good, scored by lambda alone"),
)


def recovery(lab: Lab, rows: Rows) -> str:
    """Each at its own rate of seed 0, then over five other seeds."""
    text = "| rank | recovery | score | learning rate | eval loss, mean | sd | less paper, full |\n"
    text += "|---|---|---|---|---|---|---|\n"
    for rank in (4, 16, 64):
        first: list[float] = []
        for recover, score, _ in VARIANTS:
            kind = {"recovery": recover, "score": score}
            name = f"r{rank} {recover} {score}"
            rate, losses = _tuned(lab, rows, name, lambda lr, seed, rank=rank, kind=kind: (
                lambda lab: lab.loss(lab.spec("rsadalora", rank, lr, seed, RATIO, **kind))
            ), RATES[1:4])  # fmt: skip
            first = first or losses
            less = [b - a for a, b in zip(first, losses, strict=True)]
            text += (
                f"| {rank} | {recover} | {score} | {rate:g} | {statistics.mean(losses):.3f} "
                f"| {statistics.stdev(losses):.3f} | {statistics.mean(less):+.3f} "
                f"(sd {statistics.stdev(less):.3f}) |\n"
            )
    return text


def overlap(lab: Lab, rows: Rows) -> str:
    """How alike the two scores choose."""
    text = "| rank | seed | mean | least | at the end |\n|---|---|---|---|---|\n"
    for rank in (4, 16, 64):
        for seed in SEEDS[:3]:
            key = f"r{rank} seed={seed}"
            spec = lab.spec("rsadalora", rank, 8e-3, seed, RATIO)
            rows.run(lab, key, lambda lab, spec=spec: lab.overlap(spec))
            row = rows.by_key[key]
            text += f"| {rank} | {seed} | {row['mean']:.3f} | {row['least']:.3f} "
            text += f"| {row['last']:.3f} |\n"
    return text


RATIO = 4.0
"""Of lambda's learning rate in the stages after `defaults`."""


def compare(lab: Lab, rows: Rows) -> str:
    """Same tuner for adalora and rsadalora: only gamma_r differs."""
    text = "| rank budget | method | learning rate | eval loss, mean | sd | seeds |\n"
    text += "|---|---|---|---|---|---|\n"
    for rank in (4, 64):
        for method in ("rslora", "adalora", "rsadalora", "PEFT AdaLoRA"):

            def one(lr: float, seed: int, rank: int = rank, method: str = method) -> Any:
                if method == "PEFT AdaLoRA":
                    return lambda lab: lab.stock(rank, lr, seed)
                return lambda lab: lab.loss(lab.spec(cast(Method, method), rank, lr, seed, RATIO))

            wide = (*RATES, 3.2e-2, 6.4e-2)
            rates = {"rslora": (5e-4, *RATES), "PEFT AdaLoRA": (*wide, 1.28e-1)}.get(method, wide)
            rate, losses = _tuned(lab, rows, f"r{rank} {method}", one, rates)
            values = ", ".join(f"{loss:.3f}" for loss in losses)
            text += (
                f"| {rank} | {method} | {rate:g} | {statistics.mean(losses):.3f} "
                f"| {statistics.stdev(losses):.3f} | {values} |\n"
            )
    return text


def _tuned(
    lab: Lab,
    rows: Rows,
    name: str,
    one: Callable[[float, int], Callable[[Lab], Row]],
    rates: tuple[float, ...],
) -> tuple[float, list[float]]:
    """The best rate on the tuning seed, and the losses at it on the others."""
    for rate in rates:
        rows.run(lab, f"{name} lr={rate:g} seed={TUNING_SEED}", one(rate, TUNING_SEED))
    best = min(rates, key=lambda rate: rows.loss(f"{name} lr={rate:g} seed={TUNING_SEED}"))
    for seed in SEEDS:
        rows.run(lab, f"{name} lr={best:g} seed={seed}", one(best, seed))
    return best, [rows.loss(f"{name} lr={best:g} seed={seed}") for seed in SEEDS]


STAGES: dict[str, Callable[[Lab, Rows], str]] = {
    "defaults": defaults,
    "recovery": recovery,
    "overlap": overlap,
    "compare": compare,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=tuple(STAGES))
    stage: str = parser.parse_args().stage
    table = STAGES[stage](Lab(), Rows(stage))
    (OUT / f"{stage}.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
