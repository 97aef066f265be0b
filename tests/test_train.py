"""`rsauto train`: what a study found, trained at full length, whatever interrupts it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from processes import Child, command_line
from tiny_study import records, study_values
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import rsauto
from rsauto.cli import app
from rsauto.errors import InputError, StudyInterrupted
from rsauto.finetuning.request import Job, Request, full_length, resolve, spec_of
from rsauto.finetuning.run import Ready, Saved, training_events
from rsauto.records import TrialRecord
from rsauto.report.choice import Choice
from rsauto.search.events import TrialStep
from rsauto.stop import StopFlag
from rsauto.training import loop
from rsauto.training.loop import accumulate_gradients

OF_TIME = {"train_seconds", "tokens_per_second", "worker", "started_at", "measured_peak_bytes"}
"""Fields in which a continued training may differ from an undisturbed one; the peak because it is
measured in few steps, which may be others."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of one LoRA+ trial on rsLoRA and one on AdaLoRA, with the refit of its ranks."""
    folder = tmp_path_factory.mktemp("study")
    values = study_values(
        folder,
        strategy="grid",
        trials=6,
        seeds=1,
        method=["rslora", "rsadalora"],
        rank=[4],
        alpha=[8],
        learning_rate=[0.02],
        lr_ratio=[4.0],
    )
    values["training"] |= {"steps": 8, "num_evals": 2}
    values["packing"] = {"mode": "off"}
    rsauto.run_study(values, out=folder / "out", report=False)
    return folder / "out"


def number_of(study: Path, **wanted: Any) -> int:
    """The trial with these fields."""
    found = [r for r in records(study) if wanted.items() <= r.items()]
    return int(found[0]["number"])


def train(study: Path, *options: object) -> Result:
    return CliRunner().invoke(app, ["train", str(study), *map(str, options), "--json"])


def trained(study: Path, *options: object) -> dict[str, Any]:
    """What the last line says."""
    result = train(study, *options)
    assert result.exit_code == 0, result.output
    last: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return last


def job_of(study: Path, **options: Any) -> Job:
    trial = options.pop("trial", None)
    return resolve(Request(study=study, choice=Choice(trial=trial), **options))


def curve(out: Path) -> list[dict[str, Any]]:
    lines = (out / "curve.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def require_same_end(out: Path, undisturbed: Path) -> None:
    """Bit for bit, but for what clocks say."""
    weights = "adapter/adapter_model.safetensors"
    assert (out / weights).read_bytes() == (undisturbed / weights).read_bytes()
    assert curve(out) == curve(undisturbed)
    one, other = (json.loads((path / "record.json").read_text()) for path in (out, undisturbed))
    assert {k: v for k, v in one.items() if k not in OF_TIME} == {
        k: v for k, v in other.items() if k not in OF_TIME
    }
    assert not (out / "checkpoints").exists()


def stopped_at(job: Job, step: int) -> list[Any]:
    """The events of a training that is asked to stop while it does a step."""
    stop, seen = StopFlag(), []
    with pytest.raises(StudyInterrupted, match="the same command goes on"):
        for event in training_events(job, stop):
            seen.append(event)
            stop.requested |= isinstance(event, TrialStep) and event.point.step == step
    return seen


# ------------------------------------------------------------------ the trial, at full length


@pytest.mark.parametrize("method", ["rslora", "rsadalora"])
def test_a_trial_trained_again_is_the_trial(method: str, study: Path, tmp_path: Path) -> None:
    number = number_of(study, role="search", method=method, outcome="complete")
    before = next(r for r in records(study) if r["number"] == number)
    out = tmp_path / "out"
    result = trained(study, "--trial", number, "--out", out)
    now = result["record"]
    assert result["out"] == str(out)
    for name in ("tokens", "flops", "rank_pattern", "allocation", "lr_ratio", "micro_batch_size"):
        assert now[name] == before[name], name
    losses = [
        [p[k] for p in r["curve"] for k in ("train_loss", "eval_loss")] for r in (now, before)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert TrialRecord.from_json(now).method == method
    require_test_loss(out, study, now["test"])


def require_test_loss(out: Path, study: Path, test: dict[str, Any]) -> None:
    """The test rows by stock PEFT and by hand."""
    base = study.parent / "model"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = (study.parent / "data" / "test.jsonl").read_text().splitlines()
    total, count = 0.0, 0
    for row in map(json.loads, lines):
        prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        completion = tokenizer(row["completion"], add_special_tokens=False).input_ids
        completion.append(tokenizer.eos_token_id)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0]
        counted = logits[len(prompt) - 1 : -1]
        total += float(F.cross_entropy(counted, torch.tensor(completion), reduction="sum"))
        count += len(completion)
    assert test["rows"] == len(lines) == 12
    assert test["eval_loss"] == pytest.approx(total / count, abs=1e-4)
    card = (out / "adapter" / "README.md").read_text()
    assert f"| on the test rows | |\n|---|---|\n| eval_loss | {test['eval_loss']:.4f} |" in card


def test_a_longer_training_stretches_schedule_and_allocation(study: Path) -> None:
    number = number_of(study, method="rsadalora", role="search")
    record = job_of(study, trial=number).record
    assert record.allocation is not None and full_length(record) == 8
    spec = spec_of(record, 80)
    assert spec.allocation is not None and spec.steps == 80
    assert spec.allocation.tinit == 10 * record.allocation.tinit
    assert spec.allocation.tfinal == 10 * record.allocation.tfinal > 0
    assert spec.rank_pattern is None and spec.init_rank == 6
    pruned = replace(record, outcome="pruned", steps=2, fidelity=0.25)
    assert spec_of(pruned, 80) == spec
    long = job_of(study, trial=number, epochs=5.0)
    assert long.known_steps is None and long.steps(num_rows=64) == 80
    assert long.spec(80) == spec
    other = job_of(study, trial=number, steps=80, seed=7, num_evals=9).spec(80)
    assert other == replace(spec, seed=7, num_evals=9)
    assert job_of(study).out == study / "trained" / "recommended"
    assert job_of(study, trial=number).out == study / "trained" / f"trial-{number}"


def test_a_refit_keeps_the_ranks_it_was_given(study: Path) -> None:
    number = number_of(study, role="refit")
    record = next(r for r in records(study) if r["number"] == number)
    spec = job_of(study, trial=number).spec(8)
    assert spec.method == "rslora" and spec.allocation is None
    assert dict(spec.rank_pattern or ()) == record["rank_pattern"]


def test_memory_decides_the_micro_batch_and_the_batch_stays(study: Path, tmp_path: Path) -> None:
    number = number_of(study, method="rslora", role="search")
    options = ("--trial", number, "--steps", 2, "--out")
    whole = trained(study, *options, tmp_path / "whole")["record"]
    budget = f"{int(whole['predicted_peak_bytes'] * 0.9)}B"
    cut = trained(study, *options, tmp_path / "cut", "--memory-budget", budget)["record"]
    assert cut["micro_batch_size"] < whole["micro_batch_size"] == cut["batch_size"] == 4
    assert cut["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-5)
    result = train(study, *options, tmp_path / "none", "--memory-budget", "100KiB")
    assert result.exit_code == 3
    assert f"too little for trial {number}, rank 4, which needs" in result.stderr
    assert not (tmp_path / "none" / "training.json").exists()


# --------------------------------------------------------------------------- broken off


def test_adalora_goes_on_bit_for_bit(study: Path, tmp_path: Path) -> None:
    number = number_of(study, method="rsadalora", role="search")
    options = ("--trial", number, "--steps", 12, "--evals", 2)
    trained(study, *options, "--out", tmp_path / "undisturbed")
    out = tmp_path / "out"
    job = job_of(study, trial=number, steps=12, num_evals=2, out=out, save_every=5)
    for step in (3, 8):
        seen = stopped_at(job, step)
        assert seen[-1] == Saved(step)
    (ready,) = (event for event in seen if isinstance(event, Ready))
    assert ready.steps_done == 3 and "12 rows" in ready.test_source
    text = (out / "curve.jsonl").read_text()
    (out / "curve.jsonl").write_text(text + text.splitlines()[-1].replace(": 8,", ": 9,") + "\n{")
    result = train(study, *options, "--out", out)
    assert result.exit_code == 0 and "continuing after step 8" in said(result)
    require_same_end(out, tmp_path / "undisturbed")


def test_kill_and_interrupt_lose_at_most_the_steps_since_the_last_checkpoint(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = number_of(study, method="rslora", role="search")
    options = ("--trial", number, "--steps", 12)
    trained(study, *options, "--out", tmp_path / "undisturbed")
    out = tmp_path / "out"
    command = ("train", study, *options, "--out", out, "--save-every", 2)

    process = start(*command)
    wait_until(lambda: steps_in(out) >= 5, process)
    process.kill()
    process.communicate()
    kept = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
    assert 1 <= len(kept) <= 2 and int(kept[-1][5:]) >= steps_in(out) - 2

    last_kept = int(kept[-1][5:])
    with monkeypatch.context() as patched:
        patched.setattr(loop, "accumulate_gradients", terminated_in_a_step)
        result = train(study, *command[2:])
    assert result.exit_code == 4 and "the same command goes on" in said(result)
    assert steps_in(out) == last_kept + 1
    assert (out / "checkpoints" / f"step-{last_kept + 1:08d}").is_dir()

    trained(study, *command[2:])
    require_same_end(out, tmp_path / "undisturbed")
    result = train(study, *command[2:])
    assert result.exit_code == 0 and "finished by an earlier run" in said(result)


def terminated_in_a_step(*arguments: Any) -> float:
    """A step of this very process in which it is asked to end."""
    os.kill(os.getpid(), signal.SIGTERM)
    return accumulate_gradients(*arguments)


def said(result: Result) -> str:
    """What it told people, its lines joined."""
    return " ".join(result.stderr.split())


def start(*words: object, step_seconds: float = 0.2) -> Child:
    """The command line running, its steps stretched so that it can be hit between two of them."""
    return command_line(*map(str, words), step_seconds=step_seconds, own_stderr=True)


def steps_in(out: Path) -> int:
    path = out / "curve.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_until(condition: Callable[[], bool], process: Child) -> None:
    for _ in range(3000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("it never came to that")


def test_what_runs_out_of_memory_goes_on_in_smaller_parts(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = number_of(study, method="rslora", role="search")
    options = ("--trial", number, "--steps", 4, "--save-every", 2, "--out", tmp_path / "out")
    calls = iter([True, True, True, False])

    def full_in_the_fourth_step(*arguments: Any) -> float:
        if not next(calls):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return accumulate_gradients(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "accumulate_gradients", full_in_the_fourth_step)
        result = train(study, *options)
    assert result.exit_code == 3 and "--micro-batch-size 2, which continues" in said(result)
    result = train(study, *options, "--micro-batch-size", 2)
    assert result.exit_code == 0 and "continuing after step 2" in said(result)
    assert "batch 4 as 2 micro-batches of 2" in said(result)


def test_a_training_that_diverges_says_at_which_step(study: Path, tmp_path: Path) -> None:
    copied = tmp_path / "study"
    shutil.copytree(study, copied)
    found = records(copied)
    found[number_of(study, role="default")]["learning_rate"] = 1e30
    (copied / "trials.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    result = train(copied, "--trial", number_of(study, role="default"))
    assert result.exit_code == 5 and "the training diverged, step" in said(result)


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--trial", "99"], ["--trial 99", "has no such trial"]),
        (["--rank", "5"], ["--rank 5", "ranks that did: 4"]),
        (["--rank", "4", "--best"], ["--rank and --best say which trial twice"]),
        (["--steps", "9", "--epochs", "2"], ["--steps 9 and --epochs 2", "Give one"]),
        (["--steps", "0", "--seed", "-1"], ["--steps 0: must be at least 1", "--seed -1"]),
        (["--steps", "4", "--evals", "5"], ["--evals 5: must be at most the steps, which are 4"]),
        (["--track", "tensorbord"], ["--track tensorbord", "Did you mean 'tensorboard'?"]),
        (["--memory-budget", "much"], ["rsauto: --memory-budget much: memory_budget: give a size"]),
        (
            ["--micro-batch-size", "3"],
            ["--micro-batch-size 3: training: micro_batch_size must divide batch_size 4"],
        ),
    ],
)
def test_wrong_options_are_told_before_anything_is_loaded(
    options: list[str], parts: list[str], study: Path, tmp_path: Path
) -> None:
    result = train(study, *options, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    for part in parts:
        assert part in result.stderr, result.stderr
    assert "loading libraries" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_missing_is_named(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsauto.finetuning.request.find_spec", lambda name: None)
    result = train(study, "--track", "wandb")
    assert result.exit_code == 2 and "pip install wandb" in result.stderr


def test_a_folder_of_something_else_is_refused(study: Path, tmp_path: Path) -> None:
    number = number_of(study, method="rslora", role="search")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").touch()
    result = train(study, "--trial", number, "--out", out)
    assert result.exit_code == 2 and "is not empty and holds no training" in result.stderr
    assert "is a file" in train(study, "--trial", number, "--out", out / "notes.txt").stderr

    (out / "notes.txt").unlink()
    stopped_at(job_of(study, trial=number, out=out), 1)
    result = train(study, "--trial", number, "--seed", 5, "--steps", 9, "--out", out)
    assert result.exit_code == 2 and "loading libraries" not in result.stderr
    assert "seed: was 0, is 5" in result.stderr and "steps: was 8, is 9" in result.stderr
    other = number_of(study, method="rsadalora", role="search")
    assert f"trial: was {number}, is {other}" in train(study, "--trial", other, "--out", out).stderr
    result = train(study, "--trial", number, "--epochs", 2, "--out", out)
    assert result.exit_code == 2 and "steps: was 8, is 32" in result.stderr


def test_a_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    result = train(tmp_path)
    assert result.exit_code == 2 and "trials.jsonl is not there" in result.stderr


def test_other_data_than_the_studys_are_refused(study: Path, tmp_path: Path) -> None:
    copied = tmp_path / "study"
    shutil.copytree(study, copied)
    found = json.loads((copied / "environment.json").read_text())
    found["fingerprints"]["data"] = "other"
    (copied / "environment.json").write_text(json.dumps(found))
    result = train(copied, "--best")
    assert result.exit_code == 2 and "the data changed since the study was made" in result.stderr
    assert not (copied / "trained").exists()


def test_a_model_is_the_same_that_does_the_same(study: Path, tmp_path: Path) -> None:
    """Its files may have been written anew since, with the same numbers in them."""
    copied = tmp_path / "study"
    shutil.copytree(study, copied)
    found = json.loads((copied / "environment.json").read_text())
    found["fingerprints"]["model"] = "other"
    (copied / "environment.json").write_text(json.dumps(found))
    result = train(copied, "--best", "--steps", 2)
    assert result.exit_code == 0 and "its loss without an adapter is the same" in said(result)
    found["baseline"]["eval_loss"] *= 1.02
    (copied / "environment.json").write_text(json.dumps(found))
    result = train(copied, "--best", "--steps", 3, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "the model changed since the study was made" in said(result)


# --------------------------------------------------------------------------- trackers, Python


def test_trackers_are_told_the_same_numbers(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = [name for name in ("tensorboard", "wandb", "trackio") if find_spec(name)]
    if not installed:
        pytest.skip("no tracker is installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    number, out = number_of(study, method="rslora", role="search"), tmp_path / "out"
    options = {"trial": number, "steps": 6, "num_evals": 2, "out": out}
    stopped_at(job_of(study, **options), 3)
    values = rsauto.train(study, **options, track=tuple(installed))
    wanted = {line["step"]: line["train_loss"] for line in curve(out) if line["step"] > 3}
    if "tensorboard" in installed:
        logged = tensorboard_values(out / "tensorboard")
        assert logged["train/loss"] == pytest.approx(wanted)
        assert logged["eval/loss"] == pytest.approx({6: values["eval_loss"]})
        assert logged["test/loss"] == pytest.approx({6: values["test"]["eval_loss"]})
    if "wandb" in installed:
        assert list((out / "wandb").glob("offline-run-*/*.wandb"))
    if "trackio" in installed:
        assert list((tmp_path / "trackio").glob("*.db"))


def tensorboard_values(folder: Path) -> dict[str, dict[int, float]]:
    """Step to value of every scalar, read by tensorboard itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {
        tag: {event.step: event.value for event in found.Scalars(tag)}
        for tag in found.Tags()["scalars"]
    }


def test_from_python_and_without_a_test_split(study: Path, tmp_path: Path) -> None:
    data = study.parent / "data" / "test.jsonl"
    kept = data.read_bytes()
    data.unlink()
    try:
        values = rsauto.train(study, best=True, steps=2, out=tmp_path / "out")
    finally:
        data.write_bytes(kept)
    assert values["test"] is None and "none in the data" in values["test_source"]
    assert "test rows" not in (tmp_path / "out" / "adapter" / "README.md").read_text()
    with pytest.raises(InputError, match="--trial 99"):
        rsauto.train(study, trial=99)
