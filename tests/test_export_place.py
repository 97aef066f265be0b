"""Where an export is written, and what it says to type, whatever the folders are called."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
from pathlib import Path

import pytest

from rsauto.atomic import clear_leftovers
from rsauto.errors import InputError
from rsauto.export_command import _lines
from rsauto.exports.place import built, require_free, write_mark
from rsauto.exports.run import Exported, _test_metrics, _trained
from rsauto.report.table import load_study

REPORTS = Path(__file__).parents[1] / "reports"


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_the_folder_it_runs_in_is_not_replaced(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(InputError, match="holds the folder this runs in"):
        require_free(Path(name), force=True)
    require_free(Path("below"), force=False)


def test_what_killed_processes_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    place, host = tmp_path / "a.b", socket.gethostname()
    for pid, ending in ((dead.pid, "partial"), (dead.pid, "old"), (os.getppid(), "partial")):
        (tmp_path / f".a.b.{host}.{pid}.{ending}").mkdir()
    others = (f".a.b.elsewhere.{dead.pid}.partial", f".a.c.{host}.{dead.pid}.partial")
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / f".a.b.{host}.{dead.pid}.old" / "kept").touch()
    clear_leftovers(place)
    assert (place / "kept").exists(), "killed between the two renames"
    living = f".a.b.{host}.{os.getppid()}.partial"
    assert {path.name for path in tmp_path.iterdir()} == {"a.b", living, *others}
    (tmp_path / f".a.b.{host}.{dead.pid}.old").mkdir()
    clear_leftovers(place)
    assert {path.name for path in tmp_path.iterdir()} == {"a.b", living, *others}


def test_what_comes_while_an_export_is_built_is_not_deleted(tmp_path: Path) -> None:
    place = tmp_path / "export"
    with built(place) as new:
        write_mark(new, {"to": "card", "files": []})
    with pytest.raises(InputError, match=r"it holds mine\.txt, which"), built(place) as new:
        write_mark(new, {"to": "card", "files": []})
        (place / "mine.txt").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert sorted(path.name for path in place.iterdir()) == ["export.json", "mine.txt"]


def test_the_command_can_be_pasted() -> None:
    out = Path("my runs/a $(b)")
    (line,) = (
        one
        for one in _lines(Exported(out=out, to="trl", trial=3, files=(), command="trl sft"))
        if one.startswith("run ")
    )
    assert shlex.split(line)[1:3] == ["cd", str(out)]


def test_a_spoiled_record_of_a_training_is_named() -> None:
    record = load_study(REPORTS / "gsm8k-embedded").records[0]
    assert _trained(record, {"eval_loss": 1.25}).eval_loss == 1.25
    with pytest.raises(InputError, match=r"is not what rsauto train wrote: gamma_r is 'much'"):
        _trained(record, {"gamma_r": "much"})
    assert _test_metrics({"test": [1]}) == {}
