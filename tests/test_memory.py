"""Predicted memory against two independent truths: a trace at the very size, and the allocations
that the profiler reports for a plain training loop."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from planning import kind_of, planner_of
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from rsauto.adapters.lora import trainable_parameters
from rsauto.memory.kinds import Prediction, StepKind, StepSize
from rsauto.memory.measure import PeakMeter
from rsauto.memory.methods import METHODS
from rsauto.memory.planner import ALLOWANCE, MemoryPlanner
from rsauto.memory.profile import (
    GRANULE_BYTES,
    OtherOperationsError,
    StepProfile,
    profile_from,
    second_sizes,
)
from rsauto.memory.trace import StepTrace, build_model, trace_step
from rsauto.memory.traced_optimizers import planned_optimizer
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


def predict(planner: MemoryPlanner, rank: int, size: int, accumulate: bool = False) -> Prediction:
    batch_size = 2 * size if accumulate else size
    return planner.predict(rank, batch_size=batch_size, micro_batch_size=size)


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


def measured_peak(
    kind: StepKind, rank: int, micro_batch_size: int = 4, eval_length: int = LENGTH
) -> int:
    model = build_model(kind, rank)
    optimizer = planned_optimizer(model, kind.optimizer, "cpu")
    meter = PeakMeter(CPU, model, optimizer)
    model.train()
    num_micro_batches = 2 if kind.accumulate else 1
    for step in range(2):
        batches = [random_batch(micro_batch_size, LENGTH, n) for n in range(num_micro_batches)]
        with meter.watch(heavy=step > 0):
            plain_step(model, optimizer, batches)
    model.eval()
    with meter.watch():
        plain_evaluation(model, random_batch(micro_batch_size, eval_length))
    assert meter.peak_bytes is not None
    return meter.peak_bytes


def error(predicted: int, measured: int) -> float:
    return predicted / measured - 1


def rounded(trace: StepTrace, granule: int) -> list[int]:
    """Of every event, as an allocator rounds it."""
    sizes = [-(-abs(event.nbytes) // granule) * granule for event in trace.events]
    return [n if e.nbytes >= 0 else -n for n, e in zip(sizes, trace.events, strict=True)]


SIZE = StepSize(8, 4, LENGTH, LENGTH)


def profile_at(kind: StepKind, first: StepSize = SIZE) -> StepProfile:
    """From two traces, whatever the second is."""
    second = next(second_sizes(first, kind.device_type))
    return profile_from(trace_step(kind, first), trace_step(kind, second), kind.device_type)


@pytest.mark.parametrize(
    "config, changes, sizes",
    [
        (SMALL_LLAMA, {}, [(64, 4, 40, 40), (1, 3, 17, 33), (128, 2, 10, 15)]),
        (
            SMALL_LLAMA,
            {"optimizer": "adafactor", "gradient_checkpointing": True},
            [(128, 9, 33, 18)],
        ),
        (SMALL_LLAMA, {"attn_implementation": "eager"}, [(3, 7, 21, 35)]),
        (GPT2, {"accumulate": True}, [(1, 4, 40, 40), (128, 2, 12, 39)]),
        (QWEN2, {"device_type": "cuda", "optimizer": "sgd"}, [(128, 5, 40, 40)]),
    ],
)
@pytest.mark.sample(2)
def test_two_traces_give_every_rank_batch_and_length(
    config: PretrainedConfig, changes: dict[str, Any], sizes: list[tuple[int, int, int, int]]
) -> None:
    kind = kind_of(config, **changes)
    profile = profile_at(kind)
    granule = GRANULE_BYTES[kind.device_type]
    for size in (StepSize(*numbers) for numbers in sizes):
        direct = trace_step(kind, size)
        signed = rounded(direct, granule)
        assert profile.covers(size)
        assert profile.sizes(size, granule).tolist() == signed
        assert profile.num_trainable_params(size.rank) == direct.num_trainable_params
        frozen, trained = direct.linear_weights
        assert profile.flops_per_token(size.rank) == 4.0 * frozen + 6.0 * trained
        prediction = profile.predict(size, kind.device_type)
        assert prediction.peak_bytes == max(itertools.accumulate(signed))
        assert sum(prediction.breakdown.values()) == prediction.peak_bytes
        assert prediction.reserved_bytes >= prediction.peak_bytes
        top = list(itertools.accumulate(signed)).index(prediction.peak_bytes)
        assert prediction.operation == direct.events[top].operation


def test_one_sequence_is_traced_apart() -> None:
    alone = kind_of(SMALL_LLAMA, padded=False)
    profile = profile_at(alone, StepSize(8, 1, LENGTH, LENGTH))
    assert not profile.covers(SIZE) and not profile_at(kind_of(SMALL_LLAMA)).covers(profile.low)
    size = StepSize(48, 1, 24, 20)
    assert profile.sizes(size, 64).tolist() == rounded(trace_step(alone, size), 64)


def test_a_storage_that_follows_no_term_is_told() -> None:
    kind = kind_of(SMALL_LLAMA)
    low, high = trace_step(kind, SIZE), trace_step(kind, next(second_sizes(SIZE, "cpu")))
    first, *others = high.events
    changed = dataclasses.replace(high, events=(first._replace(nbytes=8191), *others))
    with pytest.raises(OtherOperationsError, match="follows no term"):
        profile_from(low, changed, "cpu")


def test_traces_that_differ_in_more_than_sizes_are_refused() -> None:
    low = trace_step(kind_of(SMALL_LLAMA), SIZE)
    high = trace_step(kind_of(SMALL_LLAMA, optimizer="sgd"), SIZE._replace(rank=24))
    with pytest.raises(OtherOperationsError, match="other operations"):
        profile_from(low, high, "cpu")


def test_on_cuda_lengths_that_kernels_pad_are_traced_themselves() -> None:
    kind = kind_of(SMALL_LLAMA, device_type="cuda")
    profile = profile_at(kind, StepSize(8, 4, 640, 128))
    for lengths in ((384, 256), (256, 128)):
        size = StepSize(40, 3, *lengths)
        assert profile.sizes(size, 512).tolist() == rounded(trace_step(kind, size), 512)
    assert not profile.covers(StepSize(8, 4, 200, 128))
    odd = profile_at(kind, StepSize(8, 4, 200, 150))
    assert odd.covers(StepSize(9, 2, 200, 150)) and not odd.covers(StepSize(8, 4, 256, 150))


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("first", [(8, 4, 40, 40), (8, 1, 512, 512), (8, 2, 3, 7), (8, 8, 8192, 0)])
def test_second_sizes_tell_every_term_from_every_other(
    first: tuple[int, int, int, int], device_type: str
) -> None:
    low = StepSize(*first)
    candidates = list(second_sizes(low, device_type))
    assert candidates[-1] == low._replace(rank=24)
    high = candidates[0]
    changed = [i for i in range(4) if low[i] != high[i]]
    assert 0 in changed and (low.micro_batch_size == 1 or 1 in changed)
    grown = [
        Fraction(math.prod(high[i] ** e for i, e in zip(changed, exponents, strict=True)),
                 math.prod(low[i] ** e for i, e in zip(changed, exponents, strict=True)))
        for exponents in itertools.product(range(3), repeat=len(changed))
    ]  # fmt: skip
    assert len(set(grown)) >= len(grown) - 3 ** (len(changed) - 1)  # b squared is no term


def test_a_straight_line_through_two_peaks_would_predict_too_little() -> None:
    planner = planner_of(SMALL_LLAMA, LENGTH, gradient_checkpointing=True)
    at_4, at_8 = (predict(planner, rank, 4).peak_bytes for rank in (4, 8))
    line = at_4 + (at_8 - at_4) // 4 * (512 - 4)
    assert line < 0.97 * predict(planner, 512, 4).peak_bytes


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("micro_batch_size", [16, 4, 1])
@pytest.mark.sample(2)
def test_prediction_is_close_to_the_measured_peak(micro_batch_size: int, accumulate: bool) -> None:
    planner = planner_of(LLAMA, LENGTH)
    kind = kind_of(LLAMA, accumulate=accumulate)
    for rank in (2, 128) if accumulate else (8, 32):
        predicted = predict(planner, rank, micro_batch_size, accumulate).peak_bytes
        assert abs(error(predicted, measured_peak(kind, rank, micro_batch_size))) < 0.005


@pytest.mark.parametrize(
    "config, changes, rank",
    [
        (SMALL_LLAMA, {"optimizer": "sgd"}, 8),
        (SMALL_LLAMA, {"optimizer": "adafactor", "accumulate": True}, 8),
        (SMALL_LLAMA, {"gradient_checkpointing": True}, 4),
        (SMALL_LLAMA, {"dtype": "bfloat16"}, 4),
        (SMALL_LLAMA, {"dtype": "bfloat16", "gradient_checkpointing": True}, 4),
        (SMALL_LLAMA, {"attn_implementation": "eager"}, 4),
        (SMALL_LLAMA, {"target_modules": "attention"}, 4),
        (GPT2, {}, 16),
        (QWEN2, {}, 16),
    ],
)
@pytest.mark.sample(4)
def test_prediction_holds_for_every_setting(
    config: PretrainedConfig, changes: dict[str, Any], rank: int
) -> None:
    kind = kind_of(config, **changes)
    eval_length = 64 if kind.target_modules == "attention" else LENGTH
    planner = planner_of(config, LENGTH, eval_length, **changes)
    predicted = predict(planner, rank, 4, kind.accumulate).peak_bytes
    measured = measured_peak(kind, rank, eval_length=eval_length)
    assert -ALLOWANCE < error(predicted, measured) < 0.03


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_casts_inside_of_kernels_are_counted(
    gradient_checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a bfloat16 layer is much wider than all else, its peak is at the sum with the float32
    adapter: without the copy that the kernel makes, a fifth would be missing. That is so of PEFT's
    layers; fused ones cast before they add."""
    stock = replace(METHODS["lora"], adapt=partial(METHODS["lora"].adapt, fused=False))
    monkeypatch.setitem(METHODS, "lora", stock)
    wide = LlamaConfig(
        **{**SMALL_LLAMA.to_dict(), "num_hidden_layers": 1, "intermediate_size": 4096}
    )
    settings = {"dtype": "bfloat16", "gradient_checkpointing": gradient_checkpointing}
    prediction = predict(planner_of(wide, LENGTH, **settings), 4, 16)
    assert prediction.operation == "aten.add"
    assert (
        abs(error(prediction.peak_bytes, measured_peak(kind_of(wide, **settings), 4, 16))) < 0.005
    )


@pytest.fixture(scope="module")
def planner() -> MemoryPlanner:
    return planner_of(SMALL_LLAMA, LENGTH)


def test_memory_grows_with_rank_and_micro_batch(planner: MemoryPlanner) -> None:
    def peak(rank: int, micro_batch_size: int) -> int:
        return planner.predict(rank, batch_size=4, micro_batch_size=micro_batch_size).peak_bytes

    assert all(peak(low, 4) < peak(high, 4) for low, high in itertools.pairwise((1, 2, 8, 64, 999)))
    assert peak(8, 1) < peak(8, 2) < peak(8, 4)


def test_largest_micro_batch_is_the_largest_that_fits(planner: MemoryPlanner) -> None:
    sizes = {n: planner.predict(8, batch_size=4, micro_batch_size=n) for n in (1, 2, 4)}

    def largest(budget: int, **settings: Any) -> Prediction | None:
        return planner.largest_micro_batch(8, memory_budget_bytes=budget, batch_size=4, **settings)

    for size, prediction in sizes.items():
        needed = planner.needed_bytes(prediction)
        assert needed == int(prediction.peak_bytes * (1 + ALLOWANCE))
        assert largest(needed) == prediction
        assert largest(needed - 1) == sizes.get(size // 2)
    assert largest(2**40, micro_batch_size=2) == sizes[2]


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.sample(1)
def test_largest_rank_fits_and_the_next_does_not(device_type: str) -> None:
    planner = planner_of(SMALL_LLAMA, LENGTH, device_type=device_type)

    def needs(prediction: Prediction | None) -> int:
        assert prediction is not None
        return planner.needed_bytes(prediction)

    for micro_batch_size in ("auto", 4):
        settings: dict[str, Any] = {"batch_size": 4, "micro_batch_size": micro_batch_size}
        for budget in (planner.outside_bytes + 2 * 2**20, planner.outside_bytes + 9 * 10**6):
            limit = {"memory_budget_bytes": budget, **settings}
            rank = planner.largest_rank(**limit)
            assert rank == 0 or needs(planner.largest_micro_batch(rank, **limit)) <= budget
            assert planner.largest_micro_batch(rank + 1, **limit) is None
            assert (
                micro_batch_size == "auto" or needs(planner.predict(rank + 1, **settings)) > budget
            )
    assert planner.largest_rank(memory_budget_bytes=1000, batch_size=4) == 0


def test_only_the_first_part_of_a_batch_has_the_longest_row() -> None:
    """A batch is cut longest first, and gradients are there from the second part on."""
    rows, longest = [64, 40, 16, 16], StepSize(8, 2, 64, 8)
    planner = MemoryPlanner(kind_of(SMALL_LLAMA), train_lengths=rows, eval_length=8)
    one_row = MemoryPlanner(kind_of(SMALL_LLAMA), train_lengths=rows[:1], eval_length=8)

    def peaks(rank: int) -> tuple[int, int, int]:
        first, second = (
            profile.predict(StepSize(rank, 2, length, 8), "cpu").peak_bytes
            for profile, length in (
                (profile_at(kind_of(SMALL_LLAMA), longest), 64),
                (profile_at(kind_of(SMALL_LLAMA, accumulate=True), longest), 16),
            )
        )
        return predict(planner, rank, 2, True).peak_bytes, first, second

    for rank in (4, 2048):
        found, first, second = peaks(rank)
        assert found == max(first, second) < predict(one_row, rank, 2, True).peak_bytes
    assert first < second  # at a high rank the gradients outweigh the longer row


def test_what_cannot_be_planned_is_refused(planner: MemoryPlanner) -> None:
    with pytest.raises(ValueError, match=r"must divide batch_size.*\[1, 2, 4\]"):
        planner.predict(8, batch_size=4, micro_batch_size=3)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        planner.predict(0, batch_size=4, micro_batch_size=1)
    with pytest.raises(ValueError, match="device_type"):
        planner_of(SMALL_LLAMA, LENGTH, device_type="mps")


def test_breakdown_counts_weights_and_adapter_exactly(planner: MemoryPlanner) -> None:
    prediction = predict(planner, 16, 4, accumulate=True)
    model = build_model(kind_of(SMALL_LLAMA), 16)
    adapter = sum(p.numel() for p in trainable_parameters(model).values())
    base = {p.data_ptr(): p.numel() for p in model.parameters() if not p.requires_grad}
    assert prediction.num_trainable_params == adapter
    assert prediction.breakdown["adapters"] == 4 * adapter
    assert prediction.breakdown["weights"] == pytest.approx(4 * sum(base.values()), abs=2048)
    # AdamW keeps two moments and a counter of one granule for each tensor.
    counters = 64 * len(trainable_parameters(model))
    assert prediction.breakdown["optimizer"] == 8 * adapter + counters
