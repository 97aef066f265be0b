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
from tiny_study import environment, rows, study_values

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

FULL = "full"
"""The name of the case in which the last process runs out of memory."""


def configs(folder: Path) -> dict[str, StudyConfig]:
    """Studies on one model: odd batches of text, and one of classes with a head of its own."""
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
    checkpointed = {**values["model"], "gradient_checkpointing": True}
    return {
        "text": validate(values),
        "classes": validate({**values, "data": classes}),
        "checkpointed": validate({**values, "model": checkpointed}),
    }


def cases(name: str, setup: Setup) -> Iterator[tuple[str, TrialSpec]]:
    """Trials of a study, by name."""
    plain = replace(setup.space.middle(4, "rslora"), micro_batch_size=1, learning_rate=1e-2)
    yield name, plain
    if name != "text":
        return
    yield "whole", replace(plain, micro_batch_size=3)
    yield "sgd", replace(plain, micro_batch_size=2, optimizer="sgd", learning_rate=0.3)
    adalora = replace(setup.space.middle(4, "rsadalora"), micro_batch_size=2)
    assert adalora.allocation is not None
    for recovery in ("none", "paper"):
        allocation = replace(adalora.allocation, recovery=recovery, tinit=1, tfinal=1, delta_t=2)
        yield f"adalora {recovery}", replace(adalora, allocation=allocation)
    yield "diverged", replace(plain, optimizer="sgd", learning_rate=1e30, max_grad_norm=None)
    yield "stopped", plain
    if not setup.spread.shards_base:
        yield FULL, plain
    yield "after", plain


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
    return found


def fail_once() -> None:
    """From now on the pass after the 53rd finds no room, as on the device of one process alone."""
    passes, calls = loop._backward, iter(range(10**6))

    def failing(*arguments: Any) -> float:
        if next(calls) == 53:
            raise torch.OutOfMemoryError("no room here")
        return passes(*arguments)

    loop._backward = failing  # type: ignore[assignment]


def start(command: list[str], num: int = 2, **env: str) -> list[subprocess.Popen[str]]:
    """The same command in several processes, as a launcher starts it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    meet = {"WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **env}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**environment(), **meet, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num)
    ]


def main(folder: Path, out: Path) -> None:
    if is_follower():
        follow()
        return
    spread = join()
    with leading(spread):
        try:
            found = train_all(folder, out, spread)
        except RsautoError as error:
            found = {"error": str(error)}
    (out / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    if os.environ.get("FAILS") and is_follower():
        fail_once()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
