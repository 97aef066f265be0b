"""The papers' studies: every quick preset runs and is read, and verdicts follow what is planted."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsauto import study_file
from rsauto.records import TrialRecord
from rsauto.report.table import Study

ROOT = Path(__file__).parents[1]
STUDIES = sorted(
    path.stem for path in (ROOT / "studies").glob("*.yaml") if "# Paper:" in path.read_text()
)
VERDICTS = {"reproduced", "partly", "not reproduced", "answered", "open"}


@pytest.fixture(scope="module")
def papers() -> Iterator[Any]:
    """The script, whose readings it imports by name."""
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "studies"))
    yield importlib.import_module("papers")
    sys.path[:] = before


@pytest.fixture(scope="module")
def reports(papers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every study's quick preset, run once."""
    folder = tmp_path_factory.mktemp("papers")
    papers.quieten_libraries()
    for name in papers.ENTRIES:
        papers.run(name, folder / "runs", folder / "reports", quick=True, gsm8k=None)
    found: Path = folder / "reports"
    return found


def test_every_study_of_a_paper_has_a_reading_and_the_other_way_round(papers: Any) -> None:
    assert sorted(papers.ENTRIES) == STUDIES


@pytest.mark.parametrize("name", STUDIES)
def test_every_preset_of_a_study_is_a_whole_grid(name: str) -> None:
    """`trials` is neither too few for the points and seeds, nor too many."""
    path = ROOT / "studies" / f"{name}.yaml"
    for preset in (None, *study_file.load(path).presets):
        config = study_file.load(path, preset=preset)
        search = config.search
        rates = len(search.learning_rate)  # type: ignore[arg-type]
        others = len(search.ranks) * len(search.method) * len(search.alphas) * len(search.lr_ratio)
        others *= len(search.scaling_exponent or (None,)) * len(search.init_exponent)
        seeds = rates * search.seeds if search.repeat == "all" else rates + search.seeds - 1
        assert search.trials == others * seeds, preset


def test_every_quick_study_runs_whole_and_gives_a_page(papers: Any, reports: Path) -> None:
    for name in papers.ENTRIES:
        arms = papers.arms_of(name, reports)
        for arm, study in arms.items():
            assert len(study.records) == study.config.search.trials, (name, arm)
            assert {r.outcome for r in study.records} <= {"complete", "diverged"}
        reading = papers.read(name, reports)
        assert reading.verdict in VERDICTS
        text = (reports / name / "README.md").read_text(encoding="utf-8")
        assert reading.claim in text and reading.measured in text
        assert " nan" not in text
        for drawing in reading.drawings:
            assert (reports / name / drawing.file).read_text(encoding="utf-8").startswith("<?xml")
    summary = papers.summary(reports)
    for name in papers.ENTRIES:
        assert f"[{name}]({name}/README.md)" in summary
    assert "not run" not in summary


def planted(
    study: Study, loss: Callable[[TrialRecord], float], seeds: int = 3, noise: float = 0.01
) -> Study:
    """The study on several seeds, with losses that are made up."""
    records = [
        replace(
            record,
            number=100 * seed + record.number,
            seed=seed,
            eval_loss=loss(record) + noise * ((seed * 7 + record.number * 3) % 5 - 2),
        )
        for seed in range(seeds)
        for record in study.records
    ]
    return replace(study, records=tuple(records))


@pytest.mark.parametrize(
    ("lora", "rslora", "verdict"),
    [
        (0.0, 0.2, "reproduced"),
        (0.1, 0.2, "partly"),
        (0.2, 0.2, "not reproduced"),
        (0.2, 0.0, "not reproduced"),
        (0.0, 0.0, "not reproduced"),
    ],
)
def test_what_rank_buys_decides_the_sweep(
    papers: Any, reports: Path, lora: float, rslora: float, verdict: str
) -> None:
    """``lora`` and ``rslora`` are by how much the loss falls each time the rank is doubled."""
    fall = {"lora": lora, "rslora": rslora}
    study = papers.arms_of("rank-sweep", reports)[""]
    made = planted(study, lambda r: 4 - fall[r.method] * (r.rank.bit_length() - 1))
    assert papers.ENTRIES["rank-sweep"].read({"": made}).verdict == verdict


def test_a_single_seed_decides_nothing(papers: Any, reports: Path) -> None:
    study = papers.arms_of("rank-sweep", reports)[""]
    made = planted(study, lambda r: 4 - 0.2 * r.rank * (r.method == "rslora"), seeds=1)
    assert papers.ENTRIES["rank-sweep"].read({"": made}).verdict == "open"


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_a_trial_that_diverged_is_no_success(
    papers: Any, reports: Path, seeds: tuple[int, ...]
) -> None:
    study = papers.arms_of("rank-sweep", reports)[""]
    made = planted(study, lambda r: 4 - 0.02 * r.rank * (r.method == "rslora"))
    lost = [
        replace(r, outcome="diverged", eval_loss=None)
        if (r.method, r.rank) == ("rslora", 32) and r.seed in seeds
        else r
        for r in made.records
    ]
    reading = papers.ENTRIES["rank-sweep"].read({"": replace(made, records=tuple(lost))})
    assert reading.verdict == "not reproduced"
    assert "diverged" in reading.measured


@pytest.mark.parametrize(("gain", "says"), [(0.3, "is left"), (0.0, "no advantage")])
def test_the_fair_comparison_leaves_out_the_seed_that_chose_the_rates(
    papers: Any, reports: Path, gain: float, says: str
) -> None:
    study = papers.arms_of("rank-sweep-tuned", reports)[""]
    one = replace(study, records=tuple(r for r in study.records if r.seed == 0))

    def loss(record: TrialRecord) -> float:
        return 3 - gain * (record.method == "rslora")

    made = planted(one, loss, seeds=4)
    lucky = [
        replace(r, eval_loss=0.1) if r.seed == 0 and r.method == "rslora" else r
        for r in made.records
    ]
    reading = papers.ENTRIES["rank-sweep-tuned"].read({"": replace(made, records=tuple(lucky))})
    assert says in reading.measured
    assert "3 seeds" in reading.measured
    assert "Best at the edge of the rates tried: LoRA at rank" in reading.measured


@pytest.mark.parametrize(
    ("at_low", "at_high", "verdict"),
    [(0.3, 0.3, "reproduced"), (0.3, 0.0, "not reproduced"), (0.0, 0.0, "not reproduced")],
)
def test_the_conjecture_can_fall_both_ways(
    papers: Any, reports: Path, at_low: float, at_high: float, verdict: str
) -> None:
    arms = dict(papers.arms_of("adalora-on-rslora", reports))

    def loss(record: TrialRecord) -> float:
        gain = at_low if record.rank == 2 else at_high
        return 3 - gain * (record.method == "rsadalora")

    arms[""] = planted(arms[""], loss, seeds=4)
    arms["memory"] = planted(arms["memory"], lambda r: 3.0, seeds=4)
    arms["peft"] = planted(arms["peft"], lambda r: 3.0, seeds=4)
    assert papers.ENTRIES["adalora-on-rslora"].read(arms).verdict == verdict


def test_gains_that_go_with_the_theory_are_recognised(papers: Any, reports: Path) -> None:
    arms = dict(papers.arms_of("stability-law", reports))

    def with_power(shift: float) -> Study:
        records = []
        for record in arms[""].records:
            gain = float(record.rank) ** (2 * (record.scaling_exponent or 0) + 1 + shift)
            moments = [
                replace(m, forward_gain=gain * 1e-3, backward_gain=gain * 1e-3)
                for m in record.activation_moments
            ]
            records.append(replace(record, activation_moments=tuple(moments)))
        return replace(arms[""], records=tuple(records))

    read = papers.ENTRIES["stability-law"].read
    assert read({**arms, "": with_power(0)}).verdict == "reproduced"
    assert read({**arms, "": with_power(0.5)}).verdict == "not reproduced"


def test_a_gradient_comes_back_with_the_power_of_a_finite_width(papers: Any) -> None:
    """Against random matrices; equal to the theorem's 1 where ranks are large, 1/2 where small."""
    backward_power = importlib.import_module("readings.factors").backward_power
    draw = np.random.default_rng(0)
    ranks, width, points = (4, 16, 64, 256), 96, []
    for rank in ranks:
        a = draw.uniform(-1, 1, (40, rank, width))
        x = draw.standard_normal((40, width, 1))
        back = a.transpose(0, 2, 1) @ (a @ x)
        points.append(np.log(np.linalg.norm(back) / np.linalg.norm(x)))
    slope = np.polyfit(np.log(ranks), points, 1)[0]
    assert backward_power(ranks, width) == pytest.approx(slope, abs=0.02)
    assert backward_power((2**20, 2**24), width) == pytest.approx(1, abs=1e-3)
    assert backward_power((1, 2), 10**7) == pytest.approx(0.5, abs=1e-3)


def test_what_was_not_run_is_told_and_not_guessed(papers: Any, tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    assert papers.read("rank-sweep", tmp_path / "reports") is None
    assert "not run" in papers.summary(tmp_path / "reports")


def test_records_are_all_that_a_reading_needs(papers: Any, reports: Path) -> None:
    """Figures and page are the same when they are made again."""
    papers.read("rank-sweep", reports)
    folder = reports / "rank-sweep"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    papers.read("rank-sweep", reports)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert json.loads(before["reading.json"])["verdict"] in VERDICTS
