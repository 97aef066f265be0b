"""The files of a report: made from records alone, safe to open, the same every time."""

from __future__ import annotations

import html
import io
import json
import math
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from test_report_records import (
    allocated,
    record,
    refit,
    study_config,
    study_records,
    with_loss,
    write_study,
)
from typer.testing import CliRunner

from rsauto.cli import app
from rsauto.records import TrialRecord
from rsauto.report.figures import panels
from rsauto.report.importance import importance, importance_panel
from rsauto.report.interactive import interactive
from rsauto.report.page import FIGURES, csv_bytes, write_report
from rsauto.report.panel import Panel
from rsauto.report.predictions import predictions_panel
from rsauto.report.ranks import rank_table
from rsauto.report.steps import steps
from rsauto.report.table import table
from rsauto.report.verdict import judge
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
    assert (
        page.index("Take rank 64") < page.index("What each rank costs") < page.index("<h2>Figures")
    )
    assert page.count("plotly.js v") == 1, "plotly.js is embedded once"
    for key in FIGURES:
        assert f'id="plot-{key}"' in page


def test_the_page_loads_nothing_from_elsewhere(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    own = re.sub(r'<script type="text/plain" id="plotly">.*?</script>', "", page, flags=re.DOTALL)
    assert len(own) < len(page) / 2
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
    assert figures is not None
    # Nothing was measured in these records, and they are too few for importance.
    missing = {"predictions", "importance", "time"}
    assert set(json.loads(figures[1])) == {*FIGURES} - missing
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


def test_reports_are_made_where_nothing_that_trains_can_be_imported(tmp_path: Path) -> None:
    write_study(tmp_path, study_records())
    script = """
import sys
from importlib.abc import MetaPathFinder

class Refusing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "optuna", "transformers", "peft", "datasets",
                                  "accelerate"}:
            raise ImportError(f"{name} is refused")

sys.meta_path.insert(0, Refusing())
from rsauto.cli import run
sys.argv = ["rsauto", "report", sys.argv[1]]
run()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Take rank 64" in " ".join(done.stdout.split())
    for name in [*FILES, *(f"figures/{key}.svg" for key in FIGURES)]:
        assert (tmp_path / name).is_file(), name


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


def test_the_first_screen_says_what_the_choice_costs_and_its_neighbours(folder: Path) -> None:
    page = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    first = page[: page.index("What each rank costs")]
    assert (
        "Its peak memory is predicted to be 21.4 MiB at micro-batch 16, and 21.1 MiB were measured "
        "(98.5% of that)." in first
    )
    assert "One step down: rank 32 (rsLoRA, alpha 16," in first
    assert "saves 3.94 MiB of memory (18 %) and 7.8 % of the compute and gives up" in first
    markdown_text = (folder / "report.md").read_text(encoding="utf-8")
    assert "One step down: rank 32" in markdown_text


def test_steps_go_to_the_neighbours_on_the_front() -> None:
    """Rank 8 is taken. Below it 4 is better than 2; above it 16 is no better and 32 is."""
    losses = {2: 1.30, 4: 1.20, 8: 1.009, 16: 1.02, 32: 1.0}
    trials = [with_loss(record(n, rank, 1e-3), loss) for n, (rank, loss) in
              enumerate(losses.items())]  # fmt: skip
    verdict = judge(study_config(), trials, {})
    assert verdict.recommended is not None and verdict.recommended.rank == 8
    down, up = steps(rank_table(trials, verdict), verdict)
    assert down.title == "One step down: rank 4 (rsLoRA, alpha 16, learning rate 1e-3)"
    assert down.sentence == (
        "saves 503.8 KiB of memory (3.4 %) and 1.1 % of the compute and gives up 0.191 of eval "
        "loss, with nothing known about the noise"
    )
    assert up.title.startswith("One step up: rank 32")
    assert "costs 2.95 MiB more memory (20 %) and 6.8 % more compute and buys 0.009" in up.sentence


def test_a_step_within_the_noise_says_so() -> None:
    trials = [
        with_loss(record(n, rank, 1e-3, seed=seed), loss + shift)
        for n, (rank, loss, seed, shift) in enumerate(
            (rank, loss, seed, shift)
            for rank, loss in ((8, 1.0), (16, 0.999), (4, 1.5))
            for seed, shift in ((0, -0.01), (1, 0.01))
        )
    ]
    verdict = judge(study_config(seeds=2), trials, {})
    down, up = steps(rank_table(trials, verdict), verdict)
    assert up.sentence.endswith("of eval loss, which may be nothing")
    assert "rank 4" in down.title and "may be nothing" not in down.sentence


def test_fronts_are_drawn_against_memory_compute_and_time() -> None:
    trials = study_records()
    verdict = judge(study_config(), trials, {})
    shown = {p.key: p for p in panels(trials, verdict) if isinstance(p, Panel)}
    fronts = [shown[key] for key in ("memory", "compute", "time")]
    assert [p.tab for p in fronts] == ["Memory", "Compute", "Time"]
    assert {p.group for p in fronts} == {"front"}
    for panel in fronts:
        line = next(layer for layer in panel.layers if layer.name == "Pareto front")
        assert list(line.x) == sorted(line.x) and list(line.y) == sorted(line.y, reverse=True)
    looks = {layer.name: (layer.symbol, layer.colour) for layer in shown["memory"].layers}
    assert len({looks[name] for name in ("rsLoRA", "pruned", "infeasible", "diverged", "oom")}) == 5
    assert len({looks[name][0] for name in ("rsLoRA", "pruned", "infeasible", "diverged")}) == 4
    assert shown["compute"].x_label == "training compute (GFLOPs)"
    solo = [t for t in trials if t.train_seconds is not None and t.outcome == "complete"]
    drawn = sum(len(layer.x) for layer in shown["time"].layers if layer.size < 15 and layer.symbol)
    assert drawn == len(solo)


def test_methods_outcomes_and_marks_of_a_front_differ_in_shape() -> None:
    """Some readers see no difference between two of the colours."""
    trials = [
        with_loss(record(n, 8, 1e-3 * (1 + n), method=method, role=role), 1.0 + n)
        for n, (method, role) in enumerate(
            [("rslora", "search"), ("lora", "search"), ("lora", "default_tuned")]
        )
    ]
    trials += [with_loss(allocated(3), 1.0), with_loss(refit(4), 1.0)]
    outcomes = ("pruned", "diverged", "oom", "infeasible", "failed")
    trials += [record(5 + n, 8, 1e-3, outcome=outcome) for n, outcome in enumerate(outcomes)]
    shown = {p.key: p for p in panels(trials, judge(study_config(), trials, {}))}["memory"]
    assert isinstance(shown, Panel)
    for is_mark in (False, True):
        drawn = [
            layer.symbol for layer in shown.layers if layer.symbol and (layer.size == 15) == is_mark
        ]
        assert len(drawn) == len(set(drawn)) == (3 if is_mark else 10)


def test_curves_are_few_lines_however_many_trials_there_are() -> None:
    trials = [with_loss(record(n, (4, 8)[n % 2], 1e-3), 1 + n / 1000) for n in range(300)]
    stopped = with_loss(record(300, 4, 1e-3, outcome="pruned", steps=50, fidelity=0.5), 0.5)
    at_once = replace(stopped, number=301, curve=stopped.curve[:1])
    trials += [stopped, at_once]
    verdict = judge(study_config(), trials, {})
    shown = {p.key: p for p in panels(trials, verdict) if isinstance(p, Panel)}
    for key, value in (("curves", 1.0), ("grad_norms", 0.5)):
        layers = shown[key].layers
        strong = [layer for layer in layers if layer.in_legend]
        assert [layer.name for layer in strong] == ["rsLoRA 4", "rsLoRA 8"] and len(layers) == 6
        assert strong[0].y[-1] == value, "of the best trial that finished"
        faint = [layer for layer in layers if not layer.in_legend]
        assert sum(sum(map(math.isnan, layer.y)) + 1 for layer in faint) == 300
        (point,) = (layer for layer in faint if len(layer.x) == 1)
        assert point.symbol and point.hover == ("trial 301, rsLoRA 4, pruned",)
        assert all(layer.dash and not layer.symbol for layer in faint if layer is not point)
    for panel in shown.values():
        json.dumps(interactive(panel).to_plotly_json(), allow_nan=False, default=list)


def planted(count: int, noise: float = 0.0) -> list[TrialRecord]:
    """The loss depends on the learning rate and not at all on alpha."""
    draw = random.Random(1)
    found = []
    for n in range(count):
        octaves = draw.uniform(-2, 2)
        trial = record(n, 8, 1e-3 * 2**octaves, alpha=draw.choice((8, 16, 32)))
        found.append(with_loss(trial, 1 + 0.1 * octaves**2 + draw.gauss(0, noise)))
    return found


def test_importance_finds_the_setting_that_matters() -> None:
    trials = planted(60)
    verdict = judge(study_config(), trials, {})
    found = importance(table(trials), verdict)
    assert found is not None and list(found.shares) == ["learning_rate", "alpha"]
    assert found.shares["learning_rate"] > 0.9 and found.explained > 0.7
    assert math.isclose(sum(found.shares.values()), 1.0)
    refused = replace(trials[0], number=60, outcome="infeasible", eval_loss=None, alpha=999)
    again = importance(table([*trials, refused]), verdict)
    assert again == found, "the same on each run, and over feasible trials alone"


def test_importance_is_left_out_or_doubted_where_trials_say_little() -> None:
    few = planted(9)
    verdict = judge(study_config(), few, {})
    assert importance(table(few), verdict) is None
    noisy = [replace(t, eval_loss=1 + (t.number * 37 % 11) / 100) for t in planted(12)]
    panel = importance_panel(table(noisy), verdict)
    assert panel is not None and "do not rely on these shares" in panel.caption


def test_the_map_of_rates_shows_good_and_failed_trials_where_they_were() -> None:
    trials = [
        with_loss(record(0, 8, 1e-3), 1.0),
        with_loss(record(1, 16, 2e-3), 1.005),
        with_loss(record(2, 16, 4e-3, method="lora"), 1.2),
        record(3, 32, 0.09, outcome="diverged"),
    ]
    verdict = judge(study_config(), trials, {})
    panel = next(p for p in panels(trials, verdict) if p.key == "rate_map")
    assert isinstance(panel, Panel)
    found = [(layer.name, layer.x, layer.y) for layer in panel.layers]
    assert found == [
        ("within 1 %", (8.0, 16.0), (1e-3, 2e-3)),
        ("within 30 %", (16.0,), (4e-3,)),
        ("diverged", (32.0,), (0.09,)),
    ]


def test_rows_carry_the_numbers_they_are_sorted_by(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    rows = re.findall(r"<tr class=\"\w+\">(<td.*?)</tr>", page[page.index('id="trials"') :])
    assert len(rows) == len(study_records())
    assert 'data-v="8.16">8.2 s' in page, "seconds as they were, beside their words"
