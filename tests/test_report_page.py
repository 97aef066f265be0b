"""The files of a report: made from records alone, safe to open, the same every time."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pandas as pd
import pytest
from test_report_records import allocated, record, study_records, with_loss, write_study
from typer.testing import CliRunner

from rsauto.cli import app
from rsauto.report.page import FIGURES, csv_bytes, write_report
from rsauto.report.predictions import predictions_panel
from rsauto.report.table import table
from rsauto.units import (
    bytes_text,
    count_text,
    difference_text,
    percent_text,
    rate_text,
    seconds_text,
    value_text,
)

FILES = ["report.html", "report.md", "tradeoff.csv", "tradeoff.parquet"]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_study(tmp_path_factory.mktemp("study"), study_records())
    write_report(made)
    return made


def test_all_files_are_there_and_nothing_else(folder: Path) -> None:
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    figures = {f"figures/{key}.svg" for key in FIGURES}
    assert names == {*FILES, *figures, "study.yaml", "environment.json", "trials.jsonl"}


def test_the_page_leads_with_the_verdict(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Take rank 64 (alpha 16, learning rate 1.6e-3, rsLoRA)" in page
    assert page.index("Take rank 64") < page.index("What each rank costs") < page.index("Figures")
    assert page.count("plotly.js v") == 1, "plotly.js is embedded once"
    for key in FIGURES:
        assert f'id="plot-{key}"' in page


def test_the_page_loads_nothing_from_elsewhere(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    own = page.replace(re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[0], "")
    assert "http://" not in own and "https://" not in own and " src=" not in own
    assert "default-src 'none'" in own and "showSendToCloud: false" in own


def test_report_md_shows_the_verdict_and_every_figure(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "Take rank 64" in text and "## What each rank costs and what it buys" in text
    for key in FIGURES:
        assert f"(figures/{key}.svg)" in text
    assert "<script>" not in text and r"\| =1+1" in text


def test_figures_are_well_formed_svg_without_a_date(folder: Path) -> None:
    for key in FIGURES:
        data = (folder / "figures" / f"{key}.svg").read_bytes()
        assert ET.fromstring(data).tag.endswith("svg")
        assert b"<dc:date>" not in data


def test_the_same_records_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_report(write_study(tmp_path, study_records()))
    for name in [*FILES, *(f"figures/{key}.svg" for key in FIGURES)]:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_csv_and_parquet_read_back(folder: Path) -> None:
    trials = table(study_records())
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "tradeoff.parquet"), trials)
    dtypes = {name: str(dtype) for name, dtype in trials.dtypes.items()}
    csv = pd.read_csv(folder / "tradeoff.csv", dtype=dtypes)  # type: ignore[arg-type]
    pd.testing.assert_frame_equal(csv, trials)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_csv_cells_are_no_formulas(text: str) -> None:
    data = csv_bytes(table([record(0, 8, -1e-3, error=text, metrics={"=cmd": -0.5})]))
    frame = pd.read_csv(io.BytesIO(data), lineterminator="\n")
    assert str(frame["error"][0]).startswith("'")
    assert "'=cmd" in frame.columns and frame["'=cmd"][0] == -0.5, "numbers stay numbers"
    assert frame["learning_rate"][0] == -1e-3


def test_hostile_text_is_escaped_wherever_it_may_come_from(tmp_path: Path) -> None:
    trials = [
        with_loss(record(0, 8, 1e-3), 1.0),
        with_loss(record(1, 8, 2e-3, metrics={}, worker=HOSTILE), 1.1),
        record(2, 8, 1e-3, outcome="failed", error=HOSTILE),
        record(3, 8, 1e-3, target_modules=(HOSTILE, "$x_1$")),
        with_loss(allocated(4, {f"a.0.{HOSTILE}": 3, "a.0.$x_1$": 1}), 1.2),
    ]
    trials[0].metrics[HOSTILE] = 0.5
    write_report(write_study(tmp_path, trials, environment={HOSTILE: {"<b>": HOSTILE}}))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "alert(1)" in page, "the text is shown"
    assert "<script>alert" not in page and "<img" not in page.replace('"<img', "")
    figures = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)
    # Nothing was measured in these records.
    assert figures is not None and set(json.loads(figures[1])) == {*FIGURES} - {"predictions"}
    assert "<script>" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_an_empty_study_gives_a_report(tmp_path: Path) -> None:
    verdict = write_report(write_study(tmp_path, [], environment=None))
    assert verdict.recommended is None
    for name in ("report.html", "report.md"):
        assert "The study has no trials yet" in (tmp_path / name).read_text(encoding="utf-8")
    assert len(pd.read_csv(tmp_path / "tradeoff.csv")) == 0
    assert len((tmp_path / "report.html").read_bytes()) < 50_000, "no figures, no plotly.js"


def test_a_study_of_refused_trials_gives_a_report(tmp_path: Path) -> None:
    refused = [record(n, 256 * (n + 1), 1e-3, outcome="infeasible") for n in range(2)]
    write_report(write_study(tmp_path, refused))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Ranks 256 and 512 do not fit the memory budget of 32.0 MiB" in text


@pytest.mark.parametrize("count", [1, 12])
def test_a_study_in_progress_gives_a_report(tmp_path: Path, count: int) -> None:
    verdict = write_report(write_study(tmp_path, study_records()[:count]))
    assert verdict.num_trials == count
    assert (tmp_path / "report.html").stat().st_size > 0


def test_figures_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    write_report(write_study(tmp_path, study_records()[:1]))
    assert list((tmp_path / "figures").iterdir())
    write_report(write_study(tmp_path, []))
    assert not list((tmp_path / "figures").iterdir())


def test_an_unwritable_folder_is_the_users_to_read(tmp_path: Path) -> None:
    write_study(tmp_path, [])
    (tmp_path / "report.html").mkdir()
    with pytest.raises(IsADirectoryError):
        write_report(tmp_path)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "the report cannot be written" in result.stderr


def test_reports_need_neither_torch_nor_optuna(tmp_path: Path) -> None:
    write_study(tmp_path, study_records())
    script = (
        "import sys\n"
        "for name in ('torch', 'optuna', 'transformers', 'peft', 'accelerate', 'datasets'):\n"
        "    sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "import rsauto.report\n"
        "from rsauto.report.page import write_report\n"
        "print(write_report(Path(sys.argv[1])).recommended.rank)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "64"), done.stderr


def test_numbers_as_people_read_them() -> None:
    assert [bytes_text(n) for n in (None, 512, 1536, 21.3 * 2**20, 24 * 2**30)] == [
        "-", "512 B", "1.50 KiB", "21.3 MiB", "24.0 GiB"
    ]  # fmt: skip
    assert [rate_text(x) for x in (1.2e-3, 5e-5, 2e-3, 1.0, 1.25e-4)] == [
        "1.2e-3", "5e-5", "2e-3", "1e0", "1.25e-4"
    ]  # fmt: skip
    assert [value_text(x) for x in (1.23, 0.12345, 1234.4, None)] == [
        "1.230",
        "0.1235",
        "1234",
        "-",
    ]
    assert [percent_text(x) for x in (0.01, 0.0891, 0.0034, 0.2)] == [
        "1 %", "8.9 %", "0.34 %", "20 %"
    ]  # fmt: skip
    assert difference_text(0.12345, 0.0312) == "0.123 ± 0.031"
    assert difference_text(123.4, 20.0) == "123 ± 20" and difference_text(0.5, None) == "0.5"
    assert [seconds_text(x) for x in (8.16, 725.0, 12000.0)] == [
        "8.2 s",
        "12 min 5 s",
        "3 h 20 min",
    ]
    assert [count_text(x) for x in (9216, 36864, 1.18e6, 1.1e12)] == [
        "9216", "36.9 k", "1.18 M", "1.10e12"
    ]  # fmt: skip


def test_measured_peaks_are_shown_beside_predicted_ones() -> None:
    mib = 2**20
    peaks = [(100, 97), (200, 204), (300, None)]
    records = [
        record(
            number,
            8,
            1e-3,
            predicted_peak_bytes=predicted * mib,
            measured_peak_bytes=None if measured is None else measured * mib,
        )
        for number, (predicted, measured) in enumerate(peaks)
    ]
    panel = predictions_panel(table(records))
    assert panel is not None
    line, points = panel.layers
    assert line.x == line.y == (100.0, 200.0)
    assert (points.x, points.y) == ((100.0, 200.0), (97.0, 204.0))
    assert panel.caption.startswith("2 trials that ran alone: the measured peak is 97.0% to")
    assert points.hover[1].endswith("measured 204.0 MiB (+2.0%)")
    assert predictions_panel(table(records[2:])) is None
