"""The closed form against traced steps: never too little with its allowance, and not far off."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, get_args

import pytest

from rsauto.memory.estimate import (
    DROPOUT_ALLOWANCE,
    ESTIMATE_ALLOWANCE,
    Component,
    Estimate,
    estimated_peak,
)
from rsauto.memory.kinds import StepKind, StepSize
from rsauto.memory.presets import model_preset
from rsauto.memory.recorder import Tag
from rsauto.memory.trace import trace_step

RANK, LENGTH = 32, 512
ITEMSIZE = {"float32": 4, "bfloat16": 2}


class Traced(NamedTuple):
    peak_bytes: int
    weight_bytes: int
    num_adapter_params: int


def traced(config: dict[str, Any], sequences: int, **settings: Any) -> Traced:
    """The highest running sum of the events of a step, and what it is made of."""
    kind = StepKind(model_config=json.dumps(config), **settings)
    trace = trace_step(kind, StepSize(RANK, sequences, LENGTH, LENGTH))
    in_use = peak = 0
    for event in trace.events:
        in_use += event.nbytes
        peak = max(peak, in_use)
    weights = sum(e.nbytes for e in trace.events if e.tag == "weights" and e.nbytes > 0)
    return Traced(peak, weights, trace.num_trainable_params)


def estimated(
    config: dict[str, Any],
    truth: Traced,
    sequences: int,
    *,
    dtype: str,
    gradient_checkpointing: bool,
    task: str = "CAUSAL_LM",
    attn_implementation: str = "sdpa",
    lora_dropout: float = 0.0,
) -> Estimate:
    return estimated_peak(
        weight_bytes=truth.weight_bytes,
        num_adapter_params=truth.num_adapter_params,
        micro_batch_size=sequences,
        length=LENGTH,
        hidden_size=config.get("hidden_size") or config["n_embd"],
        num_layers=config.get("num_hidden_layers") or config["n_layer"],
        num_heads=config.get("num_attention_heads") or config["n_head"],
        num_classes=config["vocab_size"] if task == "CAUSAL_LM" else 2,
        per_token=task == "CAUSAL_LM",
        activation_itemsize=ITEMSIZE[dtype],
        gradient_checkpointing=gradient_checkpointing,
        keeps_attention=attn_implementation == "eager",
        lora_dropout=lora_dropout > 0,
    )


def shortened(name: str, num_layers: int, **changes: Any) -> dict[str, Any]:
    config = {**model_preset(name), **changes}
    config["n_layer" if "n_layer" in config else "num_hidden_layers"] = num_layers
    return config


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama-2-7b", {}),
    ("qwen2.5-7b", {}),
    ("qwen2.5-7b", {"lora_dropout": 0.05}),
    ("qwen3-0.6b", {"attn_implementation": "eager"}),
    ("gemma-2-2b", {"attn_implementation": "eager"}),
    ("gpt-2", {}),
    ("gpt-2", {"dtype": "float32"}),
    ("pythia-1.4b", {}),
    ("llama-3.2-1b", {"task": "SEQ_CLS"}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.sample(6)
def test_with_its_allowance_the_estimate_is_not_below_the_traced_step(
    name: str, settings: dict[str, Any], checkpointed: bool
) -> None:
    config = shortened(name, 4, vocab_size=4096, pad_token_id=0)
    settings = {"dtype": "bfloat16", **settings, "gradient_checkpointing": checkpointed}
    truth = traced(config, 4, **settings)
    estimate = estimated(config, truth, 4, **settings)
    assert estimate.peak_bytes > 0.5 * truth.peak_bytes
    assert truth.peak_bytes <= estimate.needed_bytes < 2.2 * truth.peak_bytes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("sequences", "checkpointed", "low", "high"),
    [(1, False, -0.16, 0.0), (4, False, -0.16, -0.08), (1, True, 0.0, 0.08), (4, True, 0.0, 0.08)],
)
@pytest.mark.sample(1)
def test_of_a_whole_model_the_estimate_is_off_by_this_much(
    sequences: int, checkpointed: bool, low: float, high: float
) -> None:
    config = model_preset("llama-3.2-1b")
    settings: dict[str, Any] = {"dtype": "bfloat16", "gradient_checkpointing": checkpointed}
    truth = traced(config, sequences, **settings)
    estimate = estimated(config, truth, sequences, **settings)
    assert low <= estimate.peak_bytes / truth.peak_bytes - 1 <= high
    assert truth.peak_bytes <= estimate.needed_bytes


SIZE: dict[str, Any] = {
    "weight_bytes": 1000,
    "num_adapter_params": 10,
    "micro_batch_size": 2,
    "length": 8,
    "hidden_size": 4,
    "num_layers": 3,
    "num_heads": 2,
    "num_classes": 5,
}


def test_the_formula_by_hand() -> None:
    estimate = estimated_peak(**SIZE)
    tokens = 2 * 8
    assert estimate.breakdown == {
        "weights": 1000,
        "adapters": 40,
        "gradients": 40,
        "optimizer": 80,
        "activations": 34 * tokens * 4 * 3,
        "logits_and_loss": 12 * tokens * 5,
    }
    assert estimate.peak_bytes == 1160 + 34 * tokens * 12 + 60 * tokens
    assert estimate.allowance_bytes == round(ESTIMATE_ALLOWANCE[False] * 34 * tokens * 12)
    assert estimate.needed_bytes == estimate.peak_bytes + estimate.allowance_bytes


def test_components_have_the_recorders_names() -> None:
    assert get_args(Component) == get_args(Tag)


def test_dropout_is_allowed_for() -> None:
    plain, dropped = (estimated_peak(**SIZE, lora_dropout=dropout) for dropout in (False, True))
    share = DROPOUT_ALLOWANCE * plain.breakdown["activations"]
    assert dropped.allowance_bytes - plain.allowance_bytes == pytest.approx(share, abs=1)
    assert dropped.peak_bytes == plain.peak_bytes


def activations(**changes: Any) -> int:
    return estimated_peak(**{**SIZE, **changes}).breakdown["activations"]


def test_activations_kept_recomputed_and_of_eager_attention() -> None:
    plane = 2 * 8 * 4  # sequences x length x hidden size
    scores = 2 * 2 * 8 * 8  # sequences x heads x length x length
    assert activations(gradient_checkpointing=True) == 2 * plane * 3 + 34 * plane
    assert activations(keeps_attention=True) == (34 * plane + 5 * scores) * 3
    assert activations(keeps_attention=True, gradient_checkpointing=True) == (
        2 * plane * 3 + 34 * plane + 5 * scores
    )
    assert activations(activation_itemsize=4) == 2 * activations()


def test_a_classifier_has_logits_for_sequences_and_sgd_no_states() -> None:
    estimate = estimated_peak(**SIZE, per_token=False, state_bytes_per_param=0, adapter_itemsize=2)
    assert estimate.breakdown["logits_and_loss"] == 12 * 2 * 5
    assert estimate.breakdown["optimizer"] == 0
    assert estimate.breakdown["gradients"] == 20
