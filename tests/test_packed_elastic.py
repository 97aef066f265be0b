"""Trials that join, leave, diverge, run out of memory or are saved, and the others beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packs import Run, alone, assert_equal, bits, packed, stacks, unmetered
from peft import PeftModel
from test_training import DATA, bench_of, padded, spec_of
from transformers import LlamaForCausalLM

from rsauto.adapters.lora import remove_adapter
from rsauto.packing.buckets import OVERHEAD_FLOPS
from rsauto.packing.layers import PackedHead, PackedLinear
from rsauto.packing.stack import Stack
from rsauto.packing.tensors import write
from rsauto.records import TrialSpec
from rsauto.training.loop import Diverged
from rsauto.training.packed import Pack
from rsauto.training.trial import OutOfMemory, put_on_adapter

pytestmark = pytest.mark.usefixtures("unmetered")
__all__ = ["unmetered"]


def some(count: int, steps: int = 6, **changes: Any) -> list[TrialSpec]:
    """Trials of one rank that differ in rate and data."""
    return [
        spec_of(**{"steps": steps, "num_evals": 2, "learning_rate": 1e-3 * (n + 1), "seed": n % 3,
                   **changes})
        for n in range(count)
    ]  # fmt: skip


RANKS = (2, 16, 5, 8)


def mixed(count: int, steps: int = 6) -> list[TrialSpec]:
    return [replace(s, rank=RANKS[n % 4]) for n, s in enumerate(some(count, steps))]


# ------------------------------------------------------------ who else is there


@pytest.mark.parametrize("ranks", [(4, 4, 4, 4), (2, 64, 33, 7)])
def test_one_that_leaves_changes_no_bit_of_the_others(
    llama: LlamaForCausalLM, ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every rank in a stack of its own, and one seed, so one padded length of all rows.
    monkeypatch.setitem(OVERHEAD_FLOPS, "cpu", 0.0)
    specs = [replace(s, rank=rank) for s, rank in zip(some(4, seed=0), ranks, strict=True)]
    whole = packed(bench_of(llama), specs)
    pruned = packed(bench_of(llama), specs, leaves={1: 2})
    assert bits(pruned[1]) == bits(whole[1])[:2]
    for number in (0, 2, 3):
        assert bits(pruned[number]) == bits(whole[number])


@pytest.mark.parametrize("seeds", [(0, 0, 0, 0), (0, 1, 2, 0)], ids=["one seed", "many seeds"])
def test_only_padding_that_shrinks_changes_a_last_bit(
    llama: LlamaForCausalLM, seeds: tuple[int, ...]
) -> None:
    # In one stack the largest rank leaves (64, then 33), or a seed whose rows were the longest:
    # sums are then over fewer zeros, and this BLAS cuts them into other partial sums.
    specs = [
        replace(s, rank=rank, seed=seed)
        for s, rank, seed in zip(some(4), (2, 64, 33, 7), seeds, strict=True)
    ]
    whole = packed(bench_of(llama), specs)
    pruned = packed(bench_of(llama), specs, leaves={1: 2})
    for number in (0, 2, 3):
        assert bits(pruned[number])[:2] == bits(whole[number])[:2]
        assert_equal(pruned[number], whole[number])


def test_a_trial_alone_in_a_pack_is_itself_in_a_pack_of_eight(llama: LlamaForCausalLM) -> None:
    bench, specs = bench_of(llama), some(8, seed=0)
    for run, spec in zip(packed(bench, specs), specs, strict=True):
        assert bits(run) == bits(packed(bench, [spec])[0])


def test_late_comers_begin_at_their_own_first_step(llama: LlamaForCausalLM) -> None:
    bench, specs = bench_of(llama), mixed(5)
    for run, spec in zip(packed(bench, specs, begins=[0, 5, 2, 9, 5]), specs, strict=True):
        assert_equal(run, alone(bench, spec))
        assert run.points[0].step == 1 and run.member is not None
    assert [p.tokens for p in packed(bench, specs[:1])[0].points] == [
        p.tokens for p in alone(bench, specs[0]).points
    ]


def test_evaluations_of_some_leave_the_others_in_peace(llama: LlamaForCausalLM) -> None:
    bench = bench_of(llama)
    specs = [replace(s, num_evals=n) for s, n in zip(mixed(4), (6, 1, 3, 2), strict=True)]
    for run, spec in zip(packed(bench, specs), specs, strict=True):
        assert [p.step for p in run.points if p.evaluation] == [
            p.step for p in alone(bench, spec).points if p.evaluation
        ]
        assert_equal(run, alone(bench, spec))


def test_the_largest_pack_a_trial_was_in_is_told(llama: LlamaForCausalLM) -> None:
    runs = packed(bench_of(llama), some(3, steps=3), begins=[0, 1, 5])
    assert [run.member.pack_size for run in runs if run.member] == [2, 2, 1]


# ------------------------------------------------------------ what is no number


@pytest.mark.parametrize("rate", [1e30, 1e38])
def test_numbers_that_are_lost_stay_with_the_trial_that_lost_them(
    llama: LlamaForCausalLM, rate: float
) -> None:
    bench, specs = bench_of(llama), some(4, seed=0)
    specs[2] = replace(specs[2], learning_rate=rate)
    runs = packed(bench, specs)
    expected = alone(bench, specs[2])
    assert isinstance(runs[2].error, Diverged) and isinstance(expected.error, Diverged)
    assert len(runs[2].points) == len(expected.points) < specs[2].steps
    step = str(expected.error).split(":")[0]
    assert str(runs[2].error).split(":")[0] == step
    others = packed(bench, [specs[n] for n in (0, 1, 3)])
    for number, run in zip((0, 1, 3), others, strict=True):
        assert bits(runs[number]) == bits(run)


def test_a_poisoned_trial_is_told_at_once(llama: LlamaForCausalLM) -> None:
    bench, specs = bench_of(llama), mixed(3)
    expected = [alone(bench, spec).losses[-1] for spec in specs]
    with Pack(bench, optimizer="adamw", rows=8) as pack:
        members = [pack.admit(spec) for spec in specs]
        pack.advance()
        (stack,) = stacks(pack)
        row = [m for m in pack._seated].index(members[1])
        stack.groups["A"].values[row, 0] = torch.nan
        found = {id(a.member): a for a in pack.advance()}
        assert isinstance(found[id(members[1])].error, Diverged)
        pack.release(members[1])
        while pack.members:
            for advance in pack.advance():
                number, point = members.index(advance.member), advance.point
                assert point is not None
                if advance.member.is_finished:
                    assert point.train_loss == pytest.approx(expected[number], abs=1e-5)
                    pack.release(advance.member)


# ------------------------------------------------------------ no room


def no_room_for(
    model: LlamaForCausalLM, most_rows: int, when: Callable[[], bool] = lambda: True
) -> None:
    def refuse(_model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) > most_rows and when():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    model.register_forward_pre_hook(refuse, with_kwargs=True)


@pytest.mark.parametrize("where", ["always", "evaluation", "later"])
def test_a_pack_without_room_halves_and_loses_nothing(llama: LlamaForCausalLM, where: str) -> None:
    bench, specs = bench_of(llama), mixed(5)
    expected = [alone(bench, spec) for spec in specs]
    count = 0

    def when() -> bool:
        nonlocal count
        count += 1
        return {"always": True, "evaluation": not llama.training, "later": count > 5}[where]

    no_room_for(llama, 16, when)
    sizes: list[tuple[int, int | None, bool]] = []
    runs = packed(
        bench, specs, watch=lambda p: sizes.append((len(p.members), p.capacity, p.has_room))
    )
    for run, one in zip(runs, expected, strict=True):
        assert_equal(run, one)
    if where == "evaluation":
        assert {capacity for _, capacity, _ in sizes} == {None}
    else:
        assert sizes[-1][1] == 2 and max(size for size, *_ in sizes[5:]) == 2
    assert sizes[-1][2]


def test_a_trial_that_has_no_room_alone_is_told(llama: LlamaForCausalLM) -> None:
    no_room_for(llama, 4)
    runs = packed(bench_of(llama), some(3))
    for run in runs:
        assert isinstance(run.error, OutOfMemory) and run.points == []
        assert str(run.error) == "CUDA out of memory. Tried to allocate 2 GiB."


def test_no_room_while_taking_seats(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, specs = bench_of(llama), mixed(4)
    expected = [alone(bench, spec) for spec in specs]
    original = Stack.__init__

    def refuse(self: Stack, trials: Any, *args: Any) -> None:
        if len(trials) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        original(self, trials, *args)

    monkeypatch.setattr(Stack, "__init__", refuse)
    for run, one in zip(packed(bench, specs), expected, strict=True):
        assert_equal(run, one)


def test_an_evaluation_that_fits_only_beside_nobody(llama: LlamaForCausalLM) -> None:
    bench, specs = bench_of(llama), mixed(3)
    expected = [alone(bench, spec) for spec in specs]
    seated: list[int] = []

    def when() -> bool:
        return not llama.training and seated[0] > 1

    with Pack(bench, optimizer="adamw", rows=8) as pack:
        members = [pack.admit(spec) for spec in specs]
        llama.register_forward_pre_hook(
            lambda *_: seated.__setitem__(slice(None), [len(pack._model.trials)])
        )
        no_room_for(llama, 0, when)
        runs = {id(member): Run() for member in members}
        while pack.members:
            for advance in pack.advance():
                assert advance.point is not None, advance.error
                runs[id(advance.member)].points.append(advance.point)
                if advance.member.is_finished:
                    pack.release(advance.member)
    for member, one in zip(members, expected, strict=True):
        found = runs[id(member)].numbers
        assert [n for row in found for n in row] == pytest.approx(
            [n for row in one.numbers for n in row], abs=1e-5
        )


def test_a_parked_trial_can_be_let_go(llama: LlamaForCausalLM) -> None:
    no_room_for(llama, 16)
    with Pack(bench_of(llama), optimizer="adamw", rows=8) as pack:
        members = [pack.admit(spec) for spec in some(4)]
        pack.advance()
        assert pack.members == members[:2] and pack.parked == members[2:] and not pack.has_room
        pack.release(members[2])
        assert pack.parked == members[3:]
        pack.release(members[0])
        assert pack.members == [members[1], members[3]] and not pack.parked


# ------------------------------------------------------------ the base


@pytest.mark.parametrize("error", [None, KeyError, torch.OutOfMemoryError])
def test_the_base_is_left_as_it_was(llama: LlamaForCausalLM, error: type[Exception] | None) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    layers = {name: module for name, module in llama.named_modules()}
    try:
        with Pack(bench_of(llama), optimizer="adamw", rows=8) as pack:
            for spec in mixed(3):
                pack.admit(replace(spec, learning_rate=0.1))
            for _ in range(3):
                pack.advance()
            assert any(isinstance(m, PackedLinear) for m in llama.modules())
            if error is not None:
                raise error("in the middle")
    except (KeyError, torch.OutOfMemoryError):
        pass
    after = llama.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert dict(llama.named_modules()) == layers
    assert not any(isinstance(m, (PackedLinear, PackedHead)) for m in llama.modules())
    assert not any(p.requires_grad for p in llama.parameters())


# ------------------------------------------------------------ saving


def logits_of(model: Any) -> torch.Tensor:
    batch = padded(list(DATA.validation))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(batch["input_ids"], batch["attention_mask"]).logits
    return found


def test_adapters_are_saved_in_the_middle_and_at_the_end(
    llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    bench, specs = bench_of(llama), mixed(4)
    specs[3] = replace(specs[3], steps=3)
    expected = [alone(bench, s, tmp_path / f"alone{n}") for n, s in enumerate(specs)]
    runs = packed(bench, specs, save=lambda number: tmp_path / str(number))
    untouched = logits_of(llama)
    for number, (run, one) in enumerate(zip(runs, expected, strict=True)):
        assert_equal(run, one)  # whose saving interrupts the others
        assert run.member is not None
        adapted = put_on_adapter(bench, specs[number])
        write(run.member.tensors, adapted)
        trained = logits_of(adapted)
        remove_adapter(adapted)
        assert (trained - untouched).abs().max() > 1e-2, "nothing was trained, or compared"
        for folder in (tmp_path / str(number), tmp_path / f"alone{number}"):
            reloaded = PeftModel.from_pretrained(llama, str(folder))
            torch.testing.assert_close(logits_of(reloaded), trained, rtol=0, atol=1e-5)
            reloaded.unload()
        configs = [json.loads((tmp_path / f / "adapter_config.json").read_text())
                   for f in (str(number), f"alone{number}")]  # fmt: skip
        assert configs[0] == configs[1] and configs[0]["r"] == specs[number].rank


def test_what_is_saved_is_what_the_pack_computes(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    batch = padded(list(DATA.validation))
    with Pack(bench_of(llama), optimizer="adamw", rows=8) as pack:
        members = [pack.admit(spec) for spec in mixed(3)]
        for _ in range(4):
            pack.advance()
        seating = pack._model.seating
        ids = batch["input_ids"].repeat(3, 1)
        seating.num_rows, seating.length = ids.shape
        with torch.no_grad():
            own = llama.eval()(ids, batch["attention_mask"].repeat(3, 1)).logits.chunk(3)
        of_members = dict(zip(map(id, pack._seated), own, strict=True))
        for number, member in enumerate(members):
            pack.save(member, tmp_path / str(number), "card")
    for number, member in enumerate(members):
        reloaded = PeftModel.from_pretrained(llama, str(tmp_path / str(number)))
        torch.testing.assert_close(logits_of(reloaded), of_members[id(member)], rtol=0, atol=1e-5)
        reloaded.unload()


def test_members_that_are_not_seated_are_saved_too(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    no_room_for(llama, 8)
    with Pack(bench_of(llama), optimizer="adamw", rows=8) as pack:
        members = [pack.admit(spec) for spec in some(2)]
        pack.advance()
        assert pack.parked == members[1:]
        for number, member in enumerate(members):
            pack.save(member, tmp_path / str(number), "card")
            assert (tmp_path / str(number) / "adapter_model.safetensors").exists()


def test_who_leaves_after_an_evaluation_in_parts_leaves_the_others_right(
    llama: LlamaForCausalLM,
) -> None:
    """Only two at a time can be evaluated, and those that stay are the ones evaluated last."""
    specs = [replace(s, steps=n) for s, n in zip(some(4), (2, 2, 6, 6), strict=True)]
    expected = packed(bench_of(llama), specs)

    def too_many(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not model.training and len(kwargs["input_ids"]) > 2 * 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = llama.register_forward_pre_hook(too_many, with_kwargs=True)
    try:
        got = packed(bench_of(llama), specs)
    finally:
        hook.remove()
    for mine, other in zip(got, expected, strict=True):
        assert mine.losses == pytest.approx(other.losses, abs=1e-5)


def test_no_room_to_save_beside_the_others_is_made(
    llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def full(bench: Any, spec: TrialSpec) -> Any:
        if len(pack._model.trials) > 0:
            calls.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return put_on_adapter(bench, spec)

    with Pack(bench_of(llama), optimizer="adamw", rows=8) as pack:
        members = [pack.admit(spec) for spec in some(2)]
        pack.advance()
        monkeypatch.setattr("rsauto.training.packed.put_on_adapter", full)
        assert pack.save(members[0], tmp_path / "adapter", "") > 0
        assert calls == [1]
        assert all(advance.point is not None for advance in pack.advance())
        monkeypatch.setattr(
            "rsauto.training.packed.put_on_adapter",
            lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.")),
        )
        with pytest.raises(OutOfMemory):
            pack.save(members[0], tmp_path / "adapter", "")


def test_a_step_that_failed_in_the_middle_is_not_made_again(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "rsauto.packing.model.step",
        lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.")),
    )
    with Pack(bench_of(llama), optimizer="adamw", rows=8) as pack:
        for spec in some(2):
            pack.admit(spec)
        with pytest.raises(RuntimeError, match="made in part"):
            pack.advance()


def test_a_finished_member_must_be_released(llama: LlamaForCausalLM) -> None:
    with Pack(bench_of(llama), optimizer="adamw", rows=8) as pack:
        pack.admit(some(1, steps=1)[0])
        pack.advance()
        with pytest.raises(ValueError, match="released"):
            pack.advance()
