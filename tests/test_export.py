"""What leaves a study: weights that compute what was trained, and settings that say what it was."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import runpy
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from huggingface_hub import ModelCard
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel
from tiny_study import records, study_values
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)
from typer.testing import CliRunner

import rsauto
from rsauto.adapters.lora import add_adapter, lora_layers, trainable_parameters
from rsauto.adapters.optimizers import build_optimizer
from rsauto.base import load_weights
from rsauto.cli import app
from rsauto.data import Example
from rsauto.exports import run as run_module
from rsauto.exports.chosen import Chosen, choose
from rsauto.exports.parity import ParityError, Trained, compare
from rsauto.exports.recipe import recipe_of, whole_alpha
from rsauto.exports.settings import trainer_notes
from rsauto.exports.trl import ABILITIES as TRL
from rsauto.records import TrialRecord, TrialSpec
from rsauto.report.choice import Choice
from rsauto.report.table import load_study
from rsauto.scaling import gamma_r
from rsauto.search import books
from rsauto.training.evaluate import evaluate
from rsauto.training.loop import accumulate_gradients, set_learning_rate

CPU = torch.device("cpu")
STUDIES = Path(__file__).parents[1] / "studies"


def tiny(folder: Path, **changes: Any) -> dict[str, Any]:
    """A study of one rank, at a rate at which adapters move the logits."""
    values = study_values(
        folder, rank=[4], alpha=[8], learning_rate=[3e-2], strategy="grid", seeds=1
    )
    values["memory_budget"] = "16MiB"
    values["packing"] = {"mode": "off"}
    for section, change in changes.items():
        values[section] = {**values.get(section, {}), **change}
    return values


def run_study(values: dict[str, Any], out: Path) -> Path:
    """Runs a study in this process; it keeps the adapters of all its trials."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(books, "KEPT_ADAPTERS", 99)
        rsauto.run_study(values, out=out, report=False)
    return out


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    methods = ["rslora", "rsadalora", "lora"]
    return run_study(tiny(folder, search={"method": methods, "trials": 8}), folder / "out")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier on a base of 32 bits, one trial."""
    folder = tmp_path_factory.mktemp("labelled")
    texts = [{"text": f"{n} {'up' if n % 2 else 'down'}", "label": n % 2} for n in range(48)]
    lines = "".join(json.dumps(row) + "\n" for row in texts)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    data = {"name": str(folder / "rows.jsonl"), "label": "label"}
    values = tiny(folder, data=data, search={"trials": 1})
    return run_study(values, folder / "out")


def trial_of(study: Path, method: str = "rslora", role: str = "search") -> TrialRecord:
    found = load_study(study).records
    return next(r for r in found if r.method == method and r.role == role)


def chosen_of(study: Path, record: TrialRecord) -> Chosen:
    return choose(load_study(study), Choice(trial=record.number))


def export(study: Path, to: str, out: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["export", str(study), "--to", to, "--out", str(out), *options])


def done(result: Result) -> dict[str, Any]:
    """What --json says of an export that worked."""
    assert result.exit_code == 0, (result.output, result.exception)
    values: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return values


def edited(study: Path, folder: Path, number: int, **changes: Any) -> Path:
    """The study with another record in the place of one of its trials."""
    shutil.copytree(study, folder)
    lines = [
        json.dumps({**line, **changes} if line["number"] == number else line)
        for line in records(study)
    ]
    (folder / "trials.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def loss_of(model: nn.Module, chosen: Chosen) -> float:
    data = chosen.data
    return evaluate(
        model, data.validation, batch_size=4, pad_token_id=data.pad_token_id, device=CPU
    ).eval_loss


# ------------------------------------------------------------------------------------ weights

WEIGHTS = [
    ("lora", "rslora", "search", (), 1e-5),
    ("lora", "rsadalora", "search", (), 1e-5),
    ("lora", "rslora", "refit", ("--padded",), 1e-5),
    ("lora", "lora", "search", ("--dtype", "bfloat16"), 2e-2),
    ("adalora", "rsadalora", "search", (), 1e-5),
    ("merged", "rslora", "refit", (), 1e-5),
    ("merged", "lora", "search", ("--dtype", "float16"), 1e-2),
]


@pytest.mark.parametrize(("to", "method", "role", "options", "tolerance"), WEIGHTS)
@pytest.mark.sample(3)
def test_an_export_has_the_loss_that_the_trial_ended_with(
    study: Path, tmp_path: Path, to: str, method: str, role: str, options: tuple[str, ...],
    tolerance: float,
) -> None:  # fmt: skip
    record = trial_of(study, method, role)
    chosen = chosen_of(study, record)
    out = tmp_path / "export"
    said = done(export(study, to, out, "--trial", str(record.number), "--json", *options))
    parity = said["parity"]
    assert parity["adapter_effect"] > 0.1
    assert parity["max_logit_difference"] <= parity["relative_tolerance"] * parity["max_logit"] * 2
    place = out if to == "merged" else Path(chosen.location)
    model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    if to != "merged":
        model = PeftModel.from_pretrained(model, str(out))
    assert loss_of(model, chosen) == pytest.approx(record.eval_loss, abs=tolerance)


def test_exported_adapters_are_what_their_names_say(study: Path, tmp_path: Path) -> None:
    refit = trial_of(study, "rslora", "refit")
    adalora = trial_of(study, "rsadalora")
    assert refit.rank_pattern is not None and len(set(refit.rank_pattern.values())) > 1
    rsauto.export(study, "lora", trial=refit.number, out=tmp_path / "own")
    rsauto.export(study, "lora", trial=refit.number, out=tmp_path / "padded", padded=True)
    rsauto.export(study, "adalora", trial=adalora.number, out=tmp_path / "adalora")
    own, padded, stock = (
        PeftConfig.from_pretrained(str(tmp_path / name)) for name in ("own", "padded", "adalora")
    )
    assert isinstance(own, LoraConfig) and isinstance(padded, LoraConfig)
    assert own.rank_pattern and not padded.rank_pattern and not padded.alpha_pattern
    assert padded.r == padded.lora_alpha == own.r == refit.r_max
    assert isinstance(stock, AdaLoraConfig)
    assert stock.lora_alpha / stock.init_r == pytest.approx(adalora.gamma_r, rel=1e-4)


def test_a_merged_model_is_the_base_models_own_kind(study: Path, tmp_path: Path) -> None:
    rsauto.export(study, "merged", best=True, out=tmp_path / "merged")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config
    assert config.use_cache is True
    text = "3 down: 3 2 1"
    base = AutoTokenizer.from_pretrained(load_study(study).config.model.name)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(text) == base(text)


def test_a_head_goes_with_the_adapter_and_into_the_merged_model(
    labelled: Path, tmp_path: Path
) -> None:
    record = trial_of(labelled, "lora", "default")
    chosen = chosen_of(labelled, record)
    for to in ("lora", "merged"):
        done(export(labelled, to, tmp_path / to, "--trial", "0", "--json"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert loss_of(merged, chosen) == pytest.approx(record.eval_loss, abs=1e-5)
    result = export(labelled, "trl", tmp_path / "trl", "--trial", "0")
    assert result.exit_code == 2 and "cannot express a sequence classifier" in result.output


def test_of_several_trainings_the_one_asked_for_comes_first_then_the_longest(
    study: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    record = trial_of(study)
    for name, steps in (("a", 1), ("b", 60), ("c", 9)):
        place = folder / "trained" / name
        shutil.copytree(study / "adapters" / f"{record.number:04d}", place / "adapter")
        values = {**record.to_json(), "steps": steps}
        (place / "record.json").write_text(json.dumps(values), encoding="utf-8")
    options = ("--trial", str(record.number), "--json")
    said = done(export(folder, "lora", tmp_path / "one", *options))
    assert (said["steps"], Path(said["weights"]).parts[-2:]) == (60, ("b", "adapter"))
    (folder / "trained" / "c").rename(folder / "trained" / f"trial-{record.number}")
    said = done(export(folder, "lora", tmp_path / "two", *options))
    assert said["steps"] == 9
    said = done(export(study, "lora", tmp_path / "three", *options))
    assert said["steps"] == record.steps and "trained" not in said["weights"]


def test_a_4_bit_base_is_merged_dequantised_and_one_of_8_refused(
    study: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    record = trial_of(study)
    for bits in (4, 8):
        folder = edited(study, tmp_path / f"in-{bits}", record.number, quant_bits=bits)
        values = yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8"))
        values["model"]["quant_bits"] = bits
        (folder / "study.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    options = ("--trial", str(record.number), "--json")
    said = done(export(tmp_path / "in-4", "merged", tmp_path / "merged", *options))
    assert said["parity"]["adapter_effect"] > 0.1
    chosen = chosen_of(tmp_path / "in-4", record)
    base = load_weights(chosen.source, chosen.config.model, CPU).model
    adapted = PeftModel.from_pretrained(base, str(study / "adapters" / f"{record.number:04d}"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    assert loss_of(merged, chosen) == pytest.approx(loss_of(adapted, chosen), abs=1e-5)
    assert loss_of(merged, chosen) != pytest.approx(record.eval_loss, abs=1e-4)
    result = export(tmp_path / "in-8", "merged", tmp_path / "no", *options)
    assert result.exit_code == 2 and "rounds its activations" in result.output


def test_an_export_that_computes_something_else_is_not_kept(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = run_module.write_lora

    def wrong(saved: Any, *args: Any, **options: Any) -> int:
        factors = {name: (a, 1.01 * b) for name, (a, b) in saved.factors.items()}
        return written(dataclasses.replace(saved, factors=factors), *args, **options)

    monkeypatch.setattr(run_module, "write_lora", wrong)
    result = export(study, "lora", tmp_path / "export")
    assert result.exit_code == 1
    assert "does not compute what was trained" in result.output
    assert list(tmp_path.iterdir()) == []


def test_the_tolerance_is_that_of_the_coarsest_number() -> None:
    trained = Trained(torch.tensor([[0.5, -4.0]]), 1.0)
    other = trained.logits + 0.1
    with pytest.raises(ParityError, match=r"difference of two logits 0.1 .* in float32"):
        compare(trained, other, torch.float32, torch.float32, rows=1)
    assert compare(trained, other, torch.float32, torch.bfloat16, rows=1).dtype == "bfloat16"
    with pytest.raises(ParityError):
        compare(trained, trained.logits * torch.nan, torch.bfloat16, rows=1)


# ----------------------------------------------------------------------------------- settings

SETTINGS: Mapping[str, Mapping[str, str]] = {
    "axolotl": {
        "model": "base_model", "rank": "lora_r", "alpha": "lora_alpha", "rslora": "peft_use_rslora",
        "micro": "micro_batch_size", "schedule": "lr_scheduler", "optimizer": "optimizer",
        "length": "sequence_len",
    },
    "llamafactory": {
        "model": "model_name_or_path", "rank": "lora_rank", "alpha": "lora_alpha",
        "rslora": "use_rslora", "micro": "per_device_train_batch_size",
        "schedule": "lr_scheduler_type", "optimizer": "optim", "length": "cutoff_len",
    },
    "trl": {
        "model": "model_name_or_path", "rank": "lora_r", "alpha": "lora_alpha",
        "rslora": "use_rslora", "micro": "per_device_train_batch_size",
        "schedule": "lr_scheduler_type", "optimizer": "optim", "length": "max_length",
    },
}  # fmt: skip
"""Target -> what -> its field."""


@pytest.mark.parametrize("method", ["rslora", "lora"])
@pytest.mark.parametrize("to", SETTINGS)
def test_settings_say_how_the_trial_was_trained(
    study: Path, tmp_path: Path, to: str, method: str
) -> None:
    record, names = trial_of(study, method), SETTINGS[to]
    said = done(export(study, to, tmp_path / to, "--trial", str(record.number), "--json"))
    values = yaml.safe_load((tmp_path / to / f"{to}.yaml").read_text(encoding="utf-8"))
    assert said["command"].endswith(f"{to}.yaml")
    assert values[names["model"]] == load_study(study).config.model.name
    for name in ("rank", "alpha"):
        assert type(values[names[name]]) is int and values[names[name]] == getattr(record, name)
    assert values[names["rslora"]] is (method == "rslora")
    assert gamma_r("rslora" if values[names["rslora"]] else "lora", 8, 4) == record.gamma_r
    assert values["learning_rate"] == record.learning_rate
    size = values[names["micro"]] * values["gradient_accumulation_steps"]
    assert size == record.batch_size
    assert values["max_steps"] == 6 and values["warmup_steps"] == 1
    assert values[names["schedule"]] == record.schedule == "linear"
    assert values[names["optimizer"]] == "adamw_torch_fused"
    assert values["weight_decay"] == record.weight_decay and values["seed"] == record.seed
    assert values["max_grad_norm"] == record.max_grad_norm
    assert values[names["length"]] == record.max_length
    targets = values.get("lora_target_modules") or values["lora_target"].split(",")
    assert sorted(targets) == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip


@pytest.mark.parametrize("to", SETTINGS)
def test_settings_are_read_by_the_trainers_own_schema(study: Path, tmp_path: Path, to: str) -> None:
    if importlib.util.find_spec(to) is None:
        pytest.skip(f"{to} is not installed; studies/export_schemas.py says how")
    record = trial_of(study, "rslora", "refit" if to == "axolotl" else "search")
    done(export(study, to, tmp_path / to, "--trial", str(record.number), "--json"))
    schemas = runpy.run_path(str(STUDIES / "export_schemas.py"))
    assert schemas["check"](tmp_path / to)


def test_rows_are_the_studys_token_for_token(study: Path, tmp_path: Path) -> None:
    from datasets import load_from_disk

    train = chosen_of(study, trial_of(study)).data.train
    for to in ("trl", "llamafactory"):
        rsauto.export(study, to, out=tmp_path / to)
    lines = (tmp_path / "trl" / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    stored = load_from_disk(str(tmp_path / "llamafactory" / "data"))["train"]
    assert [json.loads(line) for line in lines] == [as_row(example) for example in train]
    assert list(stored) == [as_row(example) for example in train]


def as_row(example: Example) -> dict[str, list[int]]:
    ids, prompt = list(example.input_ids), example.num_prompt_tokens
    assert prompt > 0
    labels = [-100] * prompt + ids[prompt:]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


REFUSED = [
    ("axolotl", "rsadalora", {}, "cannot place rank .*--to lora --trial .*--to axolotl --trial"),
    ("trl", "rsadalora", {}, "--to lora --trial .*--to axolotl, or --to peft, --trial"),
    ("peft", "rsadalora", {}, "the refit, its rank pattern as rsLoRA: --to peft --trial"),
    ("trl", "rslora", {"lr_ratio": 16.0}, r"LoRA\+ \(lr_ratio 16\). Exact is --to peft --trial"),
    ("axolotl", "rslora", {"lr_ratio": 16.0, "weight_decay": 0.1}, "together with weight_decay"),
    ("trl", "rslora", {"scaling_exponent": -0.25, "gamma_r": 8 * 4**-0.25}, "no whole alpha"),
    ("llamafactory", "rslora", {"init_scale": 0.5}, "init_scale 0.5. Exact is --to peft"),
    ("llamafactory", "refit", {}, "ranks that differ between modules. Exact is --to axolotl"),
    ("adalora", "rslora", {}, "has no triplets. The exact export of it is --to lora"),
]


@pytest.mark.parametrize(("to", "kind", "changes", "says"), REFUSED)
def test_what_a_target_cannot_express_is_refused_with_what_can(
    study: Path, tmp_path: Path, to: str, kind: str, changes: dict[str, Any], says: str
) -> None:
    record = trial_of(study, "rslora", "refit") if kind == "refit" else trial_of(study, kind)
    folder = edited(study, tmp_path / "study", record.number, **changes)
    result = export(folder, to, tmp_path / "export", "--trial", str(record.number))
    assert result.exit_code == 2
    assert "--to lora" in result.output
    import re

    assert re.search(says, result.output, re.DOTALL)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("to", "options", "says"),
    [
        ("lorra", (), "no such target. Did you mean 'lora'?"),
        ("trl", ("--padded",), "--padded is for --to lora"),
        ("card", ("--dtype", "bfloat16"), "--dtype is of weights"),
        ("lora", ("--dtype", "int8"), "choose one of float32, bfloat16, float16"),
        ("lora", ("--trial", "0", "--best"), "say which trial twice"),
        ("lora", ("--rank", "5"), "no trial of that rank"),
    ],
)
def test_what_makes_no_sense_is_refused(
    study: Path, tmp_path: Path, to: str, options: tuple[str, ...], says: str
) -> None:
    result = export(study, to, tmp_path / "export", *options)
    assert result.exit_code == 2 and says in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("exponent", "rank", "expected"),
    [(None, 5, (8, True)), (0.0, 5, (40, False)), (-0.25, 16, (16, True)), (-0.25, 2, None)],
)
def test_a_whole_alpha_is_used_only_where_it_is_exact(
    study: Path, exponent: float | None, rank: int, expected: tuple[int, bool] | None
) -> None:
    gamma = gamma_r("rslora", 8, rank, exponent)
    record = dataclasses.replace(
        trial_of(study), rank=rank, scaling_exponent=exponent, gamma_r=gamma
    )
    found = whole_alpha(record)
    assert (found if expected is None or exponent != 0.0 else expected) == expected
    if found is not None:
        alpha, use_rslora = found
        assert gamma_r("rslora" if use_rslora else "lora", alpha, rank) == pytest.approx(gamma)


# ------------------------------------------------------------------------------------- script

SCRIPTS: list[tuple[str, dict[str, Any]]] = [
    ("refit", {}),
    ("search", {"lr_ratio": 8.0, "weight_decay": 0.1, "learning_rate": 1e-3}),
    ("search", {"scaling_exponent": -0.25, "gamma_r": 8 * 4**-0.25, "init_scale": 0.5}),
    ("search", {"optimizer": "adafactor", "learning_rate": 1e-3}),
]


@pytest.mark.parametrize(("role", "changes"), SCRIPTS)
def test_the_script_trains_as_the_study_does(
    study: Path, tmp_path: Path, role: str, changes: dict[str, Any]
) -> None:
    number = trial_of(study, "rslora", role).number
    folder = edited(study, tmp_path / "study", number, **changes)
    record = next(r for r in load_study(folder).records if r.number == number)
    rsauto.export(folder, "peft", trial=record.number, out=tmp_path / "script")
    script = runpy.run_path(str(tmp_path / "script" / "train_lora.py"))
    chosen = chosen_of(folder, record)
    ours, optimizer, spec = trained_by_us(chosen)
    theirs = dict(trainable_parameters(script["model"]))
    start = trainable_parameters(ours)
    assert theirs.keys() == start.keys()
    assert all(torch.equal(theirs[name], start[name]) for name in start)
    assert {n: m.scaling["default"] for n, m in named_layers(script["model"]).items()} == (
        pytest.approx({n: m.scaling["default"] for n, m in named_layers(ours).items()})
    )
    lines = (tmp_path / "script" / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for step in range(3):
        indices = [4 * step + k for k in range(4)]
        set_learning_rate(optimizer, spec, step)
        expected = accumulate_gradients(ours, [indices], chosen.data, CPU)
        part = [rows[index] for index in indices]
        loss = script["summed_loss"](part) / sum(map(script["targets"], part))
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        for one, model in ((optimizer, ours), (script["optimizer"], script["model"])):
            torch.nn.utils.clip_grad_norm_(trainable_parameters(model).values(), 1.0)
            one.step()
            one.zero_grad()
        script["scheduler"].step()
    apart = [
        float((theirs[name] - value).detach().abs().max())
        for name, value in trainable_parameters(ours).items()
    ]
    assert max(apart) <= 1e-3 * record.learning_rate, apart


def trained_by_us(chosen: Chosen) -> tuple[PeftModel, torch.optim.Optimizer, TrialSpec]:
    """Model, optimizer and spec of the trial as its training begins."""
    record = chosen.record
    known = {field.name for field in dataclasses.fields(TrialSpec)}
    values = {k: v for k, v in dataclasses.asdict(record).items() if k in known}
    pattern = tuple((record.rank_pattern or {}).items()) or None
    spec = TrialSpec(**{**values, "rank_pattern": pattern, "steps": 6})
    base = load_weights(chosen.source, chosen.config.model, CPU).model
    torch.manual_seed(record.seed)
    model = add_adapter(base, spec)
    optimizer = build_optimizer(
        model, name=spec.optimizer, learning_rate=spec.learning_rate, lr_ratio=spec.lr_ratio,
        weight_decay=spec.weight_decay,
    )  # fmt: skip
    return model, optimizer, spec


def named_layers(model: nn.Module) -> dict[int, Any]:
    return dict(enumerate(lora_layers(model)))


def test_the_script_runs_to_its_end(labelled: Path, tmp_path: Path) -> None:
    done(export(labelled, "peft", tmp_path / "script", "--trial", "0", "--json"))
    script = runpy.run_path(str(tmp_path / "script" / "train_lora.py"), run_name="__main__")
    heads = [n for n in trainable_parameters(script["model"]) if ".modules_to_save." in n]
    rates = {group["initial_lr"] for group in script["optimizer"].param_groups}
    record = trial_of(labelled, "lora", "default")
    assert heads and rates == {record.learning_rate, record.head_learning_rate}
    saved = PeftConfig.from_pretrained(str(tmp_path / "script" / "adapter"))
    assert isinstance(saved, LoraConfig) and saved.r == record.rank


def test_batches_that_trainer_leaves_short_are_told(study: Path, tmp_path: Path) -> None:
    """64 rows in batches of 6: what transformers' own Trainer makes of the end of an epoch."""
    recipe = recipe_of(chosen_of(study, trial_of(study)), TRL)
    assert not [note for note in trainer_notes(recipe) if "whole number" in note], "64 = 16 x 4"
    six = dataclasses.replace(recipe.record, batch_size=6)
    (note,) = (
        one
        for one in trainer_notes(dataclasses.replace(recipe, record=six, steps=11))
        if "whole number" in one
    )
    sizes: list[int] = []

    class Counting(Trainer):
        def training_step(self, model: nn.Module, inputs: Any, *rest: Any) -> torch.Tensor:
            sizes.append(len(inputs["x"]))
            return super().training_step(model, inputs, *rest)

    class Squares(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            return {"loss": super().forward(x).square().mean()}

    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=6, max_steps=12, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"x": torch.ones(1)}] * len(recipe.chosen.data.train)
    Counting(Squares(1, 1), arguments, train_dataset=rows).train()  # type: ignore[arg-type]
    assert sizes == [6] * 10 + [4, 6]
    assert "64 rows" in note and "batches of 6: the last batch of every epoch has 4," in note
    shorter = dataclasses.replace(recipe, record=six, steps=10)
    assert len(trainer_notes(shorter)) == len(trainer_notes(recipe)), "it never comes to the end"


# ---------------------------------------------------------------------------- folder and card


def test_only_an_earlier_export_is_replaced_and_only_when_told(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    done(export(study, "card", out, "--json"))
    again = export(study, "card", out)
    assert again.exit_code == 2 and "Give --force" in again.output
    (out / "outputs").mkdir()
    (out / "outputs" / "mine.txt").write_text("hours of training")
    refused = export(study, "card", out, "--force")
    assert refused.exit_code == 2 and f"it holds {Path('outputs', 'mine.txt')}" in refused.output
    (out / "outputs" / "mine.txt").rename(tmp_path / "mine.txt")
    (out / "README.md").write_text("changed")
    done(export(study, "card", out, "--json", "--force"))
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "export.json"]
    assert (out / "README.md").read_text() != "changed"
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    refused = export(study, "card", other, "--force")
    assert refused.exit_code == 2 and "holds no export of rsauto" in refused.output
    assert (other / "thesis.tex").exists()


def test_weights_that_are_not_there_name_the_command_that_makes_them(
    study: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "study"
    shutil.copytree(study, bare, ignore=shutil.ignore_patterns("adapters", "best", "recommended"))
    result = export(bare, "lora", tmp_path / "export", "--rank", "4")
    assert result.exit_code == 2 and f"rsauto train {bare} --rank 4" in result.output


def test_what_was_trained_again_is_preferred_and_its_test_results_are_on_the_card(
    study: Path, tmp_path: Path
) -> None:
    record = trial_of(study)
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    trained = folder / "trained" / f"trial-{record.number}"
    shutil.copytree(study / "adapters" / f"{record.number:04d}", trained / "adapter")
    told = {"number": record.number, "eval_loss": 1.25, "test": {"loss": 1.5, "accuracy": 0.75}}
    (trained / "record.json").write_text(json.dumps(told))
    shutil.rmtree(folder / "adapters")
    rsauto.export(folder, "lora", trial=record.number, out=tmp_path / "export")
    found = ModelCard.load(tmp_path / "export" / "README.md").data.eval_results
    results = {(r.dataset_split, r.metric_type): r.metric_value for r in found}
    assert results["validation", "eval_loss"] == 1.25
    assert results["test", "loss"] == 1.5 and results["test", "accuracy"] == 0.75


def test_the_card_says_where_the_weights_come_from(study: Path, tmp_path: Path) -> None:
    record = trial_of(study)
    rsauto.export(study, "card", trial=record.number, out=tmp_path / "card")
    text = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    prints = load_study(study).environment["fingerprints"]
    for expected in (
        "gamma_r = alpha / sqrt(r) = 4", "peak of training, predicted", f"trial {record.number}",
        prints["data"], prints["model"], f"transformers {sys.modules['transformers'].__version__}",
    ):  # fmt: skip
        assert expected in text
    card = ModelCard(text)
    loss = next(r for r in card.data.eval_results if r.metric_type == "eval_loss")
    assert loss.metric_value == record.eval_loss and card.data.library_name == "peft"
    assert os.fspath(tmp_path) not in text
