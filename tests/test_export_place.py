"""Where an export is written, and what it says to type, whatever the folders are called."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from rsauto.errors import InputError
from rsauto.export_command import _lines
from rsauto.exports.place import require_free
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
