"""A disk that is full, read-only or damaged, files that vanish, two processes in one folder.

Every error names the file and what to do, and the same command goes on once it is done.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from forked import (
    PUBLISHING,
    Moments,
    Undisturbed,
    copied,
    require_continued,
    require_equal,
    require_sound,
    run_to,
)
from processes import ended, forked, in_child

CONTINUES = "run the same command again"
SIZES = tuple(map(int, os.environ.get("RSAUTO_DISK_KIB", "24,64,112,160").split(",")))
"""KiB of disks too small for the study."""
EVERY = int(os.environ.get("RSAUTO_DISK_EVERY", "5"))
"""Every how many writes the disk is found full; 1 is all of them."""


# ---------------------------------------------------------------- full


class FullDisk:
    """Before writes of a study, a child of it that finds the disk full from there on.

    The study itself goes on: what its child did to the folder is undone.
    """

    def __init__(self, out: Path, work: Path) -> None:
        self._out = out
        self._work = work
        self._count = 0
        self._is_full = False
        Moments(out, self._at)

    def _at(self, name: str) -> None:
        if name.startswith(("os.remove", "os.rmdir")):
            return  # which a full disk does not refuse
        if self._is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._count += 1
        if self._count % EVERY:
            return
        log = self._work / f"{self._count:04d},{name.replace('/', '+')}.log"
        before = copied(self._out, self._work / "before")
        pid = os.fork()
        if pid == 0:
            file = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1)
            os.dup2(file, 2)
            self._is_full = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        code = ended(pid)
        log.rename(log.with_suffix(f".{code}"))
        put_back(before, self._out)
        shutil.rmtree(before, ignore_errors=True)


def put_back(before: Path, out: Path) -> None:
    """Makes the folder what it was. Files that did not change stay themselves: some are open."""
    for path in sorted(out.rglob("*"), reverse=True):
        if not (before / path.relative_to(out)).exists():
            path.rmdir() if path.is_dir() else path.unlink()
    for path in sorted(before.rglob("*")):
        own = out / path.relative_to(before)
        if path.is_dir():
            own.mkdir(exist_ok=True)
        elif not own.exists() or own.read_bytes() != path.read_bytes():
            shutil.copyfile(path, own)


def test_a_disk_that_is_full_from_any_write_on_ends_the_study_with_one_message(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir()

    def watched() -> int:
        FullDisk(out, work)
        return run_to(undisturbed.config, out)

    code, said = in_child(watched, tmp_path / "log")
    assert code == 0, said
    require_equal(out, undisturbed.out)
    found = sorted(work.glob("*.*"))
    assert len(found) > 100 // EVERY
    for log in found:
        said = log.read_text(encoding="utf-8")
        where = f"{log.name}: {said}"
        assert log.suffix in (".4", ".2"), where
        assert "Traceback" not in said and said.count("\n") == 1, where
        assert str(out) in said and "No space left" in said, where
        assert CONTINUES in said or (log.suffix == ".2" and "cannot be made" in said), where


@contextmanager
def small_disk(place: Path, options: str) -> Iterator[None]:
    """A file system of its own; skips where this user cannot make one."""
    place.mkdir()
    try:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)])
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if made.returncode:
        pytest.skip("only root mounts file systems")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("kib", SIZES)
@pytest.mark.sample(2)
def test_a_disk_that_gets_full_costs_nothing_that_was_settled(
    undisturbed: Undisturbed, tmp_path: Path, kib: int
) -> None:
    with small_disk(tmp_path / "disk", f"size={kib}k"):
        out = tmp_path / "disk" / "out"
        code, said = in_child(lambda: run_to(undisturbed.config, out), tmp_path / "log")
        assert code in (2, 4) and CONTINUES in said and str(out) in said, said
        assert "Traceback" not in said
        remount(tmp_path / "disk", "size=64m")
        require_continued(undisturbed.config, out, PUBLISHING)
        require_equal(out, undisturbed.out)
        require_sound(out)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def test_a_read_only_folder_is_refused_before_anything_is_read(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "size=64m"):
        out = copied(undisturbed.out, tmp_path / "disk" / "out")
        remount(tmp_path / "disk", "ro")
        for folder in (out, tmp_path / "disk" / "new"):
            code, said = in_child(partial(run_to, undisturbed.config, folder), tmp_path / "log")
            assert code == 2
            assert said.startswith(f"--out {folder}: no permission to write in "), said


# ---------------------------------------------------------------- gone


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


EVERYTHING_ELSE = (
    "study.yaml", "environment.json", "trials.jsonl", ".study-id", ".lock", ".journal.log.users",
    ".journal.log.writer", "report.html", "figures",
)  # fmt: skip


def test_what_can_be_made_again_is(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Everything but the journal, at once; and the best adapter is not the one that was written."""
    out = copied(undisturbed.out, tmp_path / "out")
    for name in (*EVERYTHING_ELSE, "recommended"):
        remove(out / name)
    damage(next((out / "best").glob("*.safetensors")), -3)
    for weights in out.glob("adapters/*/adapter_model.safetensors"):
        damage(weights, -3)
    require_continued(undisturbed.config, out)
    require_equal(out, undisturbed.out, set())
    require_sound(out, has_report=True)
    for name in ("best", "recommended"):
        ours, theirs = (f / name / "adapter_model.safetensors" for f in (out, undisturbed.out))
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert {path.name for path in out.iterdir()} == {p.name for p in undisturbed.out.iterdir()}


@pytest.mark.parametrize("name", ["journal.log", "."])
def test_what_vanishes_under_a_running_study_is_named(
    undisturbed: Undisturbed, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    gone: list[str] = []

    def vanish(moment: str) -> None:
        if not gone and moment.startswith("open adapters/.0003"):
            gone.append(moment)
            remove(out / name)

    def watched() -> int:
        Moments(out, vanish)
        return run_to(undisturbed.config, out)

    code, said = in_child(watched, tmp_path / "log")
    assert code == 4, said
    assert said.startswith(str(out / name)) and "No such file" in said and CONTINUES in said, said


# ---------------------------------------------------------------- damaged


def damage(path: Path, place: int, bit: int = 0) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_damaged_records_are_named_and_written_anew(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    from rsauto.errors import InputError
    from rsauto.report.table import load_study

    out = copied(undisturbed.out, tmp_path / "out")
    path = out / "trials.jsonl"
    whole = path.read_bytes()
    broken: tuple[Callable[[], object], ...] = (
        lambda: path.write_bytes(whole[: len(whole) // 2]),
        lambda: damage(path, 0, 2),
        lambda: damage(path, len(whole) // 2, 7),
    )
    for spoil in broken:
        path.write_bytes(whole)
        spoil()
        with pytest.raises(InputError, match=r"trials\.jsonl"):
            load_study(out)
    require_continued(undisturbed.config, out, PUBLISHING)
    assert path.read_bytes() == whole


def test_two_that_begin_at_the_same_moment_do_not_mix(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    logs = [tmp_path / "one.log", tmp_path / "other.log"]
    pids = [forked(lambda: run_to(undisturbed.config, out, PUBLISHING), log) for log in logs]
    codes = [ended(pid) for pid in pids]
    said = [log.read_text(encoding="utf-8") for log in logs]
    assert sorted(codes) == [0, 2], said
    refused = said[codes.index(2)]
    assert f"another process (pid {pids[codes.index(0)]}) is working on this study" in refused
    require_equal(out, undisturbed.out, set())
