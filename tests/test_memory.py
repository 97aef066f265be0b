"""Predicted memory against three independent truths: the same step on real tensors, a trace at the
rank itself, and the allocations that the profiler reports for a plain training loop."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from rsauto.adapters.lora import trainable_parameters
from rsauto.adapters.optimizers import build_optimizer
from rsauto.memory.measure import PeakMeter
from rsauto.memory.plan import ALLOWANCE, MemoryPlanner, Prediction, RankProfile
from rsauto.memory.recorder import StorageEvent
from rsauto.memory.trace import StepShape, build_model, record_step, trace_step
from rsauto.training.loss import hits_of, summed_cross_entropy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

LENGTH = 40
CPU = torch.device("cpu")
LLAMA = LlamaConfig(
    hidden_size=128,
    num_hidden_layers=4,
    intermediate_size=512,
    vocab_size=1024,
    num_attention_heads=4,
    num_key_value_heads=4,
    tie_word_embeddings=True,
)
SMALL_LLAMA = LlamaConfig(
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=192,
    vocab_size=512,
    num_attention_heads=2,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
QWEN2 = Qwen2Config(
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=160,
    vocab_size=512,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
GPT2 = GPT2Config(
    n_embd=64,
    n_layer=2,
    n_head=2,
    vocab_size=512,
    n_positions=64,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=0,
    eos_token_id=0,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def step_shape(config: PretrainedConfig = SMALL_LLAMA, **changes: Any) -> StepShape:
    shape = StepShape(
        model_config=config.to_json_string(use_diff=False),
        dtype=torch.float32,
        attn_implementation="sdpa",
        gradient_checkpointing=False,
        target_modules="all-linear",
        optimizer="adamw",
        clip=True,
        micro_batch_size=4,
        accumulate=False,
        train_length=LENGTH,
        eval_length=LENGTH,
        device_type="cpu",
    )
    return dataclasses.replace(shape, **changes)


def planner_for(shape: StepShape, config: PretrainedConfig) -> MemoryPlanner:
    return MemoryPlanner(
        model_config=config,
        dtype=shape.dtype,
        attn_implementation=shape.attn_implementation,
        gradient_checkpointing=shape.gradient_checkpointing,
        train_length=shape.train_length,
        eval_length=shape.eval_length,
        device_type=shape.device_type,
    )


def predict(planner: MemoryPlanner, rank: int, shape: StepShape) -> Prediction:
    return planner.predict(
        rank,
        target_modules=shape.target_modules,
        optimizer=shape.optimizer,
        batch_size=shape.micro_batch_size * (2 if shape.accumulate else 1),
        micro_batch_size=shape.micro_batch_size,
        clip=shape.clip,
    )


def random_batch(num_sequences: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """The first sequence has the full length, the others a third of padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 512, (num_sequences, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, 2 * length // 3 :] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


# The loop of the oracle: what a person would write, with nothing of rsauto's tracing.


def plain_step(
    model: nn.Module, optimizer: Optimizer, batches: Sequence[dict[str, Tensor]]
) -> None:
    for batch in batches:
        loss = summed_cross_entropy(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
            batch["labels"],
        )
        (loss / 100).backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def plain_evaluation(model: nn.Module, batch: dict[str, Tensor]) -> None:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    summed_cross_entropy(logits, batch["labels"])
    hits_of(logits, batch["labels"])


def trained(shape: StepShape, rank: int) -> tuple[PeftModel, Optimizer]:
    model = build_model(shape, rank)
    return model, build_optimizer(model, name=shape.optimizer, learning_rate=1e-4)


def measured_peak(shape: StepShape, rank: int) -> int:
    model, optimizer = trained(shape, rank)
    meter = PeakMeter(CPU, model, optimizer)
    model.train()
    num_micro_batches = 2 if shape.accumulate else 1
    for step in range(2):
        batches = [
            random_batch(shape.micro_batch_size, shape.train_length, seed)
            for seed in range(num_micro_batches)
        ]
        with meter.watch(heavy=step > 0):
            plain_step(model, optimizer, batches)
    model.eval()
    with meter.watch():
        plain_evaluation(model, random_batch(shape.micro_batch_size, shape.eval_length))
    assert meter.peak_bytes is not None
    return meter.peak_bytes


def error(predicted: int, measured: int) -> float:
    return predicted / measured - 1


def phase_peaks(events: Sequence[StorageEvent]) -> dict[str, int]:
    in_use, peaks = 0, dict.fromkeys(("forward", "backward", "optimizer", "evaluation"), 0)
    for event in events:
        in_use += event.nbytes
        peaks[event.phase] = max(peaks[event.phase], in_use)
    return peaks


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate": True, "optimizer": "adafactor"},
        {"micro_batch_size": 1, "optimizer": "sgd"},
        {"gradient_checkpointing": True, "dtype": torch.bfloat16},
        {"attn_implementation": "eager", "eval_length": 64},
    ],
)
def test_fake_step_equals_the_same_step_on_real_tensors(changes: dict[str, Any]) -> None:
    shape = step_shape(**changes)
    fake = trace_step(shape, 6)
    real = record_step(
        build_model(shape, 6),
        shape,
        train_batch=random_batch(shape.micro_batch_size, shape.train_length),
        eval_batch=random_batch(shape.micro_batch_size, shape.eval_length),
    )
    assert phase_peaks(fake.events) == phase_peaks(real)


@pytest.mark.parametrize(
    "config, changes, ranks",
    [
        (SMALL_LLAMA, {}, (64, 128)),
        (SMALL_LLAMA, {"optimizer": "adafactor", "gradient_checkpointing": True}, (128,)),
        (GPT2, {"accumulate": True}, (1, 128)),
        (QWEN2, {"micro_batch_size": 1, "device_type": "cuda", "optimizer": "sgd"}, (1, 128)),
    ],
)
def test_two_ranks_give_every_rank(
    config: PretrainedConfig, changes: dict[str, Any], ranks: tuple[int, ...]
) -> None:
    shape = step_shape(config, **changes)
    granule = 512
    profile = RankProfile(trace_step(shape, 4), trace_step(shape, 8), granule)
    for rank in ranks:
        direct = trace_step(shape, rank)
        rounded = [-(-abs(e.nbytes) // granule) * granule for e in direct.events]
        signed = [n if e.nbytes > 0 else -n for n, e in zip(rounded, direct.events, strict=True)]
        assert profile.sizes(rank).tolist() == signed
        assert profile.num_trainable_params(rank) == direct.num_trainable_params
        prediction = profile.predict(rank, shape)
        assert prediction.peak_bytes == max(itertools.accumulate(signed))
        assert sum(prediction.breakdown.values()) == prediction.peak_bytes
        assert prediction.reserved_bytes >= prediction.peak_bytes


def test_a_straight_line_through_two_peaks_would_predict_too_little() -> None:
    shape = step_shape(gradient_checkpointing=True)
    planner = planner_for(shape, SMALL_LLAMA)
    at_4, at_8 = (predict(planner, rank, shape).peak_bytes for rank in (4, 8))
    line = at_4 + (at_8 - at_4) // 4 * (512 - 4)
    assert line < 0.97 * predict(planner, 512, shape).peak_bytes


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("micro_batch_size", [16, 4, 1])
def test_prediction_is_close_to_the_measured_peak(micro_batch_size: int, accumulate: bool) -> None:
    shape = step_shape(LLAMA, micro_batch_size=micro_batch_size, accumulate=accumulate)
    planner = planner_for(shape, LLAMA)
    for rank in (2, 128) if accumulate else (8, 32):
        predicted = predict(planner, rank, shape).peak_bytes
        assert abs(error(predicted, measured_peak(shape, rank))) < 0.005


@pytest.mark.parametrize(
    "config, changes, rank",
    [
        (SMALL_LLAMA, {"optimizer": "sgd"}, 8),
        (SMALL_LLAMA, {"optimizer": "adafactor", "accumulate": True}, 8),
        (SMALL_LLAMA, {"gradient_checkpointing": True}, 4),
        (SMALL_LLAMA, {"dtype": torch.bfloat16}, 4),
        (SMALL_LLAMA, {"dtype": torch.bfloat16, "gradient_checkpointing": True}, 4),
        (SMALL_LLAMA, {"attn_implementation": "eager"}, 4),
        (SMALL_LLAMA, {"train_length": 16, "eval_length": 64, "target_modules": "attention"}, 4),
        (GPT2, {}, 16),
        (QWEN2, {}, 16),
    ],
)
def test_prediction_holds_for_every_setting(
    config: PretrainedConfig, changes: dict[str, Any], rank: int
) -> None:
    shape = step_shape(config, **changes)
    predicted = predict(planner_for(shape, config), rank, shape).peak_bytes
    measured = measured_peak(shape, rank)
    assert -ALLOWANCE < error(predicted, measured) < 0.03


@pytest.fixture(scope="module")
def planner() -> MemoryPlanner:
    return planner_for(step_shape(), SMALL_LLAMA)


SEARCH: dict[str, Any] = {"target_modules": "all-linear", "optimizer": "adamw", "batch_size": 4}


def test_memory_grows_with_rank_and_micro_batch(planner: MemoryPlanner) -> None:
    def peak(rank: int, micro_batch_size: int) -> int:
        return planner.predict(rank, micro_batch_size=micro_batch_size, **SEARCH).peak_bytes

    assert all(peak(low, 4) < peak(high, 4) for low, high in itertools.pairwise((1, 2, 8, 64, 999)))
    assert peak(8, 1) < peak(8, 2) < peak(8, 4)


def test_largest_micro_batch_is_the_largest_that_fits(planner: MemoryPlanner) -> None:
    sizes = {n: planner.predict(8, micro_batch_size=n, **SEARCH) for n in (1, 2, 4)}
    for size, prediction in sizes.items():
        needed = planner.needed_bytes(prediction)
        assert needed == int(prediction.peak_bytes * (1 + ALLOWANCE))
        assert planner.largest_micro_batch(8, memory_budget_bytes=needed, **SEARCH) == prediction
        below = planner.largest_micro_batch(8, memory_budget_bytes=needed - 1, **SEARCH)
        assert below == sizes.get(size // 2)
    fixed = planner.largest_micro_batch(8, memory_budget_bytes=2**40, micro_batch_size=2, **SEARCH)
    assert fixed == sizes[2]


def test_largest_rank_fits_and_the_next_does_not(planner: MemoryPlanner) -> None:
    budget = planner.needed_bytes(planner.predict(37, micro_batch_size=1, **SEARCH))
    assert planner.largest_rank(memory_budget_bytes=budget, **SEARCH) == 37
    assert planner.largest_rank(memory_budget_bytes=budget, micro_batch_size=4, **SEARCH) < 37
    assert planner.largest_rank(memory_budget_bytes=1000, **SEARCH) == 0


def test_what_cannot_be_planned_is_refused(planner: MemoryPlanner) -> None:
    with pytest.raises(ValueError, match=r"must divide batch_size.*\[1, 2, 4\]"):
        planner.predict(8, micro_batch_size=3, **SEARCH)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        planner.predict(0, micro_batch_size=1, **SEARCH)
    with pytest.raises(ValueError, match="device_type"):
        planner_for(step_shape(device_type="mps"), SMALL_LLAMA)


def test_traces_that_differ_in_more_than_sizes_are_refused() -> None:
    shape = step_shape()
    with pytest.raises(RuntimeError, match="other operations"):
        RankProfile(
            trace_step(shape, 4), trace_step(dataclasses.replace(shape, optimizer="sgd"), 8), 64
        )


def test_breakdown_counts_weights_and_adapter_exactly() -> None:
    shape = step_shape(accumulate=True)
    prediction = predict(planner_for(shape, SMALL_LLAMA), 16, shape)
    model = build_model(shape, 16)
    adapter = sum(p.numel() for p in trainable_parameters(model).values())
    base = {p.data_ptr(): p.numel() for p in model.parameters() if not p.requires_grad}
    assert prediction.num_trainable_params == adapter
    assert prediction.breakdown["adapters"] == 4 * adapter
    assert prediction.breakdown["weights"] == pytest.approx(4 * sum(base.values()), abs=2048)
    # AdamW keeps two moments and a counter of one granule for each tensor.
    counters = 64 * len(trainable_parameters(model))
    assert prediction.breakdown["optimizer"] == 8 * adapter + counters
