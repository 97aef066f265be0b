"""The events of deep models, from those of shallow ones: the very same sizes in the same order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planning import kind_of
from torch import nn
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from rsauto.memory import trace
from rsauto.memory.allocator import smallest_limit_bytes
from rsauto.memory.depth import NotRepeatedError, deepened, repeated_layers
from rsauto.memory.kinds import StepKind, StepSize
from rsauto.memory.recorder import StorageEvent
from rsauto.memory.trace import build_model, trace_step

SIZE = StepSize(8, 3, 40, 24)
SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LLAMA = LlamaConfig(num_hidden_layers=13, **SMALL)
GPT2 = GPT2Config(n_embd=32, n_layer=12, n_head=2, vocab_size=128, n_positions=64)
GEMMA3 = Gemma3TextConfig(
    num_hidden_layers=24, head_dim=8, sliding_window=16,
    layer_types=["sliding_attention", "full_attention"] * 12, **SMALL,
)  # fmt: skip
MOE = Qwen3MoeConfig(
    num_hidden_layers=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    head_dim=8, **SMALL,
)  # fmt: skip
TWO_KINDS = Qwen2Config(
    num_hidden_layers=14, use_sliding_window=True, sliding_window=16, max_window_layers=12, **SMALL
)


def stack_of(kind: StepKind) -> Any:
    with torch.device("meta"):
        return repeated_layers(build_model(kind, 8))


@pytest.mark.parametrize(
    "config, changes",
    [
        (LLAMA, {}),
        (LLAMA, {"gradient_checkpointing": True, "optimizer": "adafactor"}),
        (LLAMA, {"gradient_checkpointing": True, "use_reentrant": True}),
        (LLAMA, {"device_type": "cuda", "dtype": "bfloat16", "quant_bits": 4, "accumulate": True}),
        (LLAMA, {"method": "peft_adalora", "optimizer": "adamw_loop"}),
        (GPT2, {"target_modules": "attention"}),
        (GPT2, {"task": "SEQ_CLS"}),
        (MOE, {}),
    ],
)
@pytest.mark.sample(2)
def test_a_deep_model_is_traced_by_a_few_of_its_layers(
    config: PretrainedConfig, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config.pad_token_id = 0
    kind = kind_of(config, **changes)
    direct = trace_step(kind, SIZE)
    depths = []
    real = trace.record_step

    def counted(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[StorageEvent, ...]:
        depths.append(max(len(m) for m in model.modules() if isinstance(m, nn.ModuleList)))
        return real(model, *args, **kwargs)

    monkeypatch.setattr(trace, "record_step", counted)
    from_few = trace_step(kind, SIZE, may_cut=True)
    assert depths == [4, 3, 2], "no layer more than needed was traced"
    told = ("nbytes", "phase", "operation", "tag")
    for name in told:
        few = [getattr(event, name) for event in from_few.events]
        assert few == [getattr(event, name) for event in direct.events], name
    assert from_few.num_trainable_params == direct.num_trainable_params
    assert from_few.linear_weights == direct.linear_weights
    # Which of several like storages is freed first is told differently, and hardly matters.
    reserved = [
        smallest_limit_bytes([(e.storage, e.nbytes) for e in one.events], 1)
        for one in (from_few, direct)
    ]
    assert reserved[0] == pytest.approx(reserved[1], rel=0.02)


def test_layers_of_several_kinds_repeat_in_groups() -> None:
    stack = stack_of(kind_of(GEMMA3))
    assert (stack.group, stack.num_groups) == (2, 12)
    events = [trace_step(kind_of(GEMMA3), SIZE, may_cut=c).events for c in (False, True)]
    assert [e.nbytes for e in events[0]] == [e.nbytes for e in events[1]]


@pytest.mark.parametrize("config", [TWO_KINDS, LlamaConfig(num_hidden_layers=6, **SMALL)])
@pytest.mark.sample(1)
def test_models_that_do_not_repeat_or_are_shallow_are_traced_whole(
    config: PretrainedConfig,
) -> None:
    assert stack_of(kind_of(config)) is None
    whole = trace_step(kind_of(config), SIZE)
    assert trace_step(kind_of(config), SIZE, may_cut=True).events == whole.events


def event(nbytes: int, operation: str = "aten.mm", storage: int = 0) -> StorageEvent:
    return StorageEvent(storage, nbytes, "activations", "forward", operation)


def test_sizes_may_grow_with_the_depth_and_must_do_so_evenly() -> None:
    two, three, four = ([event(n, "aten.cat", 0)] for n in (20, 30, 40))
    assert [e.nbytes for e in deepened(two, three, four, 32)] == [320]
    with pytest.raises(NotRepeatedError, match="do not follow"):
        deepened(two, three, [event(41, "aten.cat", 0)], 32)
    with pytest.raises(NotRepeatedError, match="no counterpart"):
        deepened(two, [event(30, "aten.mul", 0)], four, 32)
