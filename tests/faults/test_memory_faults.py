"""Allocations that fail at any moment: the trial ran out of memory, and nothing else happened.

    python tests/faults/test_memory_faults.py --moments 200 --trials 200

Strikes 200 moments of a trial alone and of a pack, and shows what 200 trials leave behind.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packs import Run, Unmetered, alone, drain, unmetered
from test_training import bench_of, spec_of

from rsauto.adapters.lora import lora_layers
from rsauto.base import prepare
from rsauto.records import TrialSpec
from rsauto.training.out_of_memory import is_out_of_memory
from rsauto.training.packed import Pack
from rsauto.training.trial import Bench, OutOfMemory, Trial

pytestmark = pytest.mark.usefixtures("unmetered")
__all__ = ["unmetered"]

NUM_MOMENTS = int(os.environ.get("RSAUTO_FAULT_MOMENTS", "12"))

ERRORS: tuple[Callable[[], Exception], ...] = (
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nDetails."),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: "
                         "can't allocate memory: you tried to allocate 2147483648 bytes."),
    MemoryError,
)  # fmt: skip


NEVER = 0


class Full(TorchDispatchMode):
    """The n-th operation of torch finds no room, and where it lasts all that come after it."""

    def __init__(self, at: int, lasts: bool = False) -> None:
        super().__init__()
        self.at, self.lasts, self.count = at, lasts, 0
        self.is_on = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += self.is_on
        is_there = self.count == self.at or (self.lasts and self.count > self.at)
        if self.is_on and self.at != NEVER and is_there:
            raise ERRORS[self.at % len(ERRORS)]()
        return func(*args, **(kwargs or {}))


def moments(count: int, num_moments: int) -> Iterator[int]:
    """Numbers of operations from the first to the last, evenly spread."""
    for place in range(num_moments):
        yield 1 + place * (count - 1) // max(1, num_moments - 1)


def three() -> list[TrialSpec]:
    """Optimizer states are there in the second step; an evaluation follows each."""
    return [
        spec_of(steps=2, num_evals=2, batch_size=8, rank=rank, learning_rate=1e-3, seed=0)
        for rank in (2, 5, 4)
    ]


def require_untouched(bench: Bench) -> None:
    model = bench.model
    assert not list(lora_layers(model))
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is torch.nn.Linear
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


# ------------------------------------------------------------ one trial alone


def outcome_alone(bench: Bench, folder: Path, full: Full) -> str:
    """From putting on the adapter to saving it."""
    with Trial(bench, three()[0]) as trial, full:
        try:
            for _ in trial.steps():
                pass
            trial.save(folder, "card")
        except OutOfMemory as error:
            assert str(error) and "\n" not in str(error)
            return "oom"
    return "complete"


def strike_alone(bench: Bench, folder: Path, num_moments: int) -> int:
    """How many moments were struck; raises AssertionError where one did more than end its trial."""
    expected = alone(bench, three()[0]).numbers
    counted = Full(NEVER)
    assert outcome_alone(bench, folder, counted) == "complete"
    struck = list(moments(counted.count, num_moments))
    for at in struck:
        assert outcome_alone(bench, folder, Full(at)) == "oom", f"operation {at}"
        require_untouched(bench)
    assert alone(bench, three()[0]).numbers == expected, "the next trial is as if nothing had been"
    return len(struck)


def test_wherever_a_trial_runs_out_of_memory_that_is_its_outcome(
    llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    assert strike_alone(bench_of(llama), tmp_path / "adapter", NUM_MOMENTS) == NUM_MOMENTS


# ------------------------------------------------------------ several in a pack


def together(bench: Bench, full: Full) -> list[Run]:
    runs: list[Run] = []
    full.is_on = False
    with full, Pack(bench, optimizer="adamw", rows=8) as pack:
        members = [pack.admit(spec) for spec in three()]
        runs = [Run() for _ in members]
        full.is_on = True  # until the pack is left, with what is still in it
        drain(pack, members, runs)
    return runs


def strike_packs(bench: Bench, num_moments: int, *, lasts: bool) -> dict[str, int]:
    """How often a pack went on in smaller parts, and how often it was given up."""
    expected = [alone(bench, spec).losses for spec in three()]
    counted = Full(NEVER)
    assert all(run.error is None for run in together(bench, counted))
    found = {"went on": 0, "told": 0, "given up": 0}
    for at in moments(counted.count, num_moments):
        try:
            runs = together(bench, Full(at, lasts))
        except (RuntimeError, MemoryError) as error:  # whoever runs it lets each run alone
            assert is_out_of_memory(error) or "made in part" in str(error)
            found["given up"] += 1
        else:
            ended = [run.error is not None for run in runs]
            found["told" if any(ended) else "went on"] += 1
            assert lasts or not any(ended), f"operation {at}"
            for run, losses, error in zip(runs, expected, ended, strict=True):
                assert run.losses == pytest.approx(losses[: len(run.losses)], abs=1e-5)
                assert error or len(run.losses) == len(losses)
        require_untouched(bench)
    return found


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "from then on"])
@pytest.mark.sample(1)
def test_wherever_a_pack_runs_out_of_memory_its_trials_go_on(
    llama: LlamaForCausalLM, lasts: bool
) -> None:
    found = strike_packs(bench_of(llama), NUM_MOMENTS, lasts=lasts)
    assert sum(found.values()) == NUM_MOMENTS
    assert found["told" if lasts else "went on"] > 0


# ------------------------------------------------------------ what is left behind


def remains(bench: Bench, folder: Path, num_trials: int) -> dict[str, float]:
    """What so many trials leave, every third cut short: tensors alive, and MiB of the process."""
    counted = Full(NEVER)
    outcome_alone(bench, folder, counted)
    for at in (NEVER, counted.count // 3, NEVER):  # what is loaded and cached at first use
        outcome_alone(bench, folder, Full(at))
    together(bench, Full(NEVER))
    before = _alive()
    for number in range(num_trials):
        at = 1 + (number * 97) % counted.count if number % 3 == 0 else NEVER
        outcome_alone(bench, folder, Full(at))
        if number % 10 == 0:
            together(bench, Full(NEVER))
    after = _alive()
    return {"trials": num_trials, "tensors": after[0] - before[0], "MiB": after[1] - before[1]}


def _alive() -> tuple[int, float]:
    gc.collect()
    tensors = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
    return tensors, psutil.Process().memory_info().rss / 2**20


def test_trials_leave_nothing_behind(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    found = remains(bench_of(llama), tmp_path / "adapter", 12)
    assert found["tensors"] == 0
    assert found["MiB"] < 30, found


# ------------------------------------------------------------ in whose words


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
    ],
    ids=str,
)
def test_every_allocator_is_understood(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), ValueError("out of memory"), OSError(12)]
)
def test_other_errors_are_not_taken_for_want_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def _llama() -> LlamaForCausalLM:
    """As in conftest, for the script."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    prepare(model, gradient_checkpointing=False)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Strikes allocations, and counts what is left.")
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--trials", type=int, default=200)
    arguments = parser.parse_args()
    import rsauto.training.packed
    import rsauto.training.trial

    for module in (rsauto.training.packed, rsauto.training.trial):
        module.PeakMeter = Unmetered  # type: ignore[attr-defined]
    bench = bench_of(_llama())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        _show({"struck alone": strike_alone(bench, folder, arguments.moments)})
        for lasts in (False, True):
            found = strike_packs(bench, arguments.moments, lasts=lasts)
            _show({"struck in packs": arguments.moments, "lasts": lasts, **found})
        _show(remains(bench, folder, arguments.trials))


def _show(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
