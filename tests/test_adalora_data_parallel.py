"""One allocation, however a batch is divided and whatever its gradients are multiplied by."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_adalora_parity import LEARNING_RATE, adamw, adapted, batch, kept, logits_of, train
from torch import Tensor, distributed
from torch.amp.grad_scaler import GradScaler
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

STEPS = 20
PROCESSES = 2


def factors_of(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def assert_same_factors(one: PeftModel, other: PeftModel, tolerance: float = 1e-5) -> None:
    assert kept(one) == kept(other)
    assert one.base_model.rank_pattern() == other.base_model.rank_pattern()
    theirs = factors_of(other)
    for name, value in factors_of(one).items():
        torch.testing.assert_close(value, theirs[name], atol=tolerance, rtol=0)


# --- processes


def part_of(step: int, rank: int) -> dict[str, Tensor]:
    return {name: values[rank::PROCESSES] for name, values in batch(step).items()}


def train_together(number: int, folder: str, first_rank: int) -> None:
    """One of the processes; writes what it ends with."""
    rank = first_rank + number
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(minutes=3),
    )
    try:
        torch.save(train_part(rank), Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def train_part(rank: int) -> dict[str, Any]:
    """All steps on this process's half of every batch."""
    model = adapted()
    wrapped = DistributedDataParallel(model)
    optimizer = adamw(model)
    flags = []
    for step in range(1, STEPS + 1):
        wrapped(**part_of(step, rank)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
        flags.append(kept(model))
    return {
        "factors": factors_of(model),
        "kept": flags,
        "ranks": model.base_model.rank_pattern(),
        "refusal": refusal(rank),
    }


def refusal(rank: int) -> str:
    """What is said at the first step to tensors that are to become smaller."""
    model = adapted(recovery="none")
    optimizer = adamw(model)
    DistributedDataParallel(model)(**part_of(1, rank)).loss.backward()
    optimizer.step()
    try:
        model.base_model.update_and_allocate(1, optimizer)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of both processes, of which this is the first."""
    folder = tmp_path_factory.mktemp("together")
    others = spawn(train_together, args=(str(folder), 1), nprocs=PROCESSES - 1, join=False)
    assert others is not None
    train_together(0, str(folder), 0)
    while not others.join():
        pass
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def test_processes_allocate_as_one(together: list[dict[str, Any]]) -> None:
    alone = adapted()
    optimizer = adamw(alone)
    for step in range(1, STEPS + 1):
        train(alone, optimizer, step, step)
        for result in together:
            assert result["kept"][step - 1] == kept(alone), f"step {step}"
    for result in together:
        assert result["ranks"] == alone.base_model.rank_pattern()
        for name, value in factors_of(alone).items():
            torch.testing.assert_close(result["factors"][name], value, atol=1e-5, rtol=0)


def test_processes_agree_to_the_last_bit(together: list[dict[str, Any]]) -> None:
    first, second = (result["factors"] for result in together)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_processes_cannot_make_tensors_smaller(together: list[dict[str, Any]]) -> None:
    for result in together:
        assert result["refusal"] == (
            "recovery: none cannot make tensors smaller that several processes train together: "
            "their gradients lie in buckets of fixed size. Choose recovery: paper."
        )


# --- micro-batches


@pytest.mark.parametrize("recovery", ["paper", "none"])
def test_micro_batches_allocate_as_one_batch(recovery: str) -> None:
    whole = adapted(recovery=recovery)
    train(whole, adamw(whole), 1, STEPS)
    divided = adapted(recovery=recovery)
    optimizer = adamw(divided)
    for step in range(1, STEPS + 1):
        rows = batch(step)
        for row in range(4):
            part = {name: values[row : row + 1] for name, values in rows.items()}
            (divided(**part).loss / 4).backward()
        optimizer.step()
        divided.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    assert_same_factors(divided, whole)


# --- mixed precision


def train_scaled(
    scale: float | None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    fused: bool = False,
    unscale: bool = False,
    overflow_at: int | None = None,
    leave_out: int | None = None,
    **changes: Any,
) -> PeftModel:
    """20 steps in autocast, the loss multiplied by ``scale``; None: by nothing."""
    model = adapted(deltaT=3, **changes)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, fused=fused
    )
    scaler = GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for step in range(1, STEPS + 1):
        if step == leave_out:
            continue
        with torch.autocast("cpu", dtype=dtype):
            loss = model(**batch(step)).loss
        scaler.scale(loss).backward()
        if step == overflow_at:
            overflow(model)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    assert scaler.get_scale() == (scale or 1.0) / (1 if overflow_at is None else 2)
    return model


def overflow(model: PeftModel) -> None:
    """One entry of one gradient."""
    for name, parameter in model.named_parameters():
        if name.endswith("layers.1.mlp.down_proj.lora_B.default"):
            assert parameter.grad is not None
            parameter.grad[3, 1] = math.inf


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaled_loss_allocates_the_same(fused: bool, unscale: bool) -> None:
    """A power of two leaves every digit of bf16 and fp32 as it is; so it must of the result."""
    scaled = train_scaled(2.0**12, fused=fused, unscale=unscale, orth_reg_weight=2.0)
    plain = train_scaled(None, fused=fused, orth_reg_weight=2.0)
    assert_same_factors(scaled, plain, tolerance=1e-6)
    without = train_scaled(None, fused=fused, orth_reg_weight=0.0)
    assert (logits_of(plain) - logits_of(without)).abs().max() > 0.01


def test_half_precision_reaches_the_budget_in_the_same_modules() -> None:
    scaled = train_scaled(2.0**12, torch.float16)
    plain = train_scaled(None, torch.float16)
    assert scaled.base_model.rank_pattern() == plain.base_model.rank_pattern()
    assert sum(scaled.base_model.rank_pattern().values()) == 12
    torch.testing.assert_close(logits_of(scaled), logits_of(plain), atol=0.02, rtol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_is_no_step(fused: bool) -> None:
    """At step 8 nothing is allocated, so leaving it out is the same as skipping it."""
    skipped = train_scaled(2.0**12, fused=fused, overflow_at=8)
    left_out = train_scaled(None, fused=fused, leave_out=8)
    assert_same_factors(skipped, left_out, tolerance=1e-6)
