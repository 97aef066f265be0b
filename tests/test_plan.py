"""`rsauto.plan`: what it answers from Python, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, OpenAIGPTConfig

import rsauto
from rsauto.errors import InputError
from rsauto.memory.changes import _variants
from rsauto.memory.cost import parse_rate, study_cost
from rsauto.memory.plan import Plan
from rsauto.memory.profiles import Profiles

MIB = 2**20
SMALL: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 4096, "dtype": "bfloat16",
}  # fmt: skip
PROFILES = Profiles()


def planned(model: Any = SMALL, **changes: Any) -> Plan:
    settings: dict[str, Any] = {"ranks": [8, 64], "batch_size": 4, "max_length": 64}
    return rsauto.plan(model, profiles=PROFILES, **{**settings, **changes})


def test_feasible_agrees_with_a_plan_of_each_combination() -> None:
    budget = "640MiB"
    frame = planned(memory_budget=budget).feasible(
        max_lengths=[32, 256], micro_batch_sizes=[1, 4], gradient_checkpointing=[False, True]
    )
    assert len(frame) == 2 * 2 * 2 * 2
    for _, row in frame.iterrows():
        single = planned(
            ranks=[int(row["rank"])],
            max_length=int(row["max_length"]),
            micro_batch_size=int(row["micro_batch_size"]),
            gradient_checkpointing=bool(row["gradient_checkpointing"]),
            memory_budget=budget,
        ).ranks[0]
        assert (row["needed_bytes"], row["fits"]) == (single.needed_bytes, single.fits)


def test_feasible_of_an_automatic_plan_chooses_its_micro_batches() -> None:
    settings: dict[str, Any] = {"ranks": [64], "max_length": 256}
    budget = planned(**settings, micro_batch_size=1).ranks[0].needed_bytes
    found = planned(**settings, micro_batch_size="auto", memory_budget=budget)
    assert found.ranks[0].prediction.micro_batch_size == 1 and found.ranks[0].fits
    frame = found.feasible()
    assert frame["fits"].tolist() == [True] and frame["micro_batch_size"].tolist() == [1]
    assert found.feasible(ranks=[8], quant_bits=[8])["quant_bits"].tolist() == [8]


def test_the_largest_rank_fits_and_its_row_says_so() -> None:
    for budget in (590 * MIB, 620 * MIB):
        found = planned(memory_budget=budget)
        assert found.largest_rank
        assert found.at(found.largest_rank).fits
        assert not found.at(found.largest_rank + 1).fits


def test_the_cheapest_change_is_what_a_plan_with_it_says() -> None:
    model = {**SMALL, "vocab_size": 8192}
    settings: dict[str, Any] = {"batch_size": 16, "max_length": 512, "ranks": [64]}
    needed = planned(model, **settings, micro_batch_size=2).ranks[0].needed_bytes
    change = planned(model, **settings, memory_budget=needed).cheapest_change(64)
    assert change is not None and change.settings == {"micro_batch_size": 2}
    assert change.needed_bytes == needed
    assert str(change).startswith("micro-batches of 2 free")
    again = planned(model, **(settings | dict(change.settings)), memory_budget=needed)
    assert again.ranks[0].fits
    with pytest.raises(ValueError, match="fits as it is"):
        again.cheapest_change(64)
    with pytest.raises(ValueError, match="memory_budget"):
        planned().cheapest_change(8)


def test_an_architecture_without_checkpointing_is_changed_in_other_ways() -> None:
    config = OpenAIGPTConfig(vocab_size=512, n_positions=256, n_embd=32, n_layer=2, n_head=2)
    found = planned(config, ranks=[8], max_length=256, batch_size=1, memory_budget="578MiB")
    assert not found.ranks[0].fits
    change = found.cheapest_change(8)
    assert change is None or "gradient_checkpointing" not in change.settings


def test_shorter_sequences_come_last_and_with_every_base() -> None:
    kind = planned().planner.kind
    tried = [(k.quant_bits, k.gradient_checkpointing, n) for k, n in _variants(kind, 256)]
    assert tried[:3] == [(None, False, 256), (None, True, 256), (8, False, 256)]
    assert tried[6:] == [(bits, True, n) for n in (128, 64) for bits in (None, 8, 4)]
    quantised = [k.quant_bits for k, _ in _variants(replace(kind, quant_bits=4), 64)]
    assert set(quantised) == {4}


def test_classes_are_those_asked_for() -> None:
    def head(model: Any, **changes: Any) -> int:
        row = planned(model, ranks=[8], task="SEQ_CLS", **changes).ranks[0]
        return row.prediction.num_trainable_params

    two = head(SMALL)
    config = LlamaConfig(**{k: v for k, v in SMALL.items() if k != "model_type"})
    assert head(SMALL, num_labels=10) == two + 8 * 64 == head(config, num_labels=10)
    assert head(config) == two
    named = {**SMALL, "id2label": {str(n): f"class {n}" for n in range(5)}}
    assert head(named) == two + 3 * 64


def test_a_failed_size_leaves_the_others_alone(tmp_path: Path) -> None:
    profiles = Profiles(tmp_path)
    settings: dict[str, Any] = {"ranks": [8], "attn_implementation": "eager", "profiles": profiles}
    huge = {**SMALL, "num_attention_heads": 2**15, "hidden_size": 2**15, "num_key_value_heads": 1,
            "max_position_embeddings": 2**21}  # fmt: skip
    found = rsauto.plan(huge, batch_size=128, max_length=2**20, **settings)
    assert "overflow" in found.ranks[0].prediction.estimate_reason
    for kept in (profiles, Profiles(tmp_path)):
        settings["profiles"] = kept
        assert (
            not rsauto.plan(huge, batch_size=2, max_length=64, **settings)
            .ranks[0]
            .prediction.estimated
        )


def test_cost_by_hand() -> None:
    for checkpointing, frozen, trained in ((False, 4, 6), (True, 6, 8)):
        found = planned(ranks=[8], gradient_checkpointing=checkpointing)
        cost = study_cost(found, trials=3, steps=5, flops_per_second=1e9, price_per_hour=36)
        num_trained = found.ranks[0].prediction.num_trainable_params
        layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
        per_token = frozen * (2 * layer + 64 * 256) + trained * num_trained
        assert cost.tokens == 3 * 5 * 4 * 64
        assert cost.flops == pytest.approx(cost.tokens * per_token)
        assert cost.seconds == pytest.approx(cost.flops / 1e9)
        assert cost.price == pytest.approx(cost.flops / 1e9 / 100)
    assert parse_rate("150 TFLOPS") == 150e12 and parse_rate("2.5e13") == 2.5e13
    for text in ("fast", "0", "1e999", "-3T", "1.2.3"):
        with pytest.raises(InputError, match="flops_per_second"):
            parse_rate(text)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eval_length": -5}, "eval_length: -5 is not a whole number of tokens"),
        ({"eval_length": 1.5}, "eval_length: 1.5"),
        ({"eval_length": 8192}, "eval_length: 8192, but the model has positions for 4096"),
        ({"max_length": 8192}, "max_length: 8192, but the model has positions for 4096"),
        ({"batch_size": 2**20, "max_length": 4096}, "than any device holds"),
        ({"ranks": [True]}, "ranks"),
        ({"ranks": 5}, "ranks"),
        ({"ranks": []}, "ranks"),
        ({"micro_batch_size": "4"}, "micro_batch_size: '4' does not divide"),
        ({"gradient_checkpointing": "no"}, "gradient_checkpointing: 'no' is neither"),
        ({"quant_bits": 4.0}, "quant_bits: 4.0 is not known"),
        ({"lora_dropout": "a"}, "lora_dropout: 'a'"),
        ({"target_modules": ()}, r"target_modules: \(\). Give"),
        ({"target_modules": ["q_porj"]}, "Did you mean 'q_proj'"),
        ({"optimizer": "adam"}, "optimizer: 'adam' is not known. Did you mean 'adamw'"),
        ({"memory_budget": "auto"}, "auto asks the GPU of this machine"),
        ({"model": {**SMALL, "hidden_act": "nope"}}, "cannot build a LlamaForCausalLM"),
        ({"model": {**SMALL, "pad_token_id": 999}}, "cannot build a LlamaForCausalLM"),
        ({"model": {**SMALL, "quantization_config": "x"}}, "quantization_config is 'x'"),
        ({"model": {**SMALL, "tags": {1, 2}}}, "not plain JSON"),
        ({"model": {**SMALL, "model_type": "nonsense"}}, "cannot read this 'nonsense'"),
        ({"model": "n" * 5000}, "is no path and no hub id|is no file, no folder"),
        ({"model": "~nosuchuser/x"}, "model"),
        ({"model": "llama-2-8b"}, "Did you mean 'llama-2-7b'"),
        ({"model": 7}, "model: int is neither a name nor a configuration"),
    ],
)
def test_what_is_wrong_is_told(changes: dict[str, Any], message: str) -> None:
    changes = {"model": SMALL, **changes}
    with pytest.raises(InputError, match=message):
        planned(changes.pop("model"), **changes)


def test_feasible_refuses_what_plan_refuses() -> None:
    found = planned()
    for wrong in (
        {"quant_bits": [3]},
        {"gradient_checkpointing": ["no"]},
        {"max_lengths": [0]},
        {"ranks": []},
        {"micro_batch_sizes": [3]},
    ):
        with pytest.raises(InputError):
            found.feasible(**wrong)  # type: ignore[arg-type]


def test_settings_of_the_kind_hold_where_a_trial_has_none_of_its_own() -> None:
    """Clipping and the optimizer change what a step runs."""
    for changes in ({"clip": False}, {"optimizer": "sgd"}, {"target_modules": ("q_proj",)}):
        planner = planned(**changes).planner
        kinds = [kind for kind, _ in planner._steps(8, batch_size=4, micro_batch_size=2)]
        assert all(
            getattr(kind, name) == value for kind in kinds for name, value in changes.items()
        )
    (kind, _), *_ = planned().planner._steps(8, batch_size=4, micro_batch_size=4, optimizer="sgd")
    assert kind.optimizer == "sgd" and kind.clip
