"""A study of very many trials: time per trial, memory and files over its length.

    python tests/faults/test_long.py --trials 2000 [--storage journal|sqlite] [--out FILE]

prints a line for every tenth of the study. Trials are as small as they come (a two-layer model, one
step), so that what grows is what rsauto and Optuna keep.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
import pytest
from tiny_study import records, study_values

from rsauto import study_file
from rsauto.search.driver import study_events
from rsauto.search.events import TrialSettled

WINDOWS = 10


@dataclass(frozen=True, kw_only=True)
class Window:
    """One tenth of a study."""

    storage: str
    trials: int
    """Settled at its end."""
    ms_per_trial: float
    rss_mib: float
    """Of the process at its end, after a garbage collection."""
    storage_kib_per_trial: float
    """Of the journal or database at its end."""
    folder_files: int
    """In the study folder at its end."""


def long_study(folder: Path, num_trials: int, storage: str) -> list[Window]:
    """The windows of a study that ran to its end."""
    values = study_values(folder, trials=num_trials, rank=[2, 4, 8], seeds=1)
    values["search"] |= {"strategy": "random", "learning_rate": {"low": 1e-5, "high": 1e-1}}
    values["training"] = {"steps": 1, "batch_size": 2, "num_evals": 1}
    values["packing"] = {"mode": "off"}
    out, file = folder / "out", folder / "study.db"
    url = f"sqlite:///{file}" if storage == "sqlite" else None
    kept = file if storage == "sqlite" else out / "journal.log"
    windows: list[Window] = []
    begin, each = time.monotonic(), num_trials // WINDOWS
    for event in study_events(study_file.validate(values), out, storage=url, report=False):
        if isinstance(event, TrialSettled) and event.num_settled % each == 0:
            now = time.monotonic()
            gc.collect()
            windows.append(
                Window(
                    storage=storage,
                    trials=event.num_settled,
                    ms_per_trial=round(1000 * (now - begin) / each, 1),
                    rss_mib=round(psutil.Process().memory_info().rss / 2**20, 1),
                    storage_kib_per_trial=round(kept.stat().st_size / 1024 / event.num_settled, 2),
                    folder_files=sum(path.is_file() for path in out.rglob("*")),
                )
            )
            begin = time.monotonic()
    return windows


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
@pytest.mark.sample(1)
def test_a_trial_late_in_a_study_leaves_no_more_than_an_early_one(
    tmp_path: Path, storage: str
) -> None:
    windows = long_study(tmp_path, 40, storage)
    lines = records(tmp_path / "out")
    assert [line["number"] for line in lines] == sorted({line["number"] for line in lines})
    assert sum(line["outcome"] == "complete" for line in lines) >= 40
    middle, last = windows[4], windows[-1]
    assert last.rss_mib < middle.rss_mib + 40, windows
    assert last.storage_kib_per_trial < 1.2 * middle.storage_kib_per_trial, windows
    assert last.folder_files <= middle.folder_files + 40, windows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--storage", choices=("journal", "sqlite"), default="journal")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = [asdict(w) for w in long_study(Path(place), chosen.trials, chosen.storage)]
    for window in found:
        print(json.dumps(window))
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
