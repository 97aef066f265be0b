"""What a study may say: sizes, choices, rules between settings, and what may change on resume."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rsauto.choices import PowerRange, RateRange, parse_bytes
from rsauto.config import (
    DataConfig,
    ModelConfig,
    PackingSettings,
    SearchConfig,
    StudyConfig,
    TrainingConfig,
    differences,
)
from rsauto.errors import InputError
from rsauto.study_file import validate


def message_of(raw: dict[str, Any]) -> str:
    """The one problem of a study that has one."""
    with pytest.raises(InputError) as caught:
        validate(raw)
    assert len(caught.value.problems) == 1, caught.value.problems
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("24GiB", 24 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("512MiB", 2**29),
        ("3 kib", 3072),
        ("1TiB", 2**40),
        ("500 MB", 500_000_000),
        ("2GB", 2_000_000_000),
        ("1tb", 10**12),
        ("7 KB", 7000),
        ("100B", 100),
        ("100", 100),
        (100, 100),
        (2.0, 2),
        ("auto", "auto"),
    ],
)
def test_sizes_are_read_in_powers_of_1024_and_of_1000(text: Any, num_bytes: Any) -> None:
    assert parse_bytes(text) == num_bytes
    assert StudyConfig(memory_budget=text).memory_budget == num_bytes


@pytest.mark.parametrize("value", ["24 GiBB", "big", "-1", -1, "", "GiB", "1e9", True, None, [1]])
def test_what_is_no_size_is_refused_with_an_example(value: Any) -> None:
    found = message_of({"memory_budget": value})
    assert "give a size such as 24GiB, 512MiB or a number of bytes, or auto" in found


@pytest.mark.parametrize("value", [0, "0GiB", "0.2B"])
def test_a_budget_of_nothing_is_refused(value: Any) -> None:
    assert "must be more than zero bytes" in message_of({"memory_budget": value})


@given(st.integers(1, 2**50))
def test_any_number_of_bytes_is_kept(num_bytes: int) -> None:
    assert parse_bytes(num_bytes) == parse_bytes(f"{num_bytes} B") == num_bytes


@pytest.mark.parametrize(
    ("section", "settings", "expected"),
    [
        ("training", {"steps": 3, "epochs": 1, "num_evals": 1}, "exactly one of steps and epochs"),
        ("training", {"batch_size": 3}, "exactly one of steps and epochs"),
        ("training", {"steps": 3, "num_evals": 4}, "num_evals must be at most steps, which is 3"),
        ("training", {"steps": 9, "micro_batch_size": 5}, "one of [1, 2, 4, 8, 16]"),
        ("training", {"steps": 9, "micro_batch_size": 0}, "must divide batch_size 16"),
        ("training", {"steps": 0}, "training.steps: must be at least 1 (got 0)"),
        ("training", {"epochs": 0}, "training.epochs: must be greater than 0 (got 0)"),
        ("training", {"steps": 9, "warmup_share": 1}, "must be less than 1"),
        ("training", {"steps": 9, "max_grad_norm": 0}, "must be greater than 0"),
        ("training", {"steps": 9, "weight_decay": -1}, "must be at least 0"),
        ("training", {"steps": 9, "optimizer": "lion"}, "must be 'adamw', 'sgd' or 'adafactor'"),
        ("search", {"rank": {"low": 3, "high": 8}}, "low must be a power of two, or give a list"),
        ("search", {"rank": {"low": 4, "high": 12}}, "high must be a power of two"),
        ("search", {"rank": {"low": 16, "high": 8}}, "search.rank: low must not be above high"),
        ("search", {"learning_rate": {"low": 2, "high": 1}}, "low must not be above high"),
        ("search", {"learning_rate": {"low": 0, "high": 1}}, "must be greater than 0 (got 0)"),
        ("search", {"learning_rate": float("inf")}, "must be a finite number"),
        ("search", {"learning_rate": float("nan")}, "must be a finite number"),
        ("search", {"strategy": "grid"}, "strategy grid needs learning_rate as a list"),
        ("search", {"rank": [4, 8, 4]}, "rank lists a value twice"),
        ("search", {"learning_rate": [1e-4, 1e-4]}, "learning_rate lists a value twice"),
        ("search", {"method": ["lora", "lora"]}, "method lists a value twice"),
        (
            "search",
            {"method": "dora"},
            "must be 'lora', 'rslora', 'adalora' or 'rsadalora' (got 'dora')",
        ),
        ("adalora", {"init_ratio": 0.5}, "must be at least 1 (got 0.5)"),
        (
            "adalora",
            {"warmup_share": 0.5, "final_share": 0.5},
            "warmup_share and final_share must leave a part of the steps between",
        ),
        ("packing", {"mode": "on"}, "packing.mode: must be 'auto' or 'off' (got 'on')"),
        ("packing", {"trials": 0}, "packing.trials: must be at least 1 (got 0)"),
        ("packing", {"lookahead": 0}, "packing.lookahead: must be at least 1 (got 0)"),
        ("packing", {"trials": 65}, "packing.trials: must be less than or equal to 64 (got 65)"),
        ("packing", {"admission": "late"}, "must be 'elastic' or 'together' (got 'late')"),
        ("search", {"trials": 0}, "search.trials: must be at least 1 (got 0)"),
        ("search", {"within": 1}, "must be less than 1"),
        ("search", {"objective": ""}, "must not be empty"),
        ("search", {"target_modules": []}, "search.target_modules: must not be empty"),
        (
            "data",
            {"text": "{a}", "prompt": "{b}", "completion": "{c}"},
            "give one of text or prompt and completion",
        ),
        ("data", {"prompt": "{b}"}, "prompt and completion belong together"),
        ("data", {"completion": "{b}"}, "prompt and completion belong together"),
        ("data", {"validation_split": "a", "validation_file": "b"}, "not both"),
        ("data", {"validation_split": "test"}, "validation_split must not be the test split"),
        ("data", {"validation_split": "Test[:10%]"}, "must not be the test split"),
        ("data", {"train_split": "test"}, "train_split must not be the test split"),
        ("data", {"max_length": 1}, "data.max_length: must be at least 2 (got 1)"),
        ("model", {"target_modules": []}, "target_modules must name at least one layer"),
        ("model", {"name": ""}, "model.name: must not be empty"),
    ],
)
def test_every_rule_is_told_in_one_line_with_its_section(
    section: str, settings: dict[str, Any], expected: str
) -> None:
    found = message_of({section: settings})
    assert found.startswith(f"config: {section}")
    assert expected in found


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("48GiB", 48 * 2**30), (24 * 2**30, 24 * 2**30), ("auto", "auto"), (None, None)],
)
def test_packs_may_have_a_budget_of_their_own(text: Any, num_bytes: Any) -> None:
    config = StudyConfig(memory_budget="24GiB", pack_memory_budget=text)
    assert config.pack_memory_budget == num_bytes
    assert StudyConfig(pack_memory_budget="rtx4090") == StudyConfig(pack_memory_budget="RTX 4090")


def test_packs_share_the_memory_budget_unless_told() -> None:
    assert StudyConfig().pack_memory_budget is None
    assert StudyConfig().packing == PackingSettings(mode="auto", trials=8, admission="elastic")


def test_a_pack_budget_below_that_of_one_trial_is_refused_with_both() -> None:
    found = message_of({"memory_budget": "24GiB", "pack_memory_budget": "8GiB"})
    assert "pack_memory_budget must be at least memory_budget, which is 24.0 GiB" in found
    assert "(got 8.00 GiB); null makes it the same" in found
    # What auto comes to is known only where the study runs.
    assert StudyConfig(memory_budget="auto", pack_memory_budget="8GiB")
    assert "give a size such as 24GiB" in message_of({"pack_memory_budget": "lots"})


def test_off_is_a_word_also_where_yaml_reads_false() -> None:
    assert PackingSettings(mode=yaml.safe_load("off")).mode == "off"
    assert PackingSettings(mode="off").mode == "off"
    assert "'auto' or 'off'" in message_of({"packing": {"mode": True}})


def test_a_word_or_number_stands_for_a_list_of_one() -> None:
    search = SearchConfig(method="lora", rank=12, alpha=16, learning_rate=1e-4, lr_ratio=4)
    assert (search.method, search.rank, search.alpha) == (("lora",), (12,), (16,))
    assert (search.learning_rate, search.lr_ratio) == ((1e-4,), (4.0,))


def test_ranges_stand_for_their_powers_of_two_and_lists_for_themselves_sorted() -> None:
    assert SearchConfig(rank={"low": 2, "high": 16}).ranks == (2, 4, 8, 16)
    assert SearchConfig(rank={"low": 8, "high": 8}).ranks == (8,)
    assert SearchConfig(rank=[512, 4, 12]).ranks == (4, 12, 512)


@pytest.mark.parametrize(
    ("objective", "direction", "minimize"),
    [
        ("eval_loss", None, True),
        ("perplexity", None, True),
        ("exact_match", None, False),
        ("exact_match", "minimize", True),
        ("eval_loss", "maximize", False),
    ],
)
def test_losses_are_minimised_and_metrics_maximised_unless_told(
    objective: str, direction: Any, minimize: bool
) -> None:
    assert SearchConfig(objective=objective, direction=direction).minimize is minimize


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        StudyConfig().name = "other"  # type: ignore[misc]


def test_choices_of_layers_come_from_the_search_or_else_from_the_model() -> None:
    model = ModelConfig(target_modules=("q_proj", "v_proj"))
    assert StudyConfig(model=model).target_choices() == (("q_proj", "v_proj"),)
    search = SearchConfig(target_modules=("attention", ("q_proj",)))
    assert StudyConfig(model=model, search=search).target_choices() == ("attention", ("q_proj",))


def study(**search: Any) -> StudyConfig:
    return StudyConfig(search=SearchConfig(**search))


@pytest.mark.parametrize(
    "changed",
    [
        study(trials=99),
        study(seeds=5),
        study(max_seconds=10),
        study(max_failures=9),
        study(rank={"low": 2, "high": 512}),
        study(rank=[4, 12]),
        StudyConfig(packing=PackingSettings(mode="off")),
        StudyConfig(packing=PackingSettings(admission="together")),
        StudyConfig(packing=PackingSettings(trials=1)),
        StudyConfig(pack_memory_budget="auto"),
        StudyConfig(pack_memory_budget="8GiB"),
        StudyConfig(presets={"quick": {"search": {"trials": 2}}}),
    ],
)
def test_a_continued_study_may_change_its_size_ranks_and_limits(changed: StudyConfig) -> None:
    assert differences(StudyConfig(), changed) == []
    assert differences(changed, StudyConfig()) == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (study(alpha=[16]), ["search.alpha: was {'low': 8, 'high': 64}, is [16]"]),
        (study(strategy="random"), ["search.strategy: was 'transfer', is 'random'"]),
        (study(objective="exact_match"), ["search.objective: was 'eval_loss'"]),
        (
            study(learning_rate={"low": 1e-5, "high": 1e-3}),
            ["search.learning_rate: was {'low': 1e-05, 'high': 0.01}, is {'low': 1e-05, "],
        ),
        (
            StudyConfig(training=TrainingConfig(steps=50)),
            ["training.steps: was 100, is 50"],
        ),
        (StudyConfig(data=DataConfig(name="other")), ["data.name: was 'embedded', is 'other'"]),
        (StudyConfig(model=ModelConfig(target_modules=("q",))), ["model.target_modules: was"]),
        (StudyConfig(memory_budget="1GiB"), ["memory_budget: was 'auto', is 1073741824"]),
        (StudyConfig(packing=PackingSettings(lookahead=4)), ["packing.lookahead: was None, is 4"]),
        (study(reference_rank=16), ["search.reference_rank: was 8, is 16"]),
    ],
)
def test_anything_else_that_changed_is_named_with_both_values(
    changed: StudyConfig, expected: list[str]
) -> None:
    found = differences(StudyConfig(), changed)
    for text in expected:
        assert any(line.startswith(text) for line in found), found


def test_several_changes_are_all_named() -> None:
    other = StudyConfig(
        training=TrainingConfig(steps=50), search=SearchConfig(strategy="random", trials=2)
    )
    assert [line.partition(":")[0] for line in differences(StudyConfig(), other)] == [
        "search.strategy",
        "training.steps",
    ]


def test_equal_ranges_compare_equal_however_they_were_written() -> None:
    assert RateRange(low=1e-5, high=1e-2) == RateRange(low="1e-5", high="1e-2")  # type: ignore[arg-type]
    assert PowerRange(low=2, high=8).values() == (2, 4, 8)
