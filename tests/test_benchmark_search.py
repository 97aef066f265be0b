"""The search benchmark on a tiny setting: what it counts and divides, not how good anything is."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
import pytest

from rsauto.records import TrialSpec
from rsauto.training.trial import Trial

FOLDER = Path(__file__).parents[1] / "benchmarks"
CONTRACT = {
    "task", "seed", "tokens_ratio_vs_grid", "tokens_ratio_vs_random", "tokens_ratio_vs_tpe",
    "wall_ratio_vs_hf", "loss_gap_vs_grid",
}  # fmt: skip
SEED = 3


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The benchmark's files, which import one another as scripts of one folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        names = ("search", "search_baselines", "search_rows", "search_tasks", "search_trainer")
        yield {name: importlib.import_module(name) for name in names}


@pytest.fixture(scope="module")
def task(modules: dict[str, ModuleType]) -> Any:
    """Four steps, so that every one is evaluated; two ranks and two learning rates."""
    quick = modules["search_tasks"].quick_task()
    training = {**quick.training, "steps": 4}
    return replace(quick, training=training, ranks=(2, 4), learning_rates=(4e-3, 8e-3), trials=2)


@pytest.fixture(scope="module")
def ground(modules: dict[str, ModuleType], task: Any) -> Any:
    whole = modules["search_tasks"].ground_of(task)
    return replace(whole, test=whole.test[:32])


def own_losses(modules: dict[str, ModuleType], ground: Any, rank: int, rate: float) -> list[Any]:
    return list(modules["search_baselines"].points_of(ground, rank, rate, SEED))


def test_the_plain_loop_trains_what_rsauto_trains(
    modules: dict[str, ModuleType], ground: Any
) -> None:
    spec = TrialSpec(
        role="search", method="rslora", scaling_rule="rslora", rank=4, alpha=16,
        learning_rate=8e-3, warmup_share=ground.training.warmup_share, batch_size=4,
        micro_batch_size=4, max_length=32, steps=4, num_evals=4, seed=SEED,
    )  # fmt: skip
    with Trial(ground.bench, spec) as trial:
        tokens = [point.tokens for point in trial.steps()]
    own = own_losses(modules, ground, 4, 8e-3)
    theirs = [point.eval_loss for point in trial.curve]
    assert [point.loss for point in own] == pytest.approx(theirs, rel=1e-5)
    assert [point.tokens for point in own] == tokens
    assert own[0].loss - own[-1].loss > 0.05  # it learns, or all of this would hold of anything


def test_the_loop_leaves_the_base_as_it_was(modules: dict[str, ModuleType], ground: Any) -> None:
    names = [name for name, _ in ground.bench.model.named_parameters()]
    points = modules["search_baselines"].points_of(ground, 2, 8e-3, SEED)
    next(points)
    points.close()  # as pruning does
    assert [name for name, _ in ground.bench.model.named_parameters()] == names


def test_trainer_finds_the_loss_that_the_plain_loop_finds(
    modules: dict[str, ModuleType], ground: Any, tmp_path: Path
) -> None:
    found = modules["search_trainer"].trainer_search(ground, SEED, 0.0, 400, 60.0, str(tmp_path))
    assert found["censored"] and found["tokens_to_target"] is None
    assert found["trials"] >= 2 and found["tokens_total"] >= 400
    for rank, rate, loss in found["points"][:2]:
        own = own_losses(modules, ground, rank, rate)[-1]
        assert loss == pytest.approx(own.loss, rel=1e-5)
        assert found["curve"][0][0] == own.tokens  # of one whole trial
    assert not list(tmp_path.rglob("*.safetensors"))


def test_trainer_stops_at_the_target(
    modules: dict[str, ModuleType], ground: Any, tmp_path: Path
) -> None:
    search = modules["search_trainer"].trainer_search
    found = search(ground, SEED, 100.0, 10**9, 60.0, str(tmp_path))
    assert found["trials"] == 1 and not found["censored"]
    assert found["tokens_to_target"] == found["tokens_total"]


def test_the_grid_costs_all_of_it_and_sets_the_target(
    modules: dict[str, ModuleType], ground: Any
) -> None:
    found = modules["search_baselines"].grid(ground, SEED, 0.005)
    assert {(rank, rate) for rank, rate, _ in found["points"]} == {
        (2, 4e-3), (2, 8e-3), (4, 4e-3), (4, 8e-3)
    }  # fmt: skip
    best = min(loss for _, _, loss in found["points"])
    assert found["target"] == pytest.approx(1.005 * best, rel=1e-12)
    assert found["tokens_to_target"] == found["tokens_total"]
    assert found["tokens_total"] == 4 * own_losses(modules, ground, 2, 4e-3)[-1].tokens


def test_sampling_stops_at_the_target_or_at_the_budget(
    modules: dict[str, ModuleType], ground: Any
) -> None:
    sampled = modules["search_baselines"].sampled

    def run(target: float, tokens: int) -> dict[str, Any]:
        sampler = optuna.samplers.RandomSampler(seed=SEED)
        found: dict[str, Any] = sampled(ground, SEED, sampler, target, tokens)
        return found

    assert run(100.0, 10**9)["trials"] == 1
    spent = run(0.0, 400)
    one = own_losses(modules, ground, 2, 4e-3)[-1].tokens
    assert spent["censored"] and 400 <= spent["tokens_total"] < 400 + one
    for rank, rate, _ in spent["points"]:
        assert rank in (2, 4) and 4e-3 <= rate <= 8e-3


def test_pruned_and_unfinished_trials_are_paid_for(modules: dict[str, ModuleType]) -> None:
    progress = modules["search_baselines"].Progress(target=1.0)
    progress.trained(0, 100)  # pruned
    progress.trained(1, 30)  # under way
    progress.trained(2, 200)
    progress.finished(8, 1e-3, math.nan)
    progress.finished(8, 2e-3, 1.2)
    assert not progress.reached
    progress.trained(1, 40)
    progress.finished(4, 1e-3, 0.99)
    progress.trained(1, 200)
    progress.finished(4, 2e-3, 0.98)
    found = progress.figures()
    assert found["tokens_to_target"] == 340 and found["tokens_total"] == 500
    assert found["best"] == {"rank": 4, "learning_rate": 2e-3}
    assert [tokens for tokens, _, _ in found["curve"]] == [330 - 0, 340, 500]
    assert found["points"][0][2] is None and json.dumps(found, allow_nan=False)


def raw(reached: tuple[int, float] | None, total: tuple[int, float], loss: float) -> dict[str, Any]:
    return {
        "tokens_to_target": reached and reached[0],
        "seconds_to_target": reached and reached[1],
        "tokens_total": total[0],
        "seconds_total": total[1],
        "best_loss": loss,
        "target": 1.005,
        "final_test_loss": loss,
        "curve": [(total[0] // 2, 1.0, 2 * loss), (total[0], 2.0, loss)],
    }


def test_ratios_are_our_cost_over_theirs(modules: dict[str, ModuleType]) -> None:
    found = {
        "grid": raw((1000, 50.0), (1000, 50.0), 1.0),
        "random": raw((400, 20.0), (400, 20.0), 1.0),
        "tpe": raw(None, (1000, 40.0), 1.1),
        "hf": raw(None, (900, 160.0), 1.2),
        "rsauto": raw((100, 4.0), (300, 12.0), 1.002),
        "no-transfer": raw((200, 9.0), (300, 12.0), 1.002),
    }
    row = modules["search_rows"].row_of("embedded", 0, found)
    assert CONTRACT <= row.keys()
    assert row["tokens_ratio_vs_grid"] == 0.1
    assert row["tokens_ratio_vs_random"] == 0.25
    assert row["tokens_ratio_vs_tpe"] == 0.1  # of all it spent: at most that
    assert row["wall_ratio_vs_hf"] == 4.0 / 160.0
    assert row["tokens_ratio_vs_no_transfer"] == 0.5
    assert row["tokens_ratio_vs_no_halving"] is None  # not measured
    assert row["at_most"] == ["tokens_ratio_vs_tpe", "wall_ratio_vs_hf"]
    assert row["loss_gap_vs_grid"] == pytest.approx(0.002)
    assert row["competitors"]["hf"]["tokens_total"] == 900


def test_there_is_no_ratio_where_rsauto_did_not_get_there(modules: dict[str, ModuleType]) -> None:
    grid = raw((1000, 50.0), (1000, 50.0), 1.0)
    lost = {"grid": grid, "rsauto": raw(None, (300, 12.0), 1.3)}
    won = {"grid": grid, "rsauto": raw((100, 4.0), (300, 12.0), 1.0)}
    rows = [modules["search_rows"].row_of("embedded", n, one) for n, one in enumerate((lost, won))]
    assert rows[0]["tokens_ratio_vs_grid"] is None and rows[0]["at_most"] == []
    assert rows[0]["loss_gap_vs_grid"] == pytest.approx(0.3)
    median = modules["search_rows"].median
    assert median([None, 0.1]) is None and median([None, 0.1, 0.2]) == 0.2
    assert "tokens_ratio_vs_grid" in modules["search_rows"].summary(rows)


def test_the_curve_is_the_median_of_what_seeds_have_so_far(modules: dict[str, ModuleType]) -> None:
    numpy = importlib.import_module("numpy")
    raws = [{"curve": [(10, 0.0, 3.0), (20, 0.0, 1.0)]}, {"curve": [(20, 0.0, 2.0)]},
            {"curve": [(5, 0.0, 4.0)]}]  # fmt: skip
    found = modules["search_rows"].median_curve(raws, numpy.array([5, 10, 20, 99]))
    assert math.isnan(found[0]) and found[1:].tolist() == [4.0, 2.0, 2.0]


def test_the_same_results_draw_the_same_plot(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    found = {"embedded": [{"grid": raw((1000, 50.0), (1000, 50.0), 1.0),
                           "rsauto": raw((100, 4.0), (300, 12.0), 1.002)}]}  # fmt: skip
    for name in ("first.svg", "second.svg"):
        modules["search_rows"].plot(found, tmp_path / name)
    first = (tmp_path / "first.svg").read_bytes()
    assert first == (tmp_path / "second.svg").read_bytes()
    assert b"rsauto" in first and b"grid" in first


@pytest.mark.thorough
def test_an_interrupted_run_goes_on(
    modules: dict[str, ModuleType],
    task: Any,
    ground: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    search = modules["search"]
    monkeypatch.setattr(search, "quick_task", lambda: task)
    monkeypatch.setattr(search, "ground_of", lambda _: ground)
    file, out = tmp_path / "raw.jsonl", tmp_path / "search.json"
    shared = ["--quick", "--json", "--raw", str(file), "--out", str(out)]

    with pytest.raises(SystemExit, match="needs the grid's target"):
        search.main([*shared, "--only", "tpe"])
    search.main([*shared, "--only", "grid"])
    grid = file.read_text(encoding="utf-8")
    search.main([*shared, "--only", "grid,tpe,rsauto"])
    assert file.read_text(encoding="utf-8").startswith(grid)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line["competitor"] for line in lines] == ["grid", "tpe", "rsauto"]

    printed = capsys.readouterr().out.splitlines()[-1]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found == json.loads(printed) and found.keys() == {"rows", "environment", "command"}
    assert found["rows"][0].keys() >= CONTRACT
    ours = found["rows"][0]["competitors"]["rsauto"]
    assert ours["trials"] == 2 and ours["final_test_loss"] > 0
    assert out.with_suffix(".svg").exists()


def test_results_of_other_settings_are_not_taken(
    modules: dict[str, ModuleType], task: Any, tmp_path: Path
) -> None:
    path = tmp_path / "raw.jsonl"
    named = {"task": task.name, "settings": task.identity, "seed": 0, "competitor": "grid"}
    modules["search"].RawFile(path).add(named)
    file = modules["search"].RawFile(path)
    longer = replace(task, training={**task.training, "steps": 8})
    assert file.get(task, 0, "grid") == named
    assert file.get(longer, 0, "grid") is None and file.get(task, 1, "grid") is None


def test_the_levers_make_configurations(modules: dict[str, ModuleType]) -> None:
    for task in (modules["search_tasks"].embedded_task(), modules["search_tasks"].quick_task()):
        for lever in modules["search_tasks"].LEVERS:
            config = task.config(7, lever)
            assert config.training.seed == 7 and config.search.alphas == (16,)
            assert config.search.ranks == task.ranks and config.search.trials == task.trials
