"""Records of an invented study, realistic enough to report on, and checks that they are.

The other report tests import `study_records` and `write_study` from here.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from rsauto import study_file
from rsauto.config import SearchConfig, StudyConfig, TrainingConfig
from rsauto.records import AllocationSpec, EvalPoint, Role, TrialRecord, dump_line
from rsauto.scaling import gamma_r

MIB = 2**20
BUDGET = 32 * MIB
STEPS = 100

ENVIRONMENT: dict[str, Any] = {
    "versions": {"rsauto": "0.1.0", "torch": "2.13.0", "peft": "0.21.2"},
    "device": {"kind": "cpu", "name": "a processor"},
    "seeds": {"search": 0},
    "baseline": {"eval_loss": 2.311, "metrics": {"accuracy": 0.31}},
    "memory_budget_bytes": BUDGET,
}


def peak_bytes(rank: int) -> int:
    """Affine in rank, as a peak is: 13.5 MiB and 0.24 MiB a rank."""
    return int((13.5 + 0.123 * rank) * MIB)


def record(number: int, rank: int, learning_rate: float, **changes: Any) -> TrialRecord:
    """A complete full-length rsLoRA trial; any field can be changed."""
    method = changes.get("method", "rslora")
    fields: dict[str, Any] = {
        "number": number,
        "outcome": "complete",
        "role": "search",
        "method": method,
        "rank": rank,
        "alpha": 16,
        "scaling_rule": "lora" if method == "lora" else "rslora",
        "gamma_r": 1.0,
        "target_modules": "all-linear",
        "learning_rate": learning_rate,
        "lr_ratio": 1.0,
        "optimizer": "adamw",
        "schedule": "linear",
        "warmup_share": 0.05,
        "max_grad_norm": 1.0,
        "batch_size": 16,
        "micro_batch_size": 16,
        "max_length": 128,
        "seed": 0,
        "steps": STEPS,
        "num_evals": 4,
        "tokens": 640 * STEPS,
        "fidelity": 1.0,
        "num_trainable_params": 4608 * rank,
        "adapter_bytes": 4 * 4608 * rank + 1200,
        "flops": 1.1e12 + 3.2e9 * rank,
        "predicted_peak_bytes": peak_bytes(rank),
        "memory_budget_bytes": BUDGET,
        "started_at": "2026-01-05T10:00:00Z",
    }
    fields.update(changes)
    fields["gamma_r"] = gamma_r(fields["scaling_rule"], fields["alpha"], rank)
    return TrialRecord(**fields)


def with_loss(trial: TrialRecord, loss: float, solo: bool = False) -> TrialRecord:
    """The trial with this final loss and a curve that leads to it; ``solo`` adds peak and clock."""
    done = trial.steps or STEPS
    points = tuple(
        EvalPoint(
            step=round(done * share),
            train_loss=loss + 1.1 * math.exp(-4 * share),
            eval_loss=loss + 1.0 * math.exp(-4 * share) * (share < 1),
            grad_norm=0.4 + 0.2 / (1 + share),
            metrics={"accuracy": 0.9 - 0.3 * loss},
        )
        for share in (0.25, 0.5, 0.75, 1.0)
    )
    measured: dict[str, Any] = {}
    if solo:
        seconds = 8.0 + 0.02 * trial.rank
        measured = {
            "measured_peak_bytes": int(peak_bytes(trial.rank) * 0.985),
            "train_seconds": seconds,
            "tokens_per_second": 640 * STEPS / seconds,
        }
    return replace(
        trial,
        eval_loss=loss,
        perplexity=math.exp(loss),
        metrics={"accuracy": 0.9 - 0.3 * loss},
        curve=points,
        **measured,
    )


PATTERN = {
    "model.layers.0.self_attn.q_proj": 0,
    "model.layers.0.mlp.up_proj": 1,
    "model.layers.1.self_attn.q_proj": 2,
    "model.layers.1.mlp.up_proj": 5,
}


def allocated(number: int, pattern: dict[str, int] = PATTERN, **changes: Any) -> TrialRecord:
    """A complete AdaLoRA trial that came to these ranks."""
    rank = changes.pop("rank", 2)
    fields: dict[str, Any] = {
        "method": "adalora",
        "scaling_rule": "lora",
        "init_rank": 3 * rank,
        "target_rank": rank,
        "lambda_lr_ratio": 16.0,
        "allocation": AllocationSpec(tinit=10, tfinal=30),
        "rank_pattern": pattern,
        "r_max": max(pattern.values()),
    }
    return record(number, rank, 1e-2, **{**fields, **changes})


def refit(number: int, pattern: dict[str, int] = PATTERN, **changes: Any) -> TrialRecord:
    """A complete rsLoRA trial that was given the ranks of ``pattern`` that are not 0."""
    kept = {module: rank for module, rank in pattern.items() if rank}
    rank, fields = changes.pop("rank", 2), {"role": "refit", "r_max": max(kept.values())}
    return record(number, rank, 4e-3, rank_pattern=kept, **{**fields, **changes})


def true_loss(rank: int, learning_rate: float, method: str = "rslora") -> float:
    """Less with rank, and a parabola in log learning rate around a best that falls with rank."""
    best_rate = 2e-3 if method == "lora" else 2.4e-3 * (rank / 8) ** -0.25
    off = math.log2(learning_rate / best_rate)
    floor = 1.35 if method == "lora" else 1.215 + 0.22 / rank**0.62
    return floor + 0.028 * off * off


def study_records(seed: int = 3) -> list[TrialRecord]:
    """A whole study: defaults, search, every outcome, finalists on three seeds, and AdaLoRA with a
    refit of its ranks."""
    noise = random.Random(seed)
    found: list[TrialRecord] = []

    def finish(trial: TrialRecord, solo: bool = False) -> None:
        loss = true_loss(trial.rank, trial.learning_rate, trial.method) + noise.gauss(0, 0.004)
        found.append(with_loss(replace(trial, number=len(found)), loss, solo))

    finish(record(0, 8, 5e-5, role="default", method="lora", alpha=8), solo=True)
    for rate in (2e-4, 7e-4, 2e-3, 6e-3):
        finish(record(0, 8, rate, role="default_tuned", method="lora", alpha=8), solo=True)
    for rank in (2, 4, 8, 16, 32, 64, 128):
        for factor in (0.5, 1.1, 2.6):
            rate = float(f"{2.4e-3 * (rank / 8) ** -0.25 * factor:.2g}")
            finish(record(0, rank, rate, engine="packed", pack_id=f"p{rank}", pack_size=3))
    found += _unfinished(len(found))
    for rank in (32, 64, 128):
        rate = next(r.learning_rate for r in found if r.rank == rank and r.number % 3 == 0)
        for repeat in (0, 1, 2):
            finish(record(0, rank, rate, role="seed", seed=repeat), solo=True)
    for repeat in (1, 2):
        finish(record(0, 8, 2e-3, role="seed", method="lora", alpha=8, seed=repeat), solo=True)
    number = len(found)
    return [
        *found,
        with_loss(allocated(number), 1.40, solo=True),
        with_loss(allocated(number + 1, method="rsadalora", scaling_rule="rslora"), 1.41),
        with_loss(refit(number + 2), 1.39, solo=True),
    ]


def _unfinished(start: int) -> list[TrialRecord]:
    """One trial of every other outcome, and two that were pruned."""
    pruned = [
        with_loss(record(0, 16, 3e-5, outcome="pruned", steps=25, fidelity=0.25), 1.93),
        with_loss(record(0, 4, 6e-5, outcome="pruned", steps=50, fidelity=0.5), 1.71),
    ]
    nothing: dict[str, Any] = {"steps": None, "tokens": None, "fidelity": None}
    rest = [
        record(0, 256, 8e-4, outcome="infeasible", **nothing),
        record(0, 128, 1.1e-3, outcome="oom", error="out of memory at step 1", **nothing),
        record(0, 64, 0.09, outcome="diverged", steps=13, fidelity=0.13),
        record(0, 8, 1e-3, outcome="failed", error="<script>alert(1)</script> | =1+1", **nothing),
    ]
    return [replace(trial, number=start + i) for i, trial in enumerate([*pruned, *rest])]


def study_config(**search: Any) -> StudyConfig:
    return StudyConfig(
        name="invented",
        memory_budget=BUDGET,
        training=TrainingConfig(steps=STEPS),
        search=SearchConfig(**{"trials": 40, **search}),
    )


def write_study(
    folder: Path,
    records: list[TrialRecord],
    config: StudyConfig | None = None,
    environment: dict[str, Any] | None = ENVIRONMENT,
) -> Path:
    """A study folder with these records."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(study_file.dump(config or study_config()), encoding="utf-8")
    lines = "".join(dump_line(trial) + "\n" for trial in records)
    (folder / "trials.jsonl").write_text(lines, encoding="utf-8")
    if environment is not None:
        (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    return folder


def test_the_invented_study_has_every_outcome_and_role() -> None:
    found = study_records()
    assert {r.outcome for r in found} == {
        "complete", "pruned", "infeasible", "oom", "diverged", "failed"
    }  # fmt: skip
    assert {r.role for r in found} == {*get_args(Role)}
    assert [r.number for r in found] == list(range(len(found)))
