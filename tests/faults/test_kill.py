"""A study killed at any moment: what has ended is there once and whole, and the study goes on.

Two ways. A copy of the folder before and in the middle of every write of a study is what a kill
there leaves; each is continued. And a child is killed by SIGKILL after a random share of the
processor's time that a study takes, and again, until the study has come to its end.

By hand, all of both: python tests/faults/test_kill.py --moments 200
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import pytest
from forked import (
    PUBLISHING,
    Undisturbed,
    copied,
    images,
    killed_after,
    require_continued,
    require_equal,
    require_sound,
    run_to,
    undisturbed_in,
)
from processes import forked
from tiny_study import records

from rsauto.search.ledger import MOST_DEATHS

MOMENTS = int(os.environ.get("RSAUTO_KILL_MOMENTS", "8"))
"""Moments of writing; half as many are random."""


@dataclass(frozen=True)
class Watched:
    undisturbed: Undisturbed
    moments: list[tuple[str, Path]]
    """Name and folder of every moment in which something was being written."""


def watched_in(folder: Path, undisturbed: Undisturbed) -> Watched:
    return Watched(undisturbed, images(undisturbed.config, folder / "moments"))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, undisturbed: Undisturbed) -> Watched:
    return watched_in(tmp_path_factory.mktemp("kill"), undisturbed)


def settled_in(out: Path) -> dict[int, object]:
    """Records that the storage of a killed study has, read with nothing of rsauto."""
    journal = out / "journal.log"
    found: dict[int, object] = {}
    for line in journal.read_bytes().splitlines() if journal.exists() else []:
        try:
            record = json.loads(line).get("user_attr", {}).get("record")
        except ValueError:
            continue  # half a line
        if record is not None:
            found[record["number"]] = record
    return found


def require_goes_on(undisturbed: Undisturbed, out: Path, stage: str | None) -> None:
    """The study in ``out``, of a process that was killed, ends as one that was not."""
    before = settled_in(out)
    require_continued(undisturbed.config, out, stage)
    after = {record["number"]: record for record in records(out)}
    assert {n: after.get(n) for n in before} == before, "a finished trial is lost or changed"
    require_equal(out, undisturbed.out)
    require_sound(out, has_report=stage is None)
    if stage is None:
        for name in ("report.html", "best/adapter_config.json", "recommended/README.md"):
            assert (out / name).stat().st_size, name


def sampled(moments: list[tuple[str, Path]], count: int) -> list[tuple[str, Path]]:
    """Some of them, spread over the whole of the study."""
    if count >= len(moments):
        return moments
    return [moments[k * len(moments) // count] for k in range(count)]


def continue_all(watched: Watched, count: int, work: Path, whole: int) -> Iterator[str]:
    """Continues ``count`` studies killed while they wrote, every ``whole``-th up to its report.

    Yields what is wrong with each of them, nothing where it ended as it should. From all over the
    study first, so that the first few are of every kind.
    """
    chosen = list(enumerate(sampled(watched.moments, count)))
    for k, (name, image) in (one for start in range(16) for one in chosen[start::16]):
        out = copied(image, work / f"{k:04d}")
        try:
            require_goes_on(
                watched.undisturbed, out, None if k % whole == whole - 1 else PUBLISHING
            )
            yield ""
        except AssertionError as problem:
            yield f"killed at {name}: {problem}"
        shutil.rmtree(out, ignore_errors=True)


def kill_at_random(undisturbed: Undisturbed, count: int, work: Path, seed: int) -> Iterator[str]:
    """Kills ``count`` processes, one study after another, and continues every study to its end.

    No trial loses more processes than it may: the last that it may lose it is left to finish.
    """
    draw, killed, study = random.Random(seed), 0, 0
    while killed < count:
        out = work / f"study-{study}"
        died: Counter[int] = Counter()
        for _ in range(count):
            if killed >= count or died[len(settled_in(out))] == MOST_DEATHS - 1:
                break
            study_run = partial(run_to, undisturbed.config, out)
            pid = forked(study_run, work / "killed.log")
            if not killed_after(pid, draw.uniform(0, 1.2 * undisturbed.cpu_seconds)):
                break
            died[len(settled_in(out))] += 1
            killed += 1
        try:
            require_goes_on(undisturbed, out, PUBLISHING)
        except AssertionError as problem:
            yield f"seed {seed}, study {study}, after {sum(died.values())} kills: {problem}"
        study += 1


def test_killed_while_it_writes_it_goes_on(watched: Watched, tmp_path: Path) -> None:
    assert len(watched.moments) > 100
    problems = [found for found in continue_all(watched, MOMENTS, tmp_path, whole=MOMENTS) if found]
    assert not problems, "\n".join(problems)


def test_a_rank_that_was_just_being_refused_is_recorded_once(
    watched: Watched, tmp_path: Path
) -> None:
    """It waits to be run again, and is a rank without a record, too."""
    begun = [
        image
        for _, image in watched.moments
        if (image / "journal.log").exists()
        and b'"spec"' in (image / "journal.log").read_bytes()
        and not settled_in(image)
    ]
    require_goes_on(watched.undisturbed, copied(begun[1], tmp_path / "out"), PUBLISHING)


def test_killed_at_any_moment_it_goes_on(undisturbed: Undisturbed, tmp_path: Path) -> None:
    problems = list(kill_at_random(undisturbed, MOMENTS // 2, tmp_path, seed=1))
    assert not problems, "\n".join(problems)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=200, help="kills at random moments")
    parser.add_argument("--writes", type=int, default=10**6, help="moments of writing at most")
    parser.add_argument("--whole", type=int, default=8, help="every how many up to the report")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = undisturbed_in(Path(folder))
        watched = watched_in(Path(folder), undisturbed)
        (work := Path(folder) / "work").mkdir()
        num = min(asked.writes, len(watched.moments))
        print(f"{len(watched.moments)} moments of writing, {num} continued", flush=True)
        problems = 0
        for problem in continue_all(watched, num, work, asked.whole):
            problems += bool(problem)
            print(problem or ".", end="\n" if problem else "", flush=True)
        print(f"{problems} of them did not end as an undisturbed study", flush=True)
        problems = 0
        for problem in kill_at_random(undisturbed, asked.moments, work, asked.seed):
            print(problem, flush=True)
            problems += 1
        print(f"{asked.moments} kills at random: {problems} studies ended otherwise", flush=True)


if __name__ == "__main__":
    main()
