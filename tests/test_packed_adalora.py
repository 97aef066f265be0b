"""AdaLoRA in a pack: every trial places its own rank, as it does alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from packs import alone, assert_equal, bits, packed, pads, stacks, unmetered
from peft import PeftModel
from test_packed_elastic import logits_of, no_room_for
from test_training import bench_of, spec_of
from transformers import LlamaForCausalLM

from rsauto.adapters.adalora import allocator_of
from rsauto.adapters.lora import lora_layers
from rsauto.packing.buckets import OVERHEAD_FLOPS
from rsauto.packing.tensors import Key
from rsauto.records import AllocationSpec, TrialSpec
from rsauto.training.packed import Pack
from rsauto.training.trial import Trial

pytestmark = pytest.mark.usefixtures("unmetered")
__all__ = ["unmetered"]


def placed(
    target: int, init: int, rule: Literal["lora", "rslora"] = "rslora", **changes: Any
) -> TrialSpec:
    """A trial whose rank falls from ``init`` to ``target``; ``way`` is of its allocation."""
    way = {"tinit": 2, "tfinal": 3, **changes.pop("way", {})}
    settings = {"steps": 10, "num_evals": 3, "learning_rate": 5e-3, "lambda_lr_ratio": 4.0,
                **changes}  # fmt: skip
    return replace(
        spec_of(rule=rule, rank=target, **settings),
        method="rsadalora" if rule == "rslora" else "adalora",
        init_rank=init,
        target_rank=target,
        allocation=AllocationSpec(**way),
    )


def check(llama: LlamaForCausalLM, specs: list[TrialSpec], **settings: Any) -> None:
    bench = bench_of(llama)
    for run, spec in zip(packed(bench, specs, **settings), specs, strict=True):
        expected = alone(bench, spec)
        if spec.allocation is not None:
            seen = [sum(p.values()) for p in expected.patterns if p is not None]
            assert seen[0] > seen[-1] == spec.rank * 14, "no rank was placed, or compared"
        assert_equal(run, expected)  # patterns of every step and operations, too


@pytest.mark.parametrize("score", ["full", "lambda"])
@pytest.mark.parametrize("recovery", ["none", "paper"])
@pytest.mark.sample(2)
def test_ranks_are_placed_step_by_step_as_alone(
    llama: LlamaForCausalLM, recovery: str, score: str
) -> None:
    way = {"recovery": recovery, "score": score}
    check(
        llama,
        [
            placed(4, 6, way=way),
            placed(4, 8, "lora", way=way, seed=2, lr_ratio=2.0),
            placed(1, 2, way={**way, "delta_t": 3, "tinit": 1, "tfinal": 5}),
            placed(5, 7, way=way, max_grad_norm=0.02, weight_decay=0.1, steps=8),
        ],
    )


@pytest.mark.parametrize(
    "way",
    [
        {"orth_reg_form": "squared", "orth_reg_weight": 0.01},
        {"orth_reg_weight": 0.0},
        {"scale_rank": "init", "orth_reg_weight": 0.5},
        {"scale_rank": "live"},
        {"scale_rank": "live", "recovery": "paper", "init_std": 0.02},
    ],
    ids=str,
)
@pytest.mark.sample(2)
def test_other_ways_of_placing_it(llama: LlamaForCausalLM, way: dict[str, Any]) -> None:
    check(llama, [placed(4, 6, way=way), placed(2, 5, way=way, batch_size=16, seed=1)])


def test_ways_that_differ_share_a_pack_but_no_stack(llama: LlamaForCausalLM) -> None:
    ways: list[dict[str, Any]] = [
        {}, {"recovery": "paper"}, {"orth_reg_weight": 0.5}, {"beta1": 0.5}, {"score": "lambda"},
    ]  # fmt: skip
    sizes: list[int] = []
    specs = [*(placed(2, 4, way=way) for way in ways), spec_of(steps=6)]
    check(llama, specs, watch=lambda pack: sizes.append(len(stacks(pack))))
    assert sizes[0] == 6


def test_trials_that_come_and_go_keep_their_schedules(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [placed(4, 6), placed(2, 8, seed=1), spec_of(steps=3), placed(3, 6)]
    check(llama, specs, begins=[0, 5, 3, 9])
    monkeypatch.setitem(OVERHEAD_FLOPS, "cpu", 0.0)
    check(llama, specs, begins=[0, 5, 3, 0])


def test_without_room_ranks_are_placed_all_the_same(llama: LlamaForCausalLM) -> None:
    bench, specs = bench_of(llama), [placed(2, 4), placed(3, 6, way={"recovery": "paper"})]
    expected = [alone(bench, spec) for spec in specs]
    steps = 0

    def later() -> bool:
        nonlocal steps
        steps += 1
        return steps > 14  # in the middle of the schedules

    no_room_for(llama, 8, later)
    for run, one in zip(packed(bench, specs), expected, strict=True):
        assert_equal(run, one)


def test_one_that_leaves_changes_no_bit_of_the_others(llama: LlamaForCausalLM) -> None:
    specs = [placed(2, 4, learning_rate=rate) for rate in (1e-3, 3e-3, 1e-2)]
    whole = packed(bench_of(llama), specs)
    pruned = packed(bench_of(llama), specs, leaves={1: 6})
    assert [bits(pruned[n]) for n in (0, 2)] == [bits(whole[n]) for n in (0, 2)]
    assert pruned[0].patterns == whole[0].patterns


@pytest.mark.parametrize("recovery", ["none", "paper"])
def test_pads_and_what_is_gone_stay_exactly_zero(llama: LlamaForCausalLM, recovery: str) -> None:
    way = {"recovery": recovery}
    gone = 0
    before: dict[tuple[int, str], torch.Tensor] = {}

    def watch(pack: Pack) -> None:
        nonlocal gone
        for stack, allocation in zip(stacks(pack), pack._model._allocations, strict=True):
            assert not pads(stack).any()
            assert allocation is not None
            for row, alive in enumerate(allocation.num_alive):
                for name in alive:
                    mask = allocation.masks(row)[0][name]
                    gone += int((~mask).sum())
                    rank = len(mask)
                    # The gradients of this step are still there of those that have just gone.
                    was = before.get((row, name), torch.ones_like(mask))
                    before[row, name] = mask
                    for field, kept in (("values", mask), ("exp_avg", mask), ("gradients", was)):
                        a = stack.view(field, Key(name, "A"))[row, :rank]
                        b = stack.view(field, Key(name, "B"))[row, :, :rank]
                        e = stack.view(field, Key(name, "E"))[row, :rank]
                        assert not a[~kept].any() and not b[:, ~kept].any() and not e[~kept].any()

    specs = [placed(2, 4, way=way, weight_decay=0.1), placed(1, 6, way=way, seed=1)]
    packed(bench_of(llama), specs, watch=watch)
    assert (gone > 100) == (recovery == "none")


@pytest.mark.parametrize(
    "way", [{}, {"recovery": "paper"}, {"recovery": "paper", "scale_rank": "live"}], ids=str
)
def test_what_is_saved_is_what_a_trial_alone_saves(
    llama: LlamaForCausalLM, tmp_path: Path, way: dict[str, Any]
) -> None:
    bench, specs = bench_of(llama), [placed(2, 4, way=way), placed(3, 6, way=way, seed=1)]
    untouched = logits_of(llama)
    for number, spec in enumerate(specs):
        alone(bench, spec, tmp_path / f"alone{number}")
    runs = packed(bench, specs, save=lambda number: tmp_path / str(number))
    for number, run in enumerate(runs):
        found = []
        for name in (str(number), f"alone{number}"):
            reloaded = PeftModel.from_pretrained(llama, str(tmp_path / name))
            found.append(logits_of(reloaded))
            reloaded.unload()
        assert (found[0] - untouched).abs().max() > 1e-3
        torch.testing.assert_close(*found, rtol=0, atol=1e-5)
        configs = [
            json.loads((tmp_path / name / "adapter_config.json").read_text())
            for name in (str(number), f"alone{number}")
        ]
        assert configs[0] == configs[1]
        pattern = {
            n: r for n, r in (run.patterns[-1] or {}).items() if r not in (0, configs[0]["r"])
        }
        assert configs[0]["rank_pattern"] == pattern


def test_gamma_follows_the_live_rank_as_alone(llama: LlamaForCausalLM) -> None:
    spec = placed(2, 5, way={"scale_rank": "live"})
    bench = bench_of(llama)
    with Trial(bench, spec) as trial:
        list(trial.steps())
        assert trial._adapted is not None
        names = allocator_of(trial._adapted).layers
        expected = dict(
            zip(names, (x.scaling["default"] for x in lora_layers(trial._adapted)), strict=True)
        )
    assert len(set(expected.values())) > 1
    run = packed(bench, [spec, placed(4, 6, way={"scale_rank": "live"})])[0]
    assert run.member is not None
    assert run.member.tensors.gamma == pytest.approx(expected, rel=1e-12)
