"""Trials for several processes to train together, and one to train alone. Run as a script by each.

spread_trials.py FOLDER OUT    with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_study import environment, rows, study_values, write_model
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from rsauto.config import StudyConfig
from rsauto.errors import RsautoError
from rsauto.launched import is_follower
from rsauto.records import TrialSpec
from rsauto.search.follow import follow, leading, load_everywhere
from rsauto.search.setup import Setup, set_up
from rsauto.study_file import validate
from rsauto.training import loop
from rsauto.training.loop import Diverged
from rsauto.training.spread import ALONE, Spread, join
from rsauto.training.trial import Bench, OutOfMemory, Trial, untouched

FULL, FULL_SEED = "full", 77
"""The case in which one process runs out of memory; its seed tells that process."""


def write_deep_model(folder: Path) -> Path:
    """Twelve layers, whose weights are most of what a checkpointed step needs."""
    write_model(folder, hidden_size=64)
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 12
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_dict(config.to_dict())).save_pretrained(folder)
    return folder


def configs(folder: Path) -> dict[str, StudyConfig]:
    """Studies with odd batches: of classes, with a head of its own; of text; on a deep model."""
    values = study_values(folder)
    values["memory_budget"] = "1GiB"
    values["search"] |= {"rank": [4], "method": ["rslora", "rsadalora"]}
    values["training"] |= {"batch_size": 5, "steps": 6, "num_evals": 3}
    labelled = folder / "labelled"
    labelled.mkdir(exist_ok=True)
    for split, first, count in (("train", 0, 33), ("validation", 100, 7)):
        lines = [{"text": row["prompt"] * (1 + n % 3), "label": "abc"[n % 3]}
                 for n, row in enumerate(rows(count, first))]  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (labelled / f"{split}.jsonl").write_text(text, encoding="utf-8")
    classes = {"name": str(labelled), "label": "label", "max_length": 32}
    deep = {"name": str(write_deep_model(folder / "deep")), "gradient_checkpointing": True}
    return {
        "deep": validate({**values, "model": deep}),
        "classes": validate({**values, "data": classes}),
        "text": validate(values),
    }


def cases(name: str, setup: Setup) -> Iterator[tuple[str, TrialSpec]]:
    """Trials of a study, by name."""
    plain = replace(setup.space.middle(4, "rslora"), micro_batch_size=1, learning_rate=1e-2)
    yield name, plain
    if name != "text":
        return
    adalora = replace(setup.space.middle(4, "rsadalora"), micro_batch_size=2)
    assert adalora.allocation is not None
    for recovery in ("none", "paper"):
        allocation = replace(adalora.allocation, recovery=recovery, tinit=1, tfinal=1, delta_t=2)
        yield f"adalora {recovery}", replace(adalora, allocation=allocation)
    yield "sgd", replace(plain, micro_batch_size=3, optimizer="sgd", learning_rate=0.3)
    yield "diverged", replace(plain, optimizer="sgd", learning_rate=1e30, max_grad_norm=None)
    yield "stopped", plain
    full = replace(plain, seed=FULL_SEED)
    after = replace(plain, seed=plain.seed + 1)
    # Nothing comes after it where the base is sharded.
    both = [("after", after), (FULL, full)]
    yield from both if setup.spread.shards_base else reversed(both)


def train(bench: Bench, name: str, spec: TrialSpec, out: Path) -> dict[str, Any]:
    """What a trial gives, and its adapter in a folder of its name."""
    found: dict[str, Any] = {"outcome": "complete"}
    with Trial(bench, spec) as trial:
        try:
            for point in trial.steps():
                if name == "stopped" and point.step == 3:
                    break
        except (Diverged, OutOfMemory) as error:
            found["outcome"] = f"{type(error).__name__}: {error}"
        curve = [(p.step, p.train_loss, p.eval_loss, p.grad_norm, p.metrics) for p in trial.curve]
        found |= {"curve": curve, "ranks": trial.rank_pattern, "peak": trial.measured_peak_bytes}
        found["tokens"] = trial.last.tokens if trial.last else 0
        if found["outcome"] == "complete":
            trial.save(out / name, "")
    return found


def train_all(folder: Path, out: Path, spread: Spread = ALONE) -> dict[str, Any]:
    """Every case, on this process and those that follow it."""
    found: dict[str, Any] = {}
    for name, config in configs(folder).items():
        setup = set_up(config, None, spread)
        loaded = load_everywhere(setup)
        bench = Bench(
            model=loaded.model,
            base_name=name,
            data=setup.data,
            device=setup.device,
            fresh_parameters=loaded.fresh_parameters,
            spread=spread,
        )
        result = untouched(bench, 2, seed=1)
        found[f"untouched {name}"] = {"loss": result.eval_loss, "metrics": result.metrics}
        for case, spec in cases(name, setup):
            found[case] = train(bench, case, spec, out)
        rows, _ = setup.rows_of_a_device(config.training.batch_size)
        predicted = setup.planner.predict(4, batch_size=rows, micro_batch_size=1)
        found[name]["predicted"] = predicted.peak_bytes
    return found


def fail_where_told() -> None:
    """In the case FULL this process finds no room in the middle of its fourth step."""
    prepare, passes = Trial._prepare, loop._backward
    left: list[int] = []

    def preparing(trial: Trial) -> None:
        left[:] = [7] if trial.spec.seed == FULL_SEED else [10**9]
        prepare(trial)

    def failing(*arguments: Any) -> float:
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("no room here")
        return passes(*arguments)

    patched: Any = Trial
    patched._prepare = preparing
    loop._backward = failing  # type: ignore[assignment]


def start(
    command: list[str], num: int = 2, stdin: bool = False, **env: str
) -> list[subprocess.Popen[str]]:
    """The same command in several processes, as a launcher starts it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    meet = {"WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **env}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**environment(), **meet, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE if stdin else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num)
    ]


def main(folder: Path, out: Path) -> None:
    if is_follower():
        try:
            follow()
        except RsautoError as error:
            sys.exit(error.exit_code)
        return
    spread = join()
    with leading(spread):
        try:
            found = train_all(folder, out, spread)
        except RsautoError as error:
            found = {"error": str(error)}
    (out / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    if os.environ.get("FAILS") == os.environ["RANK"]:
        fail_where_told()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
