"""Does a search learn from running out of memory?

    python studies/out_of_memory.py [--out reports/out-of-memory] [--seeds 0 1 2]

The embedded model with ranks 2 to 4096 under a cap on the bytes of live tensors, above which
allocations fail as on a full GPU, while the study is told that it has far more. So the planner sees
no reason to refuse anything, and the high ranks run out. Compared with the same cap and space under
plain Optuna, where the usual objective lets the error out and the trial is recorded as failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rsauto.config import StudyConfig
from rsauto.environment import describe_environment
from rsauto.search.driver import study_events
from rsauto.search.events import Searching, TrialSettled
from rsauto.search.setup import Setup, set_up
from rsauto.training.trial import Bench, OutOfMemory, Trial

CAP_BYTES = 160 * 2**20
"""Of tensors made since the model was loaded."""

NUM_TRIALS = 30
NUM_FIRST = 8
"""Trials that count as the beginning."""

RANKS = {"low": 2, "high": 4096}
RATES = {"low": 1e-4, "high": 1e-2}
COMPETITORS = ("rsauto transfer", "rsauto tpe", "Optuna, failed trials")


def config_of(strategy: str, seed: int) -> StudyConfig:
    return StudyConfig.model_validate(
        {
            "name": "out-of-memory",
            "memory_budget": "16GiB",
            "data": {"max_length": 32, "validation_rows": 32},
            "training": {"steps": 8, "batch_size": 16, "num_evals": 2, "seed": seed},
            "search": {
                "trials": NUM_TRIALS,
                "strategy": strategy,
                "pruner": "none",
                "rank": RANKS,
                "alpha": [16],
                "learning_rate": RATES,
                "seeds": 1,
                "min_improvement": 0.0,
            },
            "packing": {"mode": "off"},
        }
    )


class Cap(TorchDispatchMode):
    """An allocation that would bring live tensors above CAP_BYTES fails."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        if self.live_bytes > CAP_BYTES:
            raise torch.OutOfMemoryError(f"out of memory: {self.live_bytes} bytes of tensors")
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self.known:
            self.known.add(address)
            self.live_bytes += size
            weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.live_bytes -= size


def outcomes(competitor: str, seed: int) -> Iterator[tuple[int, bool]]:
    """(rank, whether it ran out of memory) of every search trial that was started."""
    if competitor == "Optuna, failed trials":
        yield from _plain_optuna(seed)
        return
    config = config_of(competitor.split()[1], seed)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for event in study_events(config, Path(folder) / "out", report=False):
            if isinstance(event, Searching):
                stack.enter_context(Cap())
            elif isinstance(event, TrialSettled) and event.record.role == "search":
                if event.record.outcome != "infeasible":
                    yield event.record.rank, event.record.outcome == "oom"


def _plain_optuna(seed: int) -> Iterator[tuple[int, bool]]:
    """What a search without a memory model does: the error is caught, and teaches nothing."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    setup = set_up(config_of("tpe", seed))
    bench = _bench(setup)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for _ in range(NUM_TRIALS):
        trial = study.ask()
        rank = 2 ** trial.suggest_int("log2_rank", 1, 12)
        rate = trial.suggest_float("learning_rate", RATES["low"], RATES["high"], log=True)
        spec = replace(setup.space.middle(rank), learning_rate=rate, micro_batch_size=16)
        try:
            with Cap(), Trial(bench, spec) as run:
                for _ in run.steps():
                    pass
                study.tell(trial, run.curve[-1].eval_loss)
                yield rank, False
        except OutOfMemory:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            yield rank, True


def _bench(setup: Setup) -> Bench:
    loaded = setup.load_model()
    return Bench(model=loaded.model, base_name="embedded", data=setup.data, device=setup.device)


def in_a_process(competitor: str, seed: int) -> list[list[Any]]:
    """`outcomes` of a process of its own."""
    command = [sys.executable, __file__, "--one", competitor, str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(competitor: str, runs: list[list[list[Any]]]) -> dict[str, Any]:
    """Rates over all seeds, in the first trials and after them."""
    first = [ran_out for run in runs for _, ran_out in run[:NUM_FIRST]]
    later = [ran_out for run in runs for _, ran_out in run[NUM_FIRST:]]
    return {
        "competitor": competitor,
        "trials": len(first) + len(later),
        "ran_out": sum(first) + sum(later),
        "rate_of_first_trials": round(sum(first) / len(first), 3),
        "rate_of_later_trials": round(sum(later) / len(later), 3) if later else None,
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reports/out-of-memory"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(list(outcomes(arguments.one[0], int(arguments.one[1])))))
        return
    rows = []
    for competitor in COMPETITORS:
        rows.append(row(competitor, [in_a_process(competitor, s) for s in arguments.seeds]))
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "runs"}), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = {
        "rows": rows,
        "environment": describe_environment(torch.device("cpu")),
        "command": "python studies/out_of_memory.py",
    }
    (arguments.out / "rates.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
