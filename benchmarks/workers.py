"""What many workers at one study cost: the shared ledger beside bare Optuna on the same server.

    python benchmarks/workers.py [--quick] [--json] [--trials N] [--workers N]
                                 [--out reports/benchmarks/workers.json]

A PostgreSQL server is started for it. Forked processes work on one study whose objective is a
formula, so that all that takes time is keeping the books. Both halves run one after the other, with
as many processes, on the same cores; Optuna's has at most 1000 trials, which is to its advantage,
for a trial costs it more the more there are. A size that was measured before keeps its place in the
file, beside the new one.

rsauto   `Work` proposes with the random sampler, begins and settles: what a study does between two
         trials, packs and folder left out
optuna   study.ask with RandomSampler and the same distributions, then study.tell

seconds_per_trial   wall-clock of all over the number of trials: the cores are never idle
cpu_per_trial       processor seconds of the workers, the server's not counted
ratio               rsauto's over Optuna's
growth_per_1000     rise of rsauto's cpu_per_trial with every 1000 trials there are (least squares)
withdrawn           trials that were begun too much and taken back, which cost a proposal each
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import optuna
import torch
from optuna.trial import TrialState

from rsauto.atomic import write_text
from rsauto.environment import describe_environment
from rsauto.records import EvalPoint, TrialRecord, TrialSpec
from rsauto.scaling import gamma_r
from rsauto.search.books import Books
from rsauto.search.ledger import Ledger
from rsauto.search.objective import Objective
from rsauto.search.space import Space
from rsauto.search.storage import driver_url, open_storage
from rsauto.search.work import Work
from rsauto.study_file import validate
from rsauto.training.trial import Bench

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import postgres

MOST_BARE = 1000
"""Trials of bare Optuna."""

Sample = tuple[int, float]
"""Number of a trial, and the processor seconds that its books took."""


def config_of(num_trials: int) -> Any:
    """A study of the random sampler, with nothing kept for seeds."""
    search = {"trials": num_trials, "strategy": "random", "seeds": 1, "pruner": "none"}
    return validate({"name": "many", "search": search, "training": {"steps": 10}})


def loss_of(spec: TrialSpec) -> float:
    """A valley over rank and learning rate."""
    return 1 / math.log2(spec.rank + 1) + abs(math.log10(spec.learning_rate) + 3)


def record_of(spec: TrialSpec, number: int) -> TrialRecord:
    """What a short trial leaves: a curve of four points."""
    loss = loss_of(spec)
    points = (EvalPoint(step=k, train_loss=loss, eval_loss=loss, grad_norm=1.0) for k in (2, 5, 10))
    return TrialRecord(
        number=number, outcome="complete", role=spec.role, method=spec.method, rank=spec.rank,
        alpha=spec.alpha, scaling_rule=spec.scaling_rule, target_modules=spec.target_modules,
        gamma_r=gamma_r(spec.scaling_rule, spec.alpha, spec.rank), curve=tuple(points),
        learning_rate=spec.learning_rate, lr_ratio=spec.lr_ratio, optimizer=spec.optimizer,
        schedule=spec.schedule, batch_size=spec.batch_size, max_length=spec.max_length,
        seed=spec.seed, eval_loss=loss, predicted_peak_bytes=1, memory_budget_bytes=2,
    )  # fmt: skip


def rsauto_worker(url: str, num_trials: int, start: Any, results: Any) -> None:
    """One process of a study as `Work` keeps it."""
    config = config_of(num_trials)
    space = Space(config, config.search.ranks, steps=10, max_length=512)
    ledger = Ledger.join(open_storage(url, Path()), "many")
    books = SimpleNamespace(
        ledger=ledger,
        setup=SimpleNamespace(config=config, space=space),
        objective=Objective("eval_loss", True, 10.0),
    )
    work = Work(cast(Books, books), cast(Bench, None), is_shared=True)
    start.wait()
    samples: list[Sample] = []
    while True:
        begin = time.process_time()
        begun = work._begin(work._propose)
        if begun is None:
            if not work._must_wait:
                break
            time.sleep(0.05)
            continue
        ledger.settle(
            begun.trial, record_of(begun.spec, begun.trial.number), value=loss_of(begun.spec),
            state=TrialState.COMPLETE, constraints={"memory": -1.0, "divergence": 0.0},
        )  # fmt: skip
        samples.append((begun.trial.number, time.process_time() - begin))
    results.put(samples)


def optuna_worker(url: str, num_trials: int, start: Any, results: Any) -> None:
    """The same with Optuna alone. What it begins too much is not counted, nor is that prevented."""
    config = config_of(num_trials)
    space = Space(config, config.search.ranks, steps=10, max_length=512)
    distributions = space.distributions()
    study = optuna.load_study(
        study_name="bare", storage=driver_url(url), sampler=optuna.samplers.RandomSampler()
    )
    start.wait()
    samples: list[Sample] = []
    while True:
        begin = time.process_time()
        trial = study.ask(fixed_distributions=distributions)
        study.tell(trial, loss_of(space.spec(trial.params)))
        if trial.number >= num_trials:
            break
        samples.append((trial.number, time.process_time() - begin))
    results.put(samples)


def run(worker: Callable[..., None], url: str, num_trials: int, num_workers: int) -> Any:
    """Wall-clock of all, and every sample, by number."""
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(num_workers + 1), context.Queue()
    processes = [
        context.Process(target=worker, args=(url, num_trials, start, results))
        for _ in range(num_workers)
    ]
    for process in processes:
        process.start()
    start.wait()
    begin = time.monotonic()
    samples = [sample for _ in processes for sample in results.get()]
    seconds = time.monotonic() - begin
    for process in processes:
        process.join()
    return seconds, sorted(samples)


def measure(num_trials: int, num_workers: int) -> dict[str, Any]:
    """Both halves, each on a server of its own."""
    num_bare = min(num_trials, MOST_BARE)
    row: dict[str, Any] = {"trials": num_trials, "workers": num_workers, "optuna_trials": num_bare}
    with postgres.server() as url:
        optuna.create_study(study_name="bare", storage=driver_url(url))
        seconds, samples = run(optuna_worker, url, num_bare, num_workers)
    assert len(samples) == num_bare
    row["optuna_seconds_per_trial"] = seconds / num_bare
    row["optuna_cpu_per_trial"] = sum(cpu for _, cpu in samples) / num_bare
    with postgres.server() as url:
        Ledger.open(open_storage(url, Path()), config_of(num_trials))
        seconds, samples = run(rsauto_worker, url, num_trials, num_workers)
        trials = optuna.load_study(study_name="many", storage=driver_url(url)).trials
    assert len(samples) == num_trials, "as many as were asked for, and none twice"
    row["rsauto_seconds_per_trial"] = seconds / num_trials
    row["rsauto_cpu_per_trial"] = sum(cpu for _, cpu in samples) / num_trials
    row["withdrawn"] = sum(bool(trial.user_attrs.get("withdrawn")) for trial in trials)
    numbers = np.arange(len(samples)) / 1000
    row["growth_per_1000"] = float(np.polyfit(numbers, [cpu for _, cpu in samples], 1)[0])
    for name in ("seconds", "cpu"):
        ours, theirs = (row[f"{who}_{name}_per_trial"] for who in ("rsauto", "optuna"))
        row[f"{name}_ratio"] = ours / theirs
    return row


def summary(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{row['trials']} trials, {row['workers']} workers: "
        f"{1000 * row['rsauto_seconds_per_trial']:.0f} ms a trial "
        f"({1000 * row['rsauto_cpu_per_trial']:.0f} ms of it in the workers), bare Optuna "
        f"{1000 * row['optuna_seconds_per_trial']:.0f} ms; {row['seconds_ratio']:.1f} times; "
        f"{1000 * row['growth_per_1000']:+.1f} ms with every 1000 trials; "
        f"{row['withdrawn']} taken back"
        for row in rows
    ]
    return "\n".join(lines)


def with_earlier(rows: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """The rows of a file, those measured again in place of the old ones."""
    old = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    found = {(row["trials"], row["workers"]): row for row in (*old, *rows)}
    return [found[size] for size in sorted(found)]


def main(words: Sequence[str] | None = None) -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="100 trials of 4 workers")
    parser.add_argument("--json", action="store_true", help="rows as one JSON object")
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--out", type=Path, default=None, help="file to write the rows to")
    arguments = parser.parse_args(words)
    sizes = (100, 4) if arguments.quick else (arguments.trials, arguments.workers)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = [measure(*sizes)]
    result = {
        "rows": found,
        "environment": describe_environment(torch.device("cpu")),
        "command": " ".join(["python", *sys.argv]),
    }
    print(json.dumps(result) if arguments.json else summary(found))
    out = arguments.out or (None if arguments.quick else Path("reports/benchmarks/workers.json"))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        result["rows"] = with_earlier(found, out)
        write_text(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
