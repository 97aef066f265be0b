"""Studies side by side: the rows are those of each study's own verdict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

import rsauto
from rsauto.cli import app
from rsauto.errors import InputError
from rsauto.report.compare import COLUMNS, comparison
from rsauto.report.table import load_study
from rsauto.report.verdict import judge

REPORTS = Path(__file__).parents[1] / "reports"
SMALL, LARGE, CLASSES = (REPORTS / n for n in ("gsm8k-embedded", "gsm8k-10m", "sst2-minilm"))


@pytest.fixture(scope="module")
def shorter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small study under another name and without its largest rank."""
    folder = tmp_path_factory.mktemp("studies") / "shorter"
    folder.mkdir()
    for name in ("study.yaml", "environment.json"):
        text = (SMALL / name).read_text(encoding="utf-8")
        text = text.replace("name: gsm8k-embedded", "name: shorter")
        text = text.replace("name: ../shared/data/gsm8k", 'name: "<b>rows|"')
        (folder / name).write_text(text, encoding="utf-8")
    lines = (SMALL / "trials.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["rank"] < 128]
    assert 5 < len(kept) < len(lines)
    (folder / "trials.jsonl").write_text("".join(kept), encoding="utf-8")
    return folder


def test_rows_are_what_each_study_says(shorter: Path) -> None:
    rows = rsauto.compare([SMALL, shorter, LARGE])
    assert dict(rows.dtypes.astype(str)) == dict(COLUMNS)
    for (_, row), folder in zip(rows.iterrows(), (SMALL, shorter, LARGE), strict=True):
        study = load_study(folder)
        verdict = judge(study.config, study.records, study.environment)
        chosen = verdict.standings["recommended"]
        assert row["rank"] == chosen.record.rank
        assert row["learning_rate"] == chosen.record.learning_rate
        assert row["objective"] == chosen.objective
        assert row["smallest_budget_bytes"] == chosen.need_bytes
        assert verdict.gain is not None
        assert (row["gain"], row["gain_half_width"]) == (
            verdict.gain.difference,
            verdict.gain.half_width,
        )
        assert row["tokens"] == study.trials["tokens"].sum()
    assert list(rows["same_data_as"]) == ["gsm8k-embedded", "gsm8k-embedded", "gsm8k-10m"]
    assert rows["best_rank"].tolist()[:2] == [128, 64]


def test_a_front_is_drawn_only_where_the_data_are_the_same(shorter: Path) -> None:
    alike = comparison([SMALL, shorter])
    assert alike.front is not None and len(alike.front.layers) == 2
    assert alike.notes == ()
    full, cut = alike.front.layers
    assert max(full.x) > max(cut.x), "the larger rank needs more"
    assert len(full.y) > 2 and list(full.y) == sorted(full.y, reverse=True)
    other = comparison([SMALL, LARGE])
    assert other.front is None
    assert "compare their gains, not their values" in other.notes[0]


def renamed(folder: Path, study: Path) -> Path:
    """The records of a study, under the name that every study has unless it is given one."""
    folder.mkdir()
    for name in ("environment.json", "trials.jsonl"):
        shutil.copyfile(study / name, folder / name)
    text = (study / "study.yaml").read_text(encoding="utf-8")
    text = text.replace(f"name: {study.name}\n", "name: study\n", 1)
    (folder / "study.yaml").write_text(text, encoding="utf-8")
    return folder


def test_studies_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one, other = renamed(tmp_path / "one", SMALL), renamed(tmp_path / "other", LARGE)
    again = renamed(tmp_path / "again", SMALL)
    found = comparison([one, other])
    assert found.front is None and "compare their gains, not their values" in found.notes[0]
    assert found.rows["study"].tolist() == ["study", "study"]
    assert found.rows["same_data_as"].tolist() == [f"study ({one})", f"study ({other})"]
    alike = comparison([one, again])
    assert alike.front is not None
    assert [layer.name for layer in alike.front.layers] == [f"study ({one})", f"study ({again})"]


def test_numbers_in_json_are_whole(tmp_path: Path) -> None:
    folder = renamed(tmp_path / "small-rates", SMALL)
    records = [
        json.loads(line) for line in (folder / "trials.jsonl").read_text("utf-8").splitlines()
    ]
    for record in records:
        record["learning_rate"] *= 1e-6
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "trials.jsonl").write_text(lines, encoding="utf-8")
    done = CliRunner().invoke(app, ["compare", str(folder), str(SMALL), "--json"])
    told = json.loads(done.stdout.splitlines()[-1])
    rows = rsauto.compare([folder, SMALL])
    assert [row["learning_rate"] for row in told] == rows["learning_rate"].tolist()
    assert told[0].keys() == COLUMNS.keys()


def test_the_command_shows_and_writes_them(shorter: Path, tmp_path: Path) -> None:
    out = tmp_path / "side" / "by"
    words = ["compare", str(SMALL), str(shorter), "--out", str(out), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    last = json.loads(done.stdout.splitlines()[-1])
    assert [row["rank"] for row in last] == rsauto.compare([SMALL, shorter])["rank"].tolist()
    assert sorted(path.name for path in out.iterdir()) == [
        "compare.csv",
        "compare.md",
        "compare.svg",
    ]
    text = (out / "compare.md").read_text(encoding="utf-8")
    assert "<b>" not in text and "&lt;b&gt;rows\\|" in text
    assert pd.read_csv(out / "compare.csv")["rank"].tolist() == [row["rank"] for row in last]
    shown = CliRunner().invoke(app, words[:3], env={"COLUMNS": "80"})
    assert "gain over the tuned" in shown.stdout and "<b>rows|" in shown.stdout


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two study folders or more"):
        rsauto.compare([SMALL])
    with pytest.raises(InputError, match=r"eval_loss \(.*\), accuracy \(.*one objective"):
        rsauto.compare([SMALL, CLASSES])
    done = CliRunner().invoke(app, ["compare", str(SMALL), str(tmp_path)])
    assert done.exit_code == 2 and "is not there" in done.output
    shutil.copytree(SMALL, tmp_path / "copy", ignore=shutil.ignore_patterns("best", "journal.log"))
    (tmp_path / "file").write_text("")
    words = ["compare", str(SMALL), str(tmp_path / "copy"), "--out", str(tmp_path / "file")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "cannot be written" in done.output
