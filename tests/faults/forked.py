"""Studies in forked children of a process that has run one already: a start costs no imports.

And what is on the disk at every moment a study writes. A process that is killed leaves what its
system calls have written so far, so a copy of the folder before each of them is the folder of one
that was killed there.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from processes import ended, in_child
from safetensors.torch import load_file
from tiny_study import records, study_values

from rsauto.config import StudyConfig
from rsauto.errors import RsautoError
from rsauto.search.driver import study_events
from rsauto.search.events import Stage
from rsauto.study_command import quieten_libraries
from rsauto.study_file import validate

VARYING = {"train_seconds", "tokens_per_second", "worker", "started_at"}
"""Fields of a record that are clocks, or name the process: they differ from run to run."""

OF_RETRIES = {"number", "retry_of"}
"""Fields that tell that a trial was broken off before."""

PUBLISHING = "publishing adapters"
_OF_REPORTS = (".best.", ".recommended.", ".report.", ".tradeoff.")

WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
"""Audit events beside `open` before which a study's folder may be about to change."""


def tiny(folder: Path, packed: int = 1, **search: Any) -> StudyConfig:
    """A study of a few seconds: refused ranks, defaults, what opens a search."""
    values = study_values(folder, **{"trials": 4, **search})
    values["training"] |= {"steps": 2 if packed == 1 else 8, "num_evals": 2}
    values["packing"] = {"trials": packed}
    if packed > 1:
        values["pack_memory_budget"] = "1GiB"
    return validate(values)


def run_to(config: StudyConfig, out: Path, stage: str | None = None) -> int:
    """What the command does with a study, up to a stage; its message to stderr, its exit code."""
    quieten_libraries()
    try:
        for event in study_events(config, out):
            if isinstance(event, Stage) and event.name == stage:
                break
    except RsautoError as error:
        os.write(2, f"{error}\n".encode())
        return error.exit_code
    return 0


def require_continued(config: StudyConfig, out: Path, stage: str | None = None) -> None:
    """The same command continues the study in ``out``, and comes to the end, or to ``stage``."""
    code, said = in_child(lambda: run_to(config, out, stage), out.with_name(f"{out.name}.log"))
    assert code == 0, said


@dataclass(frozen=True)
class Undisturbed:
    """A study that nothing happened to."""

    config: StudyConfig
    out: Path
    cpu_seconds: float
    """Of a processor, up to the report."""


def undisturbed_in(folder: Path) -> Undisturbed:
    """Runs it in this process first, by which everything is imported and planned."""
    os.environ.setdefault("RSAUTO_CACHE_DIR", str(folder / "cache"))
    config = tiny(folder / "study")
    out = folder / "undisturbed"
    assert run_to(config, out) == 0
    begin = time.process_time()
    assert run_to(config, folder / "timed", PUBLISHING) == 0
    return Undisturbed(config, out, time.process_time() - begin)


def comparable(out: Path, besides: set[str] = OF_RETRIES) -> list[dict[str, Any]]:
    """The records without what varies."""
    left_out = VARYING | besides
    return [{k: v for k, v in record.items() if k not in left_out} for record in records(out)]


def require_equal(out: Path, expected: Path, besides: set[str] = OF_RETRIES) -> None:
    """The same records in both folders, apart from what varies."""
    ours, theirs = comparable(out, besides), comparable(expected, besides)
    assert len(ours) == len(theirs), f"{len(ours)} records instead of {len(theirs)}: {ours}"
    for one, other in zip(ours, theirs, strict=True):
        differing = [name for name in other if one[name] != other[name]]
        assert not differing, [(name, one[name], other[name]) for name in differing]


def require_sound(out: Path, *, has_report: bool = False) -> None:
    """Every trial once, every adapter whole, nothing left behind that nobody will take up.

    What a killed process left of a report goes when the report is written.
    """
    numbers = [record["number"] for record in records(out)]
    assert len(set(numbers)) == len(numbers), numbers
    for weights in sorted(out.rglob("adapter_model.safetensors")):
        assert load_file(weights), weights
        assert (weights.parent / "adapter_config.json").stat().st_size, weights
    left = [path.name for path in out.rglob("*") if path.name.endswith((".partial", ".old"))]
    if not has_report:
        left = [name for name in left if not name.startswith(_OF_REPORTS) and ".svg." not in name]
    assert not left, left


# ---------------------------------------------------------------- every moment of writing


class Moments:
    """Calls ``at`` with a name before every operation that may change a folder."""

    def __init__(self, folder: Path, at: Callable[[str], None]) -> None:
        self._root = str(folder.absolute())
        self._at = at
        self._is_busy = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, details: tuple[Any, ...]) -> None:
        if self._is_busy or not (event in WRITES or event == "open"):
            return
        name = self._name(event, details)
        if name is None:
            return
        self._is_busy = True
        try:
            self._at(name)
        finally:
            self._is_busy = False

    def _name(self, event: str, details: tuple[Any, ...]) -> str | None:
        path = details[0]
        if isinstance(path, int) or (event == "open" and not _is_writing(*details[1:3])):
            return None
        path = os.fsdecode(path)
        # shutil.rmtree names what it removes within an open folder.
        if event in ("os.remove", "os.rmdir") and not os.path.isabs(path) and details[-1] != -1:
            return f"{event} {path}"
        path = os.path.abspath(path)
        if path != self._root and not path.startswith(f"{self._root}/"):
            return None
        return f"{event} {os.path.relpath(path, self._root)}"


def _is_writing(mode: str | None, flags: int) -> bool:
    if mode is not None:
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def copied(folder: Path, to: Path) -> Path:
    """A copy of a folder as it is; none where there is none."""
    if folder.exists():
        shutil.copytree(folder, to, symlinks=True)
    return to


def images(config: StudyConfig, work: Path) -> list[tuple[str, Path]]:
    """The folder of one study before each of its writes, and in the middle of them."""
    out, kept = work / "out", work / "images"
    kept.mkdir(parents=True)

    def recorded() -> int:
        count = iter(range(10**6))

        def keep(name: str) -> None:
            safe = name.replace("/", "+").replace(" ", ",")
            copied(out, kept / f"{next(count):04d},{safe}")

        Moments(out, keep)
        return run_to(config, out)

    code, said = in_child(recorded, work / "images.log")
    assert code == 0, said
    found = [(path.name, path) for path in sorted(kept.iterdir())]
    return list(_distinct([*found, *_torn(found)]))


def _torn(found: list[tuple[str, Path]]) -> Iterator[tuple[str, Path]]:
    """What a kill in the middle of a write leaves: half of what came to the journal, or a file."""
    for (name, before), (_, after) in pairwise(found):
        if ",open," not in name:
            continue  # a file that is renamed is there or it is not
        for grown in sorted(after.rglob("*")):
            own = grown.relative_to(after)
            old = (before / own).stat().st_size if (before / own).is_file() else 0
            if not grown.is_file() or grown.stat().st_size <= old + 1 or own.name == ".lock":
                continue
            torn = copied(after, after.with_name(f"{name},torn"))
            os.truncate(torn / own, (old + grown.stat().st_size) // 2)
            yield torn.name, torn
            break


def _distinct(found: list[tuple[str, Path]]) -> Iterator[tuple[str, Path]]:
    seen = set()
    for name, path in found:
        content = tuple(
            (str(file.relative_to(path)), hash(file.read_bytes()) if file.is_file() else 0)
            for file in sorted(path.rglob("*"))
            if file.name != ".lock"
        )
        if content not in seen:
            seen.add(content)
            yield name, path


# ---------------------------------------------------------------- at any moment at all


def killed_after(pid: int, cpu_seconds: float) -> bool:
    """SIGKILL once a child has used that much of a processor; False where it ended before.

    By its own clock, since a machine may be busy with other things.
    """
    ticks = cpu_seconds * os.sysconf("SC_CLK_TCK")
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "the study ended with an error"
            return False
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if int(fields[11]) + int(fields[12]) >= ticks:
            os.kill(pid, signal.SIGKILL)
            assert ended(pid) == -signal.SIGKILL
            return True
        time.sleep(0.003)
