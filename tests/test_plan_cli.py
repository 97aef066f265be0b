"""`rsauto plan` as a user meets it: the table, the JSON, the answers, and errors in words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import environment
from typer.testing import CliRunner, Result

import rsauto
from rsauto import study_file
from rsauto.cli import app
from rsauto.memory.plan_study import plan_study
from rsauto.plan_command import parse_ranks
from rsauto.plan_view import breakdown_bar, smallest_card
from rsauto.units import bytes_text, count_text

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
ADAPTER_PARAMS = 2 * (128 + 96 + 96 + 128 + 192 + 192 + 192)
"""Of a rank: inputs and outputs of q, k, v, o, gate, up and down, in two layers."""

LINEAR_WEIGHTS = 2 * (4096 + 2048 + 2048 + 4096 + 3 * 8192) + 512 * 64
"""Of the same layers and of the output head."""

BART = {
    "model_type": "bart",
    "d_model": 32,
    "vocab_size": 512,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 128,
}
BERT = {**LLAMA, "model_type": "bert"}
HEAVY = ("torch", "transformers", "peft", "optuna")

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="asks a machine without a GPU")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for all of these tests, so that each kind of step is traced once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RSAUTO_CACHE_DIR", str(shared))
    return shared


def written(folder: Path, config: Any = LLAMA) -> str:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


def run(*arguments: str, columns: int = 80) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": str(columns)})


def planned(*arguments: str, code: int = 0) -> dict[str, Any]:
    """The JSON of a plan on a CPU, of batches of 4 rows of 64 tokens."""
    result = run(*arguments, *ON_CPU, "--json")
    assert result.exit_code == code, result.output
    assert len(result.stdout.splitlines()) == 1
    found: dict[str, Any] = json.loads(result.stdout)
    return found


ON_CPU = ("--device", "cpu", "--batch-size", "4", "--max-length", "64")


def test_json_holds_what_a_script_needs(tmp_path: Path) -> None:
    model = written(tmp_path)
    found = planned("--model", model, "--ranks", "8,4..16", "--memory-budget", "7MiB")
    assert found["model"] == model
    assert found["memory_budget_bytes"] == 7 * 2**20
    assert [row["rank"] for row in found["ranks"]] == [4, 8, 16]
    for row in found["ranks"]:
        assert row["num_trainable_params"] == ADAPTER_PARAMS * row["rank"]
        assert sum(row["breakdown"].values()) == row["peak_bytes"] <= row["reserved_bytes"]
        assert row["fits"] == (row["needed_bytes"] <= 7 * 2**20)
    largest = found["largest_rank"]
    beside = planned("--model", model, "--ranks", f"{largest},{largest + 1}",
                     "--memory-budget", "7MiB")  # fmt: skip
    assert [row["fits"] for row in beside["ranks"]] == [True, False]


def test_the_table_shows_the_figures_of_the_json(tmp_path: Path) -> None:
    arguments = ("--model", written(tmp_path), "--ranks", "4..1024", "--memory-budget", "7MiB")
    wide = run(*arguments, *ON_CPU, "--json", columns=160)
    narrow = run(*arguments, *ON_CPU, "--json")
    rows = json.loads(wide.stdout)["ranks"]
    assert {row["fits"] for row in rows} == {True, False}
    for result, is_wide in ((wide, True), (narrow, False)):
        shown = [line for line in result.stderr.splitlines() if re.match(r" *\d+ +[\d.]+ ", line)]
        assert len(shown) == len(rows)
        for line, row in zip(shown, rows, strict=True):
            cells = [
                str(row["rank"]),
                bytes_text(row["peak_bytes"]),
                bytes_text(row["needed_bytes"]),
                bytes_text(7 * 2**20 - row["needed_bytes"]),
                "yes" if row["fits"] else "no",
                count_text(row["num_trainable_params"]),
                breakdown_bar(row["breakdown"]),
            ]
            if is_wide:
                cells[6:6] = [bytes_text(4 * row["num_trainable_params"]),
                              count_text(row["flops_per_token"])]  # fmt: skip
                cells.append(f"{row['phase']} {row['operation'].removeprefix('aten.')}".strip())
            assert re.split(r" {2,}", line.strip()) == cells
    assert all(len(line) <= 80 for line in narrow.stderr.splitlines()[1:])
    largest = json.loads(wide.stdout)["largest_rank"]
    assert f"Rank {largest} is the largest that fits 7.00 MiB." in wide.stderr


def test_a_plan_made_before_loads_no_heavy_library(tmp_path: Path) -> None:
    arguments = [
        "plan", "--model", written(tmp_path), "--ranks", "4..64", "--fit", "64",
        "--micro-batch-size", "auto", "--memory-budget", "3MiB", *ON_CPU, "--json",
    ]  # fmt: skip
    code = (
        "import sys\nfrom rsauto.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit as end: code = end.code\n"
        f"assert not set({HEAVY!r}) & set(sys.modules)\nsys.exit(code)"
    )
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert "tracing a training step of" in first.stderr
    second = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout
    assert "tracing" not in second.stderr


def test_fit_names_a_change_under_which_the_rank_fits(tmp_path: Path) -> None:
    arguments = ("--model", written(tmp_path), "--ranks", "4,8", "--memory-budget", "4MiB")
    found = planned(*arguments, "--fit", "16", code=3)
    settings = found["change"]["settings"]
    assert set(settings) == {"micro_batch_size"}, "the cheapest is enough"
    micro = str(settings["micro_batch_size"])
    changed = planned(*arguments, "--micro-batch-size", micro, "--ranks", "16")
    (row,) = changed["ranks"]
    assert row["fits"]
    assert row["needed_bytes"] == found["change"]["needed_bytes"] <= 4 * 2**20
    said = " ".join(run(*arguments, *ON_CPU, "--fit", "16").stdout.split())
    assert f"Cheapest change: micro-batches of {micro} free" in said


def test_fit_says_when_nothing_helps_or_nothing_is_needed(tmp_path: Path) -> None:
    arguments = ("--model", written(tmp_path), "--ranks", "4", "--memory-budget")
    fits = run(*arguments, "100MiB", *ON_CPU, "--fit", "8")
    assert fits.exit_code == 0
    assert "Rank 8 fits as it is: it needs" in fits.stdout
    large = run(*arguments, "100MiB", *ON_CPU, "--fit", "8192")
    states = bytes_text(3 * 4 * ADAPTER_PARAMS * 8192)
    said = " ".join(large.stdout.split())
    assert f"the adapter and the optimizer's states alone need {states}." in said
    assert planned(*arguments, "300KiB", code=3)["change"] is None
    hopeless = run(*arguments, "300KiB", *ON_CPU)
    assert hopeless.exit_code == 3
    said = " ".join(hopeless.stdout.split())
    rotations = 2 * 64  # inverse frequencies and their originals, rounded up to 64 bytes
    weights = bytes_text(4 * (LINEAR_WEIGHTS + 512 * 64 + 5 * 64) + rotations)
    assert f"the weights alone need {weights}, and the budget is 300.0 KiB" in said
    assert "Nothing tried makes it fit: micro-batches of 1, gradient checkpointing" in said
    assert "memory_budget: none of these ranks fits 300.0 KiB" in hopeless.stderr


def test_the_cost_of_a_study_is_what_arithmetic_says(tmp_path: Path) -> None:
    cost = planned(
        "--model", written(tmp_path), "--ranks", "8", "--trials", "20", "--steps", "100",
        "--flops-per-second", "2T", "--price-per-hour", "3.6",
    )["cost"]  # fmt: skip
    tokens = 20 * 100 * 4 * 64
    flops = tokens * (4 * LINEAR_WEIGHTS + 6 * 8 * ADAPTER_PARAMS)
    assert cost["tokens"] == tokens
    assert cost["flops"] == flops
    assert cost["seconds"] == pytest.approx(flops / 2e12)
    assert cost["price"] == pytest.approx(flops / 2e12 / 1000)


def test_without_a_study_there_is_no_cost_unless_asked(tmp_path: Path) -> None:
    assert "cost" not in planned("--model", written(tmp_path), "--ranks", "8")


def test_the_embedded_study_is_planned_alone() -> None:
    result = run("--json")
    found = json.loads(result.stdout)
    assert found["model"] == "embedded"
    assert found["memory_budget_bytes"] == 29 * 2**20
    assert found["outside_bytes"] == 0, "on a CPU"
    assert {row["rank"]: row["fits"] for row in found["ranks"]} == {
        **dict.fromkeys((2, 4, 8, 16, 32, 64), True), 128: False,
    }  # fmt: skip
    assert found == json.loads(run("--device", "cpu", "--json").stdout)
    assert found["cost"]["tokens"] == 26 * 64 * 16 * 32
    assert "The data are not read: the longest row is taken to have 32 tokens." in result.stderr
    plan = plan_study(study_file.load())
    assert plan.to_json()["ranks"] == found["ranks"]


@no_gpu
def test_settings_come_from_the_study_and_options_override_them(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text(
        f"model: {{name: {written(tmp_path)}, dtype: bfloat16, adapter_dtype: bfloat16,\n"
        "  quant_bits: 8, gradient_checkpointing: true, attn_implementation: eager,\n"
        "  target_modules: attention}\n"
        "data: {name: rows.csv, text: '{text}', label: label, max_length: 32}\n"
        "training: {epochs: 1, steps: null, batch_size: 4, micro_batch_size: 2, optimizer: sgd,\n"
        "  max_grad_norm: null}\n"
        "search: {rank: [3, 6], method: lora}\n"
    )
    plan = plan_study(study_file.load(path), ranks=[6])
    kind = plan.planner.kind
    assert (kind.dtype, kind.adapter_dtype, kind.quant_bits) == ("bfloat16", "bfloat16", 8)
    assert (kind.gradient_checkpointing, kind.attn_implementation) == (True, "eager")
    assert (kind.target_modules, kind.optimizer, kind.clip) == ("attention", "sgd", False)
    assert (kind.task, kind.method, kind.device_type) == ("SEQ_CLS", "lora", "cuda")
    assert (plan.batch_size, plan.micro_batch_size, plan.max_length) == (4, 2, 32)
    assert [row.rank for row in plan.ranks] == [6]
    assert plan.memory_budget is None, "auto, and no GPU"
    result = run(str(path), "--set", "training.batch_size=2", "--max-length", "16", "--json")
    found = json.loads(result.stdout)
    assert (found["batch_size"], found["max_length"]) == (2, 16)
    assert [row["rank"] for row in found["ranks"]] == [3, 6]
    assert "cost" not in found, "epochs of data that are not read"
    said = " ".join(result.stderr.split())
    assert "There are 2 classes" in said
    assert "memory_budget is auto and no GPU was found" in said


def test_an_estimate_is_marked_and_explained(tmp_path: Path) -> None:
    result = run("--model", written(tmp_path, BART), "--task", "SEQ_CLS", "--ranks", "4", *ON_CPU)
    assert re.search(r"^ +4 +~[\d.]+ MiB +~[\d.]+ ", result.stdout, re.MULTILINE), result.output
    said = " ".join(result.stdout.split())
    assert "~ is an estimate by a closed form with a large allowance: the step cannot be" in said
    assert "traced (DynamicOutputShapeException: aten.unique_consecutive" in said
    traced = run("--model", written(tmp_path), "--ranks", "4", *ON_CPU)
    assert "~" not in traced.stdout


def test_a_bar_has_a_letter_for_each_share() -> None:
    assert breakdown_bar({"logits_and_loss": 1, "activations": 2, "weights": 5}, 8) == "WWWWW..L"
    assert breakdown_bar({"weights": 2, "adapters": 1}, 4) == "WWWA"
    assert breakdown_bar({"optimizer": 7, "gradients": 0}, 3) == "OOO"
    assert breakdown_bar({}, 3) == ""


def test_without_a_budget_a_card_is_named_that_can_do_it() -> None:
    for dtype, card in (("float32", "t4"), ("bfloat16", "rtx5080")):
        plan = rsauto.plan(LLAMA, ranks=[4], max_length=64, dtype=dtype)
        (row,) = plan.ranks
        assert smallest_card(plan, replace(row, needed_bytes=12 * 2**30)) == card
        assert smallest_card(plan, replace(row, needed_bytes=2**40)) == "none"


@pytest.mark.parametrize(
    ("text", "ranks"),
    [("8", (8,)), ("4,100", (4, 100)), ("2..16", (2, 4, 8, 16)), ("1, 8 .. 8", (1, 8))],
)
def test_ranks_are_numbers_and_ranges(text: str, ranks: tuple[int, ...]) -> None:
    assert parse_ranks(text) == ranks


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--ranks 0", ["ranks: '0'", "4..256"]),
        ("--ranks abc", ["ranks: 'abc'"]),
        ("--ranks 4,,8", ["ranks: ''"]),
        ("--ranks 16..4", ["ranks: '16..4'"]),
        ("--ranks 4..100", ["ranks: '4..100'", "100 is none"]),
        ("--batch-size 0", ["batch_size: 0"]),
        ("--batch-size 9999999999999", ["batch_size: 9999999999999"]),
        ("--batch-size 8 --micro-batch-size 3", ["micro_batch_size: 3 does not divide", "8"]),
        ("--micro-batch-size many", ["micro_batch_size: 'many'", "auto"]),
        ("--max-length -1", ["max_length: -1"]),
        ("--max-length 300", ["max_length: 300", "256"]),
        ("--quant-bits 5", ["quant_bits: 5", "4, 8"]),
        ("--device tpu", ["device: 'tpu'", "cpu, cuda"]),
        ("--optimizer adamm", ["optimizer: 'adamm'", "Did you mean 'adamw'?"]),
        ("--method rslor", ["method: 'rslor'", "Did you mean 'rslora'?"]),
        ("--memory-budget rtx4091", ["memory_budget: 'rtx4091'", "Did you mean 'rtx4090'?"]),
        ("--fit 8", ["fit: rank 8", "--memory-budget"]),
        ("--fit 0 --memory-budget 1GiB", ["fit: 0"]),
        ("--trials 3 --steps 5 --price-per-hour 2", ["price_per_hour", "flops_per_second"]),
        ("--trials 3 --steps 5 --flops-per-second fast", ["flops_per_second: 'fast'", "150T"]),
        ("--steps 5", ["trials", "--trials"]),
        ("--trials 0 --steps 5", ["trials: 0"]),
        ("--set search.trials=3", ["--set", "study file"]),
        ("--target-modules q_prj", ["Did you mean 'q_proj'?", "It has: down_proj"]),
        ("--target-modules q_proj,", ["target_modules: 'q_proj,'"]),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, arguments: str, parts: list[str]) -> None:
    assert_refused(
        run("--model", written(tmp_path), "--max-length", "64", *arguments.split()), *parts
    )


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ('{"model_type": ', ["is not JSON"]),
        ({**LLAMA, "hidden_size": 10**14}, ["10^14 parameters"]),
        ({**LLAMA, "hidden_size": -1}, ["hidden_size must be a whole number"]),
        ({**LLAMA, "model_type": "lama"}, ["transformers cannot read", "'lama'"]),
        (BERT, ["model: 'bert'", "no causal language model", "--task SEQ_CLS"]),
    ],
)
def test_a_wrong_model_is_named(tmp_path: Path, config: Any, parts: list[str]) -> None:
    assert_refused(run("--model", written(tmp_path, config), "--max-length", "64"), *parts)


def test_an_unknown_model_has_near_names() -> None:
    assert_refused(run("--model", "lama-2-7b"), "'lama-2-7b'", "Did you mean 'llama-2-7b'?")


@no_gpu
def test_a_budget_of_auto_needs_a_gpu(tmp_path: Path) -> None:
    assert_refused(
        run("--model", written(tmp_path), "--memory-budget", "auto"),
        "memory_budget: auto asks the GPU of this machine, and it has none",
    )


def assert_refused(result: Result, *parts: str) -> None:
    """One message with these parts, and nothing on standard output."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    for part in parts:
        assert part in result.stderr, result.stderr
    assert "Traceback" not in result.output
