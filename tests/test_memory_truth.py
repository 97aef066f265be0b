"""The recorder on fake tensors against the same recorder on real ones: every event is the same.

A model is built twice from one configuration, once without memory and once with weights and a batch
of random tokens. What is allocated and freed must agree in order, bytes, tag, phase and operation.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import BERT, DECODERS, ENCODERS, FALCON, GPT, GQA, SIZES
from planning import kind_of
from torch import Tensor
from transformers import PretrainedConfig

from rsauto.config import TaskType
from rsauto.memory.attention import attention_of_cuda
from rsauto.memory.kinds import StepKind, StepSize
from rsauto.memory.recorder import StorageEvent
from rsauto.memory.trace import build_model, record_step, trace_step

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

LM: TaskType = "CAUSAL_LM"
CLASSES: TaskType = "SEQ_CLS"
EXPERTS: dict[str, Any] = {**GQA, "num_experts_per_tok": 2}
NEO: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "window_size": 8, "attention_types": [[["global", "local"], 1]],
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10,
    "rope_theta": 150000.0,
}  # fmt: skip

OTHERS: dict[str, Callable[[], PretrainedConfig]] = {
    "bloom": lambda: hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "codegen": lambda: hf.CodeGenConfig(**GPT, rotary_dim=4),
    "cohere": lambda: hf.CohereConfig(**GQA),
    "falcon_alibi": lambda: hf.FalconConfig(**FALCON, alibi=True),
    "gemma": lambda: hf.GemmaConfig(**GQA, head_dim=8),
    "glm4": lambda: hf.Glm4Config(**GQA, head_dim=8, pad_token_id=0),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**GPT),
    "gpt_neo": lambda: hf.GPTNeoConfig(**NEO),
    "gpt_oss": lambda: hf.GptOssConfig(
        **EXPERTS, head_dim=8, num_local_experts=4, sliding_window=8, rope_parameters=YARN
    ),
    "granite": lambda: hf.GraniteConfig(**GQA),
    "mixtral": lambda: hf.MixtralConfig(**EXPERTS, num_local_experts=4),
    "olmo2": lambda: hf.Olmo2Config(**GQA),
    "olmoe": lambda: hf.OlmoeConfig(**EXPERTS, num_experts=4),
    "persimmon": lambda: hf.PersimmonConfig(**SIZES),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=16
    ),
    "smollm3": lambda: hf.SmolLM3Config(**GQA, pad_token_id=0),
    "stablelm": lambda: hf.StableLmConfig(**GQA),
    "starcoder2": lambda: hf.Starcoder2Config(**GQA),
    "albert": lambda: hf.AlbertConfig(**BERT, embedding_size=16),
    "mpnet": lambda: hf.MPNetConfig(**BERT),
}
CONFIGS = {
    **{name: known.config for name, known in (DECODERS | ENCODERS).items()},
    **OTHERS,
}
BIDIRECTIONAL = {*ENCODERS, "albert", "mpnet"}
CASES = [
    *((name, LM) for name in CONFIGS if name not in BIDIRECTIONAL),
    *((name, CLASSES) for name in (*ENCODERS, "albert", "mpnet", "gpt2", "llama", "gemma3")),
]

PADDED = StepSize(4, 3, 20, 12)
"""Three sequences, one of them shorter; evaluation is shorter than training."""
ALONE = StepSize(4, 1, 12, 20)


def config_of(name: str, task: TaskType) -> PretrainedConfig:
    config = CONFIGS[name]()
    if task == CLASSES:
        config.num_labels = 3
        config.pad_token_id = config.pad_token_id or 0
    return config


def step_of(name: str, task: TaskType, **changes: Any) -> StepKind:
    return kind_of(config_of(name, task), **{"task": task, "attn_implementation": "auto"} | changes)


def real_batch(kind: StepKind, num_sequences: int, length: int) -> dict[str, Tensor]:
    """Random tokens; where the kind is padded, a third of the last sequence is padding.

    Empty where the length is zero.
    """
    if length == 0:
        return {}
    ids = torch.randint(3, 60, (num_sequences, length))
    mask = torch.ones_like(ids)
    if kind.padded:
        mask[-1, 2 * length // 3 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind.has_token_types:
        batch["token_type_ids"] = torch.zeros_like(ids)
    classes = torch.randint(0, 3, (num_sequences,))
    return {
        **batch,
        "labels": classes if kind.task == CLASSES else ids.masked_fill(mask == 0, -100),
    }


def real_events(kind: StepKind, size: StepSize) -> tuple[StorageEvent, ...]:
    torch.manual_seed(0)
    model = build_model(kind, size.rank)
    train_batch = real_batch(kind, size.micro_batch_size, size.train_length)
    eval_batch = real_batch(kind, size.micro_batch_size, size.eval_length)
    gc.disable()  # cycles would be freed at a random moment
    try:
        return record_step(model, kind, train_batch=train_batch, eval_batch=eval_batch)
    finally:
        gc.enable()


def require_equal(kind: StepKind, size: StepSize) -> tuple[StorageEvent, ...]:
    fake, real = trace_step(kind, size).events, real_events(kind, size)
    for number, (one, other) in enumerate(zip(fake, real, strict=False)):
        assert one == other, f"event {number} of {len(fake)}"
    assert len(fake) == len(real)
    return real


def peak(events: Sequence[StorageEvent]) -> int:
    return max(itertools.accumulate(event.nbytes for event in events))


@pytest.mark.parametrize("name, task", CASES)
@pytest.mark.sample(14)
def test_every_architecture(name: str, task: TaskType) -> None:
    require_equal(step_of(name, task), PADDED)
    require_equal(step_of(name, task, padded=False), ALONE)


OPTIONS: list[dict[str, Any]] = [
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    {"autocast": "bfloat16"},
    {"dtype": "bfloat16", "autocast": "bfloat16"},
    {"dtype": "float16", "autocast": "float16", "clip": False},
    {"gradient_checkpointing": True, "use_reentrant": True},
    {"gradient_checkpointing": True, "use_reentrant": False},
    {"gradient_checkpointing": True, "dtype": "bfloat16", "autocast": "bfloat16"},
    {"attn_implementation": "eager"},
    {"attn_implementation": "eager", "autocast": "bfloat16", "lora_dropout": 0.1},
    {"lora_dropout": 0.1},
    {"lora_dropout": 0.1, "gradient_checkpointing": True, "accumulate": True},
    {"method": "dora"},
    {"method": "dora", "lora_dropout": 0.1, "dtype": "bfloat16"},
    {"method": "dora", "autocast": "bfloat16", "gradient_checkpointing": True},
    {"method": "peft_adalora"},
    {"method": "peft_adalora", "lora_dropout": 0.1, "accumulate": True},
    {"method": "peft_adalora", "dtype": "bfloat16", "autocast": "bfloat16"},
    {"optimizer": "adamw_foreach"},
    {"optimizer": "adamw_loop", "accumulate": True},
    {"optimizer": "adamw_8bit"},
    {"optimizer": "adafactor", "clip": False},
    {"optimizer": "sgd"},
    {"accumulate": True},
    {"clip": False},
    {"adapter_dtype": "bfloat16"},
    {"adapter_dtype": "bfloat16", "dtype": "bfloat16", "optimizer": "adafactor"},
    {"target_modules": "attention"},
    {"padded": False},
    {"quant_bits": 8},
    {"quant_bits": 4},
    {"quant_bits": 8, "dtype": "float16", "lora_dropout": 0.1},
    {"quant_bits": 4, "dtype": "bfloat16", "lora_dropout": 0.1, "gradient_checkpointing": True},
    {"quant_bits": 4, "autocast": "bfloat16"},
    {"quant_bits": 8, "method": "dora"},
    {"quant_bits": 4, "method": "dora", "dtype": "bfloat16", "lora_dropout": 0.1},
    {"quant_bits": 8, "method": "peft_adalora", "lora_dropout": 0.1},
    {"quant_bits": 4, "method": "peft_adalora", "dtype": "bfloat16"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.sample(10)
def test_every_option(options: dict[str, Any]) -> None:
    require_equal(step_of("llama", LM, **options), PADDED)


MODELS = [("gpt2", LM), ("bert", CLASSES), ("qwen2", LM), ("modernbert", CLASSES)]


@pytest.mark.parametrize(
    "name, task, options",
    [(*MODELS[number % 4], options) for number, options in enumerate(OPTIONS)],
    ids=str,
)
@pytest.mark.sample(6)
def test_every_option_on_another_model_and_a_single_sequence(
    name: str, task: TaskType, options: dict[str, Any]
) -> None:
    """Transposed weights, biases, windows and heads that are trained whole."""
    require_equal(step_of(name, task, **{**options, "padded": False}), ALONE)


def test_adalora_adds_in_place_to_a_view() -> None:
    """Of Conv1D's output, or of a linear layer's with a bias; its gradient then takes more."""
    for name, task in (("gpt2", LM), ("bert", CLASSES)):
        events = require_equal(step_of(name, task, method="peft_adalora"), PADDED)
        assert "aten.new_zeros" in {e.operation for e in events if e.phase == "backward"}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.sample(2)
def test_experts_of_half_precision(name: str, dtype: str) -> None:
    require_equal(step_of(name, LM, dtype=dtype), PADDED)


def test_classifiers_take_token_types() -> None:
    require_equal(step_of("bert", CLASSES, has_token_types=True), PADDED)


def test_evaluation_may_be_longer_or_absent() -> None:
    kind = step_of("llama", LM)
    longer = require_equal(kind, PADDED._replace(eval_length=40))
    absent = require_equal(kind, PADDED._replace(eval_length=0))
    assert peak(longer) > peak(absent)
    assert {e.phase for e in longer} - {e.phase for e in absent} == {"evaluation"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_kernels_of_cuda_are_stood_in_for_alike(attention: str) -> None:
    """The same stand-ins on real tensors; statistics of layer norms are those of CUDA."""
    kind = step_of("llama", LM, device_type="cuda", dtype="bfloat16", attn_implementation=attention)
    with attention_of_cuda(flash=False):
        real = real_events(kind, PADDED)
    assert trace_step(kind, PADDED).events == real


def test_layer_norms_keep_float32_on_cuda() -> None:
    """CUDA accumulates in float32 and keeps mean and deviation so, CPUs in the input's dtype."""

    def statistics(device_type: str) -> set[int]:
        kind = step_of("bloom", LM, device_type=device_type, dtype="bfloat16")
        events = trace_step(kind, PADDED._replace(eval_length=0)).events
        norms = [e.nbytes for e in events if e.operation == "aten.native_layer_norm"]
        return {n for n in norms if n < 3 * 20 * 32}

    tokens = 3 * 20
    assert statistics("cpu") == {2 * tokens}
    assert statistics("cuda") == {4 * tokens}
