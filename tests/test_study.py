"""The main job from end to end on a tiny model, and what it leaves in the study folder."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny_study import records, rows, study_values, write_study
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import rsauto
from rsauto import api, study_file
from rsauto.cli import app
from rsauto.errors import AllTrialsFailedError, InputError, StudyInterrupted
from rsauto.search import pruning
from rsauto.search.driver import StopFlag, study_events
from rsauto.search.events import TrialStarted, TrialStep


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """One study run by the command line; the tests below only look at what it left."""
    folder = tmp_path_factory.mktemp("study")
    out = folder / "out"
    result = CliRunner().invoke(
        app, ["study", str(write_study(folder)), "--out", str(out), "--json"]
    )
    assert result.exit_code == 0, result.output
    yield {"folder": folder, "out": out, "stdout": result.stdout}


def copy_of(finished: dict[str, Any], to: Path) -> Path:
    """A finished study folder that may be changed."""
    shutil.copytree(finished["out"], to)
    return to


def logits(model: Any, folder: Path) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(folder)("5 down: 5 4", return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = model(**tokens).logits
    return found


def test_the_last_line_is_one_json_object_with_the_four_trials(finished: dict[str, Any]) -> None:
    result = json.loads(finished["stdout"].splitlines()[-1])
    assert set(result) == {
        "out", "trials", "best", "recommended", "default", "default_tuned", "seconds"
    }  # fmt: skip
    assert result["out"] == str(finished["out"])
    assert result["default"]["learning_rate"] == 5e-5
    assert result["default"]["rank"] == result["default_tuned"]["rank"] == 8
    assert result["best"]["outcome"] == result["recommended"]["outcome"] == "complete"


def test_exactly_the_asked_number_of_trials_is_settled(finished: dict[str, Any]) -> None:
    outcomes = Counter(record["outcome"] for record in records(finished["out"]))
    assert sum(outcomes.values()) - outcomes["infeasible"] == 12


def test_defaults_and_repeated_seeds_are_always_measured(finished: dict[str, Any]) -> None:
    roles = Counter(record["role"] for record in records(finished["out"]))
    assert roles["default"] == 1
    assert roles["default_tuned"] >= 3
    assert roles["seed"] >= 2


def test_ranks_over_the_budget_are_recorded_and_never_started(finished: dict[str, Any]) -> None:
    for record in records(finished["out"]):
        over = record["predicted_peak_bytes"] > 2 * 2**20
        assert over == (record["outcome"] == "infeasible")
        assert over == (record["rank"] >= 128)
        assert not over or (record["steps"] is None and record["measured_peak_bytes"] is None)


def test_measured_peaks_stay_in_the_budget_and_near_the_prediction(
    finished: dict[str, Any],
) -> None:
    measured = [r for r in records(finished["out"]) if r["measured_peak_bytes"] is not None]
    assert len(measured) == 12
    for record in measured:
        assert record["measured_peak_bytes"] <= 2 * 2**20
        assert record["measured_peak_bytes"] == pytest.approx(
            record["predicted_peak_bytes"], rel=0.15
        )


def test_no_point_is_tried_twice_with_one_seed(finished: dict[str, Any]) -> None:
    keys = ("method", "rank", "alpha", "learning_rate", "lr_ratio", "seed")
    points = Counter(
        tuple(r[k] for k in keys) for r in records(finished["out"]) if r["outcome"] != "infeasible"
    )
    assert max(points.values()) == 1


@pytest.mark.parametrize("name", ["best", "recommended"])
def test_adapters_give_the_recorded_loss_in_stock_peft(finished: dict[str, Any], name: str) -> None:
    record = json.loads(finished["stdout"].splitlines()[-1])[name]
    base = AutoModelForCausalLM.from_pretrained(finished["folder"] / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished["folder"] / "model")
    model = PeftModel.from_pretrained(base, finished["out"] / name).eval()
    config = json.loads((finished["out"] / name / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == record["rank"]
    assert config["use_rslora"] is False

    loss_sum, count = 0.0, 0
    for row in rows(12, 100):
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + completion])
        labels = torch.tensor([[-100] * len(prompt) + completion])
        with torch.no_grad():
            loss_sum += float(model(input_ids=ids, labels=labels).loss) * len(completion)
        count += len(completion)
    assert loss_sum / count == pytest.approx(record["eval_loss"], abs=1e-5)
    adapted = logits(model, finished["folder"] / "model")
    with model.disable_adapter():
        effect = (adapted - logits(model, finished["folder"] / "model")).abs().max()
    assert effect > 1e-3, "an adapter without effect would pass vacuously"


def test_records_hold_every_field_of_the_contract(finished: dict[str, Any]) -> None:
    fields = """number outcome method engine rank init_rank target_rank r_max rank_pattern alpha
        scaling_rule scaling_exponent init_scale gamma_r target_modules learning_rate lr_ratio
        lambda_lr_ratio optimizer schedule batch_size micro_batch_size max_length seed steps tokens
        fidelity eval_loss perplexity metrics curve activation_moments num_trainable_params
        adapter_bytes flops predicted_peak_bytes predicted_reserved_bytes measured_peak_bytes
        pack_id pack_size pack_peak_bytes train_seconds tokens_per_second retry_of worker
        error""".split()
    for record in records(finished["out"]):
        assert set(fields) <= set(record)


def test_the_folder_holds_everything_and_nothing_half_written(finished: dict[str, Any]) -> None:
    names = {path.name for path in finished["out"].iterdir()}
    assert names >= {
        "study.yaml", "environment.json", "trials.jsonl", "tradeoff.csv", "tradeoff.parquet",
        "report.md", "report.html", "best", "recommended", "journal.log",
    }  # fmt: skip
    assert not [path for path in finished["out"].rglob("*.partial")]


def test_records_say_the_same_as_the_storage(finished: dict[str, Any]) -> None:
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(finished["out"] / "journal.log"))
    )
    study = optuna.load_study(study_name="tiny", storage=storage)
    stored = [t.user_attrs["record"] for t in study.trials]
    assert stored == records(finished["out"])
    assert study.best_trial.user_attrs["record"]["outcome"] == "complete"
    refused = {t.number for t in study.trials if t.constraints["memory"] > 0}
    assert refused == {r["number"] for r in stored if r["outcome"] == "infeasible"} != set()


def test_the_same_command_again_adds_nothing(finished: dict[str, Any], tmp_path: Path) -> None:
    out = copy_of(finished, tmp_path / "out")
    before = records(out)
    result = CliRunner().invoke(
        app, ["study", str(finished["folder"] / "tiny.yaml"), "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert records(out) == before


def test_more_trials_continue_the_study_without_repeating(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    out = copy_of(finished, tmp_path / "out")
    before = records(out)
    config = study_file.load(finished["folder"] / "tiny.yaml", sets=["search.trials=15"])
    study = rsauto.run_study(config, out=out)
    after = records(out)
    assert after[: len(before)] == before
    assert len(after) == len(before) + 3
    assert len(study.trials) == len(after)
    test_no_point_is_tried_twice_with_one_seed({"out": out})


def test_other_settings_are_refused_with_the_difference(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    out = copy_of(finished, tmp_path / "out")
    before = (out / "study.yaml").read_text()
    result = CliRunner().invoke(
        app,
        ["study", str(finished["folder"] / "tiny.yaml"), "--out", str(out),
         "--set", "training.batch_size=8"],
    )  # fmt: skip
    assert result.exit_code == 2
    assert "training.batch_size: was 4, is 8" in result.stderr
    assert (out / "study.yaml").read_text() == before


def test_changed_data_are_refused(finished: dict[str, Any], tmp_path: Path) -> None:
    values = study_values(tmp_path)
    rsauto.run_study({**values, "search": {**values["search"], "trials": 1}}, out=tmp_path / "out")
    train = tmp_path / "data" / "train.jsonl"
    train.write_text(train.read_text() + json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(InputError, match="data changed since"):
        rsauto.run_study(values, out=tmp_path / "out")


def test_a_report_may_be_left_for_later(tmp_path: Path) -> None:
    """Also where the study is interrupted; one of an earlier run is not shown as this one's."""
    path, out = write_study(tmp_path, trials=4), tmp_path / "out [x]"
    pages = ("report.*", "tradeoff.*", "figures")

    def study(*options: str) -> str:
        done = CliRunner().invoke(app, ["study", str(path), "--out", str(out), *options])
        assert done.exit_code == 0, done.output
        return done.output.replace("\n", "")

    stop = StopFlag()
    with pytest.raises(StudyInterrupted):
        for event in study_events(study_file.load(path), out, stop=stop, report=False):
            stop.requested |= isinstance(event, TrialStarted)
    assert not [file for page in pages for file in out.glob(page)]
    assert f"rsauto report '{out}'" in study("--no-report")
    assert (out / "best").is_dir(), "the adapter is there"
    assert not [file for page in pages for file in out.glob(page)]
    assert CliRunner().invoke(app, ["report", str(out)]).exit_code == 0
    assert {page: any(out.glob(page)) for page in pages} == dict.fromkeys(pages, True)
    said = study("--no-report", "--trials", "5", "--json")
    assert str(out / "tradeoff.csv") not in said and str(out / "report.html") not in said


def test_report_is_made_from_records_alone(finished: dict[str, Any], tmp_path: Path) -> None:
    out = copy_of(finished, tmp_path / "out")
    for name in ("report.html", "report.md", "tradeoff.csv", "tradeoff.parquet", "journal.log"):
        (out / name).unlink()
    shutil.rmtree(out / "best")
    result = CliRunner().invoke(app, ["report", str(out)])
    assert result.exit_code == 0, result.output
    assert (out / "report.html").read_text() == (finished["out"] / "report.html").read_text()
    assert len(pd.read_csv(out / "tradeoff.csv")) == len(records(out))


def test_status_tells_where_the_study_stands(finished: dict[str, Any]) -> None:
    result = CliRunner().invoke(app, ["status", str(finished["out"])])
    assert "12 of 12 settled" in result.stdout
    values = json.loads(CliRunner().invoke(app, ["status", str(finished["out"]), "--json"]).stdout)
    assert values["settled"] == 12


def test_select_rank_answers_for_another_budget(finished: dict[str, Any]) -> None:
    trials = rsauto.load_study(finished["out"]).trials
    largest = rsauto.select_rank(trials, memory_budget="2MiB", prefer="largest")
    smaller = rsauto.select_rank(trials, memory_budget="1.6MiB", prefer="largest")
    assert smaller["rank"] < largest["rank"]


def test_loaded_objects_are_studied_like_named_ones(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    values = study_values(tmp_path, trials=4)
    named = rsauto.run_study(values, out=tmp_path / "named")
    given = api.run_study(
        {k: v for k, v in values.items() if k != "model"} | {"data": {"max_length": 32}},
        out=tmp_path / "given",
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "model"),
        train=Dataset.from_list(rows(64)),
        validation=rows(12, 100),
    )
    assert named.trials["eval_loss"].tolist() == given.trials["eval_loss"].tolist()


def test_a_stop_between_steps_loses_nothing_and_continues_the_same(tmp_path: Path) -> None:
    values = study_values(tmp_path, trials=8)
    whole = rsauto.run_study(values, out=tmp_path / "whole")
    config, stop = study_file.validate(values), StopFlag()
    with pytest.raises(StudyInterrupted, match="same command continues"):
        for event in study_events(config, tmp_path / "cut", stop=stop):
            if isinstance(event, TrialStep) and event.number == 6 and event.point.step == 3:
                stop.requested = True
    assert [r["number"] for r in records(tmp_path / "cut")] == list(range(6))
    cut = rsauto.run_study(values, out=tmp_path / "cut")
    assert cut.trials["eval_loss"].tolist() == whole.trials["eval_loss"].tolist()
    assert cut.trials["retry_of"].dropna().tolist() == [6]


def test_out_of_memory_and_divergence_are_information(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rsauto.training import loop

    real = loop.accumulate_gradients

    def failing(model: Any, *arguments: Any) -> float:
        rank = model.peft_config["default"].r
        if rank == 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return float("nan") if rank == 32 else real(model, *arguments)

    monkeypatch.setattr(loop, "accumulate_gradients", failing)
    values = study_values(tmp_path, trials=20, rank=[4, 8, 16, 32])
    rsauto.run_study(values, out=tmp_path / "out")
    found = [r for r in records(tmp_path / "out") if r["role"] == "search"]
    outcomes = {r["rank"]: r["outcome"] for r in found}
    assert outcomes[16] == "oom"
    assert outcomes[32] == "diverged"
    tried = Counter(r["rank"] for r in found)
    assert tried[16] + tried[32] < sum(tried.values()) / 2, "the sampler must learn to keep away"
    best = json.loads((tmp_path / "out" / "best" / "adapter_config.json").read_text())
    assert best["r"] not in (16, 32)


def test_a_study_whose_every_trial_fails_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rsauto.training import loop

    def broken(*_: Any) -> float:
        raise TypeError("a bug in the model")

    monkeypatch.setattr(loop, "accumulate_gradients", broken)
    with pytest.raises(AllTrialsFailedError, match="a bug in the model"):
        rsauto.run_study(study_values(tmp_path), out=tmp_path / "out")
    assert [r["outcome"] for r in records(tmp_path / "out")][-3:] == ["failed"] * 3


def test_grid_and_random_and_halving_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = study_values(
        tmp_path, strategy="grid", rank=[2, 4], alpha=[8], learning_rate=[1e-3, 1e-2], trials=40
    )
    study = rsauto.run_study(grid, out=tmp_path / "grid")
    searched = study.trials[study.trials["role"] == "search"]
    assert len(searched) == 4, "a grid is exhausted, not repeated"
    halving = study_values(tmp_path, strategy="random", pruner="halving", trials=20, rank=[4])
    monkeypatch.setattr(pruning, "PROGRESS", 0.0)  # a random model learns slowly
    study = rsauto.run_study(halving, out=tmp_path / "halving")
    assert "pruned" in set(study.trials["outcome"])


def test_an_adapter_that_was_lost_is_trained_again(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    out = copy_of(finished, tmp_path / "out")
    before = (out / "recommended" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "adapters")
    shutil.rmtree(out / "recommended")
    rsauto.run_study(study_file.load(finished["folder"] / "tiny.yaml"), out=out)
    assert (out / "recommended" / "adapter_model.safetensors").read_bytes() == before
