"""What packing does to a whole study: a fixed list of trials on the embedded model, on and off.

    python studies/packing_embedded.py [--out reports/packing]

The list is a grid, so that no result changes what is run: six ranks and two learning rates. Both
runs are made in one process, one after the other; what is timed is the search phase, with the
probe, planning and evaluation in it, from its first trial to its last record.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rsauto.config import StudyConfig
from rsauto.environment import describe_environment
from rsauto.records import TrialRecord
from rsauto.search.driver import study_events
from rsauto.search.events import PackingDecided, TrialSettled

CASES = {"16 rows a step": 16, "4 rows a step": 4, "1 row a step": 1}


@dataclass(frozen=True)
class Run:
    """The search phase of one study."""

    records: list[TrialRecord]
    seconds: float
    size: int
    """Trials at once, as probed."""


def config_of(batch_size: int, mode: str) -> StudyConfig:
    return StudyConfig.model_validate(
        {
            "name": "packing",
            "memory_budget": "64MiB",
            "pack_memory_budget": "2GiB",
            "data": {"max_length": 32, "validation_rows": 64},
            "training": {"steps": 64, "batch_size": batch_size, "num_evals": 2},
            "search": {
                "trials": 14,
                "strategy": "grid",
                "pruner": "none",
                "rank": [2, 4, 8, 16, 32, 64],
                "alpha": [16],
                "learning_rate": [1e-3, 3e-3],
                "seeds": 1,
            },
            "packing": {"mode": mode},
        }
    )


def run(config: StudyConfig) -> Run:
    """One study in a folder of its own."""
    records: list[TrialRecord] = []
    begin = end = time.perf_counter()
    size = 1
    with tempfile.TemporaryDirectory() as folder:
        for event in study_events(config, Path(folder) / "out", report=False):
            if isinstance(event, TrialSettled) and event.record.role == "search":
                records.append(event.record)
                end = time.perf_counter()
            elif isinstance(event, TrialSettled) and not records:
                begin = time.perf_counter()
            elif isinstance(event, PackingDecided):
                size = event.plan.size
    return Run(sorted(records, key=lambda r: (r.rank, r.learning_rate)), end - begin, size)


def row(name: str, batch_size: int) -> dict[str, Any]:
    """Both runs of one case, compared."""
    run(config_of(batch_size, "auto").model_copy(update={"training": _short(batch_size)}))
    off, on = (run(config_of(batch_size, mode)) for mode in ("off", "auto"))
    pairs = list(zip(off.records, on.records, strict=True))
    assert all(a.rank == b.rank and a.learning_rate == b.learning_rate for a, b in pairs)
    losses = [(a.eval_loss, b.eval_loss) for a, b in pairs]
    differences = [abs(mine / other - 1) for other, mine in losses if mine and other]
    return {
        "case": name,
        "trials": len(pairs),
        "at_once": on.size,
        "seconds_off": round(off.seconds, 2),
        "seconds_on": round(on.seconds, 2),
        "ratio": round(off.seconds / on.seconds, 2),
        "largest_relative_difference_of_eval_loss": max(differences),
    }


def _short(batch_size: int) -> Any:
    """A warm-up: plans are then known, and libraries loaded."""
    return config_of(batch_size, "auto").training.model_copy(update={"steps": 6})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reports/packing"))
    out: Path = parser.parse_args().out
    rows = []
    for name, batch_size in CASES.items():
        rows.append(row(name, batch_size))
        print(json.dumps(rows[-1]), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    environment = {**describe_environment(torch.device("cpu")), "threads": torch.get_num_threads()}
    found = {"rows": rows, "environment": environment, "command": "studies/packing_embedded.py"}
    (out / "on-and-off.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
