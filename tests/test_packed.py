"""Trials in a pack against the same trials alone, and against loops written by hand."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packs import Run, alone, assert_equal, packed, pads, stacks, unmetered
from test_training import DATA, bench_of, by_hand, losses, spec_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from rsauto.base import prepare
from rsauto.packing.buckets import OPERATIONS_PER_LAYER, OVERHEAD_FLOPS, buckets
from rsauto.records import TrialSpec
from rsauto.training.packed import Pack

pytestmark = pytest.mark.usefixtures("unmetered")
__all__ = ["unmetered"]

PATTERN = (("model.layers.0.self_attn.q_proj", 3), ("model.layers.1.mlp.down_proj", 5))
MIXED = [
    spec_of(steps=10, num_evals=3, rank=2, learning_rate=1e-3),
    spec_of(steps=10, num_evals=2, rank=64, rule="lora", alpha=16, seed=3, learning_rate=1e-3),
    spec_of(steps=10, rank=16, lr_ratio=16.0, learning_rate=5e-4, max_grad_norm=None,
            schedule="cosine", warmup_share=0.3, weight_decay=0.1),
    spec_of(steps=7, num_evals=7, rank=8, init_scale=0.5, scaling_exponent=-0.25,
            max_grad_norm=0.05, schedule="constant", learning_rate=1e-3),
    spec_of(steps=9, num_evals=1, rank=4, target_modules="attention", learning_rate=1e-3),
    spec_of(steps=10, rank=4, target_modules=("q_proj", "down_proj"), learning_rate=1e-3),
    spec_of(steps=8, rank=4, rank_pattern=PATTERN, learning_rate=1e-3),
]  # fmt: skip


@pytest.fixture
def one_stack_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a large model, where starting an operation costs nothing beside it."""
    monkeypatch.setitem(OVERHEAD_FLOPS, "cpu", 0.0)


def check(
    model: LlamaForCausalLM, specs: Sequence[TrialSpec], tolerance: float = 1e-5, **settings: Any
) -> list[Run]:
    bench = bench_of(model)
    found = packed(bench, specs, **settings)
    for run, spec in zip(found, specs, strict=True):
        # The fixture's model is always the same, so its trials need not be run anew.
        plain = model.dtype == torch.float32 and spec in MIXED
        expected = (plain and _ALONE.get(spec)) or alone(bench, spec)
        if plain:
            _ALONE[spec] = expected
        assert_equal(run, expected, tolerance)
    return found


_ALONE: dict[TrialSpec, Run] = {}


# ------------------------------------------------------------ exactly as alone


def test_trials_of_all_kinds_are_each_as_alone(llama: LlamaForCausalLM) -> None:
    check(llama, MIXED)


@pytest.mark.usefixtures("one_stack_a_rank")
def test_and_so_they_are_in_several_stacks(llama: LlamaForCausalLM) -> None:
    seen: list[int] = []
    check(llama, MIXED, watch=lambda pack: seen.append(len(stacks(pack))))
    assert max(seen) == 7, "ranks 2, 4, 5, 8, 16 and 64, and one that adapts other layers"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_pack_is_what_stock_peft_and_torch_give_by_hand(
    llama: LlamaForCausalLM, optimizer: str
) -> None:
    shared: dict[str, Any] = {"steps": 10, "num_evals": 1, "optimizer": optimizer}
    rate = 1e-3 if optimizer == "adamw" else 0.1
    specs = [
        spec_of(**shared, rank=2, learning_rate=rate),
        spec_of(**shared, rank=16, rule="lora", seed=5, learning_rate=rate / 2, lr_ratio=4.0),
        spec_of(**shared, rank=5, weight_decay=0.1, schedule="cosine", max_grad_norm=None,
                learning_rate=rate),
    ]  # fmt: skip
    found = packed(bench_of(llama), specs, optimizer=optimizer)  # type: ignore[arg-type]
    for run, spec in zip(found, specs, strict=True):
        expected_losses, expected_norms, expected_final = by_hand(copy.deepcopy(llama), spec)
        assert run.losses == pytest.approx(expected_losses, abs=1e-5)
        assert [p.grad_norm for p in run.points] == pytest.approx(expected_norms, abs=1e-5)
        evaluation = run.points[-1].evaluation
        assert evaluation is not None
        assert evaluation.eval_loss == pytest.approx(expected_final, abs=1e-5)
        assert abs(expected_losses[-1] - expected_losses[0]) > 0.05, "nothing was learnt"


def test_in_double_precision_only_the_loss_is_rounded(llama: LlamaForCausalLM) -> None:
    # Losses are computed in float32 wherever they are, so 1e-6 is all that they can show of it;
    # gradients are not, but they begin at a loss that is.
    check(llama.double(), MIXED[:4], tolerance=1e-6)


@pytest.mark.parametrize("rows", [3, 8])
def test_micro_batches_that_do_not_divide_the_batch(llama: LlamaForCausalLM, rows: int) -> None:
    shared: dict[str, Any] = {"batch_size": 8, "micro_batch_size": rows, "steps": 5}
    check(llama, [spec_of(**shared, rank=2), spec_of(**shared, rank=7, seed=1)], rows=rows)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_both_kinds(llama: LlamaForCausalLM, reentrant: bool) -> None:
    check(prepare(llama, True, reentrant), [MIXED[0], MIXED[3]])


def test_a_base_in_half_precision_with_adapters_in_full(llama: LlamaForCausalLM) -> None:
    # Sums are rounded once, as alone, so a step differs only where the last bit of float32
    # falls on a tie of bfloat16's.
    check(llama.bfloat16(), [MIXED[0], MIXED[3], MIXED[2]], tolerance=1e-3)


def test_adapters_in_half_precision_beside_others_in_full(llama: LlamaForCausalLM) -> None:
    # gamma_r = 8 / sqrt(6) has no short form in bfloat16: rounded, it is off by 1e-3. Gradients
    # are rounded to 8 bits, a half of 1/256 each, and so is the norm of each tensor alone.
    half = [replace(s, adapter_dtype="bfloat16", rank=6) for s in (MIXED[0], MIXED[3])]
    bench = bench_of(llama)
    *found, full = packed(bench, [*half, MIXED[0]])
    assert_equal(full, alone(bench, MIXED[0]))
    for run, spec in zip(found, half, strict=True):
        expected = alone(bench, spec)
        assert run.losses == pytest.approx(expected.losses, abs=2e-4)
        norms = [p.grad_norm for p in expected.points]
        assert [p.grad_norm for p in run.points] == pytest.approx(norms, rel=1e-2)


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_small_pack(llama: LlamaForCausalLM, data: st.DataObject) -> None:
    def one() -> TrialSpec:
        return spec_of(
            rank=data.draw(st.integers(1, 24)),
            rule=data.draw(st.sampled_from(["lora", "rslora"])),
            alpha=data.draw(st.integers(1, 32)),
            learning_rate=data.draw(st.floats(1e-5, 1e-3)),
            lr_ratio=data.draw(st.sampled_from([1.0, 4.0])),
            schedule=data.draw(st.sampled_from(["constant", "linear", "cosine"])),
            max_grad_norm=data.draw(st.sampled_from([None, 0.05, 1.0])),
            weight_decay=data.draw(st.sampled_from([0.0, 0.1])),
            target_modules=data.draw(st.sampled_from(["all-linear", "attention", ("up_proj",)])),
            steps=data.draw(st.integers(1, 3)),
            seed=data.draw(st.integers(0, 3)),
        )

    specs = [one() for _ in range(data.draw(st.integers(1, 4)))]
    begins = [data.draw(st.integers(0, 2)) for _ in specs]
    overhead = data.draw(st.sampled_from([0.0, 4e5]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OVERHEAD_FLOPS, "cpu", overhead)
        check(llama, specs, begins=begins)


# ------------------------------------------------------------ what a pack is not for


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "sgd"}, "optimizer: 'sgd' in a pack of 'adamw'"),
        ({"batch_size": 8}, "batch_size: 8 beside trials of 16"),
    ],
)
def test_trials_that_cannot_share_a_step_are_refused(
    llama: LlamaForCausalLM, changes: dict[str, Any], words: str
) -> None:
    with Pack(bench_of(llama), optimizer="adamw", rows=8) as pack:
        assert pack.advance() == []
        pack.admit(spec_of())
        with pytest.raises(ValueError, match=words):
            pack.admit(spec_of(**changes))
        assert len(pack.members) == 1


# ------------------------------------------------------------ pads


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_pads_stay_exactly_zero(llama: LlamaForCausalLM, optimizer: str) -> None:
    specs = [
        replace(s, optimizer=optimizer, weight_decay=0.1, steps=6, learning_rate=0.05)  # type: ignore[arg-type]
        for s in MIXED
    ]
    checked = 0

    def watch(pack: Pack) -> None:
        nonlocal checked
        for stack in stacks(pack):
            found = pads(stack)
            assert not found.any() and found.isfinite().all()
            checked += len(found)

    packed(bench_of(llama), specs, optimizer=optimizer, watch=watch)  # type: ignore[arg-type]
    assert checked > 1e5


# ------------------------------------------------------------ operations


class Counting(TorchDispatchMode):
    """Operations that do more than look at memory in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations_of_a_step(num_layers: int, size: int) -> int:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = prepare(LlamaForCausalLM(config), gradient_checkpointing=False)
    shared: dict[str, Any] = {"steps": 4, "num_evals": 1, "batch_size": 8}
    with Pack(bench_of(model), optimizer="adamw", rows=8) as pack:
        for number in range(size):  # of one seed: they share rows, which are padded once
            pack.admit(spec_of(**shared, learning_rate=1e-3 + 1e-4 * number))
        for _ in range(2):
            pack.advance()
        with Counting() as counting:
            advances = pack.advance()
        assert len(advances) == size and all(a.point is not None for a in advances)
    return counting.count


@pytest.mark.parametrize("num_layers", [2, 4])
def test_eight_trials_take_hardly_more_operations_than_one(num_layers: int) -> None:
    one, eight = operations_of_a_step(num_layers, 1), operations_of_a_step(num_layers, 8)
    assert one > 100 * num_layers
    assert eight <= 1.1 * one, (one, eight)


# ------------------------------------------------------------ which ranks are padded together


@settings(deadline=None)
@given(
    ranks=st.lists(st.integers(1, 128), min_size=1, max_size=7),
    flops=st.floats(1e2, 1e7),
    num_layers=st.integers(1, 40),
)
def test_no_way_to_cut_costs_less(ranks: list[int], flops: float, num_layers: int) -> None:
    start = OVERHEAD_FLOPS["cpu"] * OPERATIONS_PER_LAYER * num_layers

    def cost(groups: Sequence[Sequence[int]]) -> float:
        return sum(start + len(group) * max(group) * flops for group in groups)

    found = buckets(ranks, flops_per_rank=flops, num_layers=num_layers, device_type="cpu")
    assert sorted(index for table in found for index in table) == list(range(len(ranks)))
    ordered = sorted(ranks)
    cuts = itertools.chain.from_iterable(
        itertools.combinations(range(1, len(ranks)), n) for n in range(len(ranks))
    )
    partitions = [
        [ordered[a:b] for a, b in itertools.pairwise((0, *cut, len(ranks)))] for cut in cuts
    ]
    assert len(partitions) == 2 ** (len(ranks) - 1)
    own = cost([[ranks[index] for index in table] for table in found])
    assert math.isclose(own, min(map(cost, partitions)), rel_tol=1e-9)


def test_losses_are_compared_and_not_only_lengths(llama: LlamaForCausalLM) -> None:
    run = alone(bench_of(llama), MIXED[0])
    other = alone(bench_of(llama), replace(MIXED[0], learning_rate=1.02e-3))
    with pytest.raises(AssertionError):
        assert_equal(run, other)
    assert len(DATA.train) == 40 and losses(run.points) == run.losses
