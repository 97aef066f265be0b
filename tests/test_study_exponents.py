"""The study of learning-rate exponents: sweeps that find a planted optimum, and its table."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rsauto.records import TrialSpec
from rsauto.scaling import learning_rate_exponent

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "reports" / "learning-rate-exponents"


@pytest.fixture(scope="module")
def study() -> Iterator[Any]:
    """The script, whose neighbour it imports by name."""
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "studies"))
    yield importlib.import_module("learning_rate_exponents")
    sys.path[:] = before


@pytest.fixture(scope="module")
def sweeps(study: Any) -> Any:
    return sys.modules["rate_sweeps"]


class Planted:
    """Trials of ln L = c (log2 eta - m - s log2(r / 16))^2, with s the prior plus ``off``."""

    def __init__(self, sweeps: Any, off: float = 0.0, spread: float = 0.0) -> None:
        self.sweeps, self.off, self.spread = sweeps, off, spread
        self.asked: list[tuple[Any, int]] = []

    def best(self, key: Any) -> float:
        """log2 of the best learning rate."""
        start = self.sweeps.CENTRES[key.optimizer] / 2 + 0.2 + self.spread * (key.seed - 1)
        exponent = self.sweeps.RULES[key.rule].prior(key.optimizer) + self.off
        return float(start + exponent * math.log2(key.rank / 16))

    def train(self, asked: Sequence[tuple[Any, int]]) -> Iterator[Any]:
        for key, k in asked:
            self.asked.append((key, k))
            distance = k / 2 - self.best(key)
            loss = None if distance > 3 else math.exp(0.3 * distance**2)
            yield self.sweeps.row_of(key, k, loss, 64, 1.0)


def run(study: Any, planted: Planted, file: Path | None = None) -> list[Any]:
    rows: list[Any] = planted.sweeps.sweep_all(
        planted.train,
        study.STAGES,
        seeds=study.SEEDS,
        optimizers=study.OPTIMIZERS,
        file=file,
    )
    return rows


@pytest.mark.parametrize("reach", [1, 2])
@pytest.mark.parametrize("optimum", [-9.3, -2.0, -0.6, 0.0, 0.4, 3.7, 8.2])
def test_a_sweep_walks_to_a_planted_optimum_and_holds_it(
    study: Any, sweeps: Any, reach: int, optimum: float
) -> None:
    start = sweeps.Start(0, reach)
    sweep: dict[int, float] = {}
    while asked := sweeps.next_rates(sweep, start):
        assert not set(asked) & sweep.keys()
        sweep |= {k: math.exp(0.01 * (k - optimum) ** 2) for k in asked}
    best = sweeps.lowest(sweep)
    assert abs(best - optimum) <= 0.5
    assert {best - 1, best + 1} <= sweep.keys()
    assert len(sweep) <= 5 + math.ceil(abs(optimum) / reach)
    assert study.best_of(sweep) == pytest.approx(2 ** (optimum / 2))


def test_from_where_the_prior_is_right_five_trials_are_enough(sweeps: Any) -> None:
    start = sweeps.Start(-14, 2)
    first = sweeps.next_rates({}, start)
    assert first == [-16, -14, -12]
    sweep = dict(zip(first, (2.0, 1.0, 3.0), strict=True))
    assert sweeps.next_rates(sweep, start) == [-15, -13]
    assert not sweeps.is_complete(sweep)
    assert sweeps.is_complete(sweep | {-15: 1.5, -13: 1.5})
    assert sweeps.next_rates(sweep | {-15: 0.9, -13: 1.5}, start) == []  # -16 and -14 hold it


def test_a_loss_that_falls_for_ever_is_told(sweeps: Any) -> None:
    sweep = {k: 1.0 - 0.01 * k for k in range(-2, 15)}
    with pytest.raises(ValueError, match="CENTRES"):
        sweeps.next_rates(sweep, sweeps.Start(0, 2))


def test_from_rates_that_are_all_too_high_it_goes_down(study: Any, sweeps: Any) -> None:
    def loss(k: int) -> float:
        return (
            3.8 + 0.1 * (k // 2 % 2) - 0.05 * (k == 4) if k > -3 else math.exp(0.1 * (k + 5) ** 2)
        )

    start = sweeps.Start(2, 2)
    sweep: dict[int, float] = {}
    while asked := sweeps.next_rates(sweep, start):
        sweep |= {k: loss(k) for k in asked}
    assert max(sweep) == 4  # the lowest of the first three, which says nothing
    assert study.best_of(sweep) == pytest.approx(2**-2.5)


def test_it_comes_back_up_where_no_rate_teaches_anything(study: Any, sweeps: Any) -> None:
    def loss(k: int) -> float:
        return 3.8 + 0.1 * (k % 4) if k > -5 else 3.4 + 0.05 * (k + 6) ** 2

    start = sweeps.Start(2, 2)
    sweep: dict[int, float] = {}
    while asked := sweeps.next_rates(sweep, start):
        sweep |= {k: loss(k) for k in asked}
    assert sweeps.lowest(sweep) == -6
    assert min(sweep) == -10


def test_a_trial_that_diverged_bounds_a_sweep(study: Any, sweeps: Any) -> None:
    sweep = {-2: 2.0, -1: 1.0, 0: math.inf}
    assert sweeps.is_complete(sweep)
    rate = study.best_of(sweep)
    assert 2**-0.75 <= rate <= 2**-0.5  # not in the half where it diverged
    assert sweeps.next_rates({-2: math.inf, 0: math.inf, 2: math.inf}, sweeps.Start(0, 2)) == [-4]


def test_the_three_multipliers_are_one_at_the_anchor(sweeps: Any) -> None:
    anchor = {rule.gamma(sweeps.ANCHOR) for rule in sweeps.RULES.values()}
    assert anchor == {4.0}
    assert [rule.gamma(64) for rule in sweeps.RULES.values()] == [2.0, 1.0, 4.0]
    priors = {name: (rule.prior("adamw"), rule.prior("sgd")) for name, rule in sweeps.RULES.items()}
    assert priors == {"rslora": (-0.25, 0.0), "lora": (0.0, 1.0), "constant": (-0.5, -1.0)}
    assert learning_rate_exponent("rslora", "adamw", 0.0) == -0.5


def test_a_sweep_starts_by_the_prior_and_then_where_another_seed_was_best(sweeps: Any) -> None:
    key = sweeps.SweepKey("sgd", "lora", 128, 1)
    assert sweeps.start_of(key, {}) == sweeps.Start(sweeps.CENTRES["sgd"], 2)
    held = {-6: 2.0, -5: 1.0, -4: 2.0}
    anchor = sweeps.SweepKey("sgd", "rslora", 16, 1)
    assert sweeps.start_of(key, {anchor: held}) == sweeps.Start(-5 + 2 * 3, 2)  # + 1 an octave
    near = sweeps.SweepKey("sgd", "lora", 64, 1)
    moved = {k + 7: loss for k, loss in held.items()}
    assert sweeps.start_of(key, {anchor: held, near: moved}) == sweeps.Start(2 + 2, 2)
    seed = sweeps.SweepKey("sgd", "lora", 128, 0)
    found = sweeps.start_of(key, {anchor: held, near: moved, seed: held})
    assert found == sweeps.Start(-5, 1)
    unfinished = {seed: {-5: 1.0, -4: 2.0}, anchor: held}
    assert sweeps.start_of(key, unfinished) == sweeps.Start(1, 2)


@pytest.mark.parametrize("off", [0.0, 0.4])
def test_the_table_has_the_planted_exponents(study: Any, sweeps: Any, off: float) -> None:
    planted = Planted(sweeps, off=off, spread=0.1)
    found = study.findings(run(study, planted))
    assert [(f.optimizer, f.rule) for f in found] == [
        (optimizer, rule) for optimizer in study.OPTIMIZERS for rule in sweeps.RULES
    ]
    for finding in found:
        assert finding.law.exponent == pytest.approx(finding.prior + off, abs=1e-9)
        assert 0 < finding.law.half_width < 0.1
        assert finding.law.num_trials == len(study.SEEDS) * sum(map(len, study.STAGES))
        assert finding.law.contradicts(finding.prior) == (off > 0)
        assert finding.means[16] == pytest.approx(
            2 ** planted.best(sweeps.SweepKey(finding.optimizer, "rslora", 16, 1))
        )
    text = study.table(found)
    assert f"| SGD | alpha/r | +1.00 | {1 + off:+.2f} |" in text
    assert text.count("| yes |") == (0 if off else 6)
    assert "<svg" in study.draw(found)


def test_a_run_goes_on_where_it_was_stopped(study: Any, sweeps: Any, tmp_path: Path) -> None:
    whole, file = Planted(sweeps), tmp_path / "sweeps.jsonl"
    rows = run(study, whole, file)
    lines = file.read_text().splitlines(keepends=True)
    assert sweeps.read_rows(file) == rows
    assert len(set(whole.asked)) == len(whole.asked) == len(lines)
    file.write_text("".join(lines[:100]))
    rest = Planted(sweeps)
    again = study.findings(run(study, rest, file))
    assert not set(rest.asked) & set(whole.asked[:100])
    assert [f.means for f in again] == [pytest.approx(f.means) for f in study.findings(rows)]


def test_sweeps_that_do_not_hold_their_best_are_left_out(study: Any, sweeps: Any) -> None:
    rows = run(study, Planted(sweeps))
    key = sweeps.SweepKey("sgd", "lora", 2, 0)
    cut = [row for row in rows if row.key != key] + [row for row in rows if row.key == key][:3]
    (finding,) = [f for f in study.findings(cut) if (f.optimizer, f.rule) == ("sgd", "lora")]
    assert set(finding.best[2]) == {1, 2}
    assert study.table(study.findings([])).count("too few sweeps") == 6


def test_a_trial_is_the_embedded_studys_but_for_rule_and_clipping(sweeps: Any) -> None:
    lab = sweeps.Lab()
    adamw: TrialSpec = lab.spec(sweeps.SweepKey("adamw", "lora", 8, 2), -15)
    sgd: TrialSpec = lab.spec(sweeps.SweepKey("sgd", "constant", 128, 0), -4)
    assert (adamw.steps, adamw.batch_size, adamw.schedule, adamw.seed) == (64, 16, "linear", 2)
    assert (adamw.alpha, adamw.max_grad_norm, adamw.num_evals) == (64, 1.0, 1)
    assert (sgd.alpha, sgd.max_grad_norm, sgd.learning_rate) == (4, None, 0.25)
    (row,) = sweeps.Lab(steps=1).train([(sweeps.SweepKey("adamw", "constant", 2, 0), -15)])
    assert row.eval_loss > 5 and row.steps == 1 and row.gamma_r == 4.0


def test_the_report_is_what_its_sweeps_give(study: Any, sweeps: Any) -> None:
    found = study.findings(sweeps.read_rows(FOLDER / "sweeps.jsonl"))
    written = json.loads((FOLDER / "table.json").read_text(encoding="utf-8"))
    assert written["findings"] == json.loads(json.dumps([study.as_json(f) for f in found]))
    report = (FOLDER / "README.md").read_text(encoding="utf-8")
    for part in study.table(found).split("\n\n"):
        assert part.strip() in report
