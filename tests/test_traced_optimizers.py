"""States against those of bitsandbytes, temporaries of a step against the profiler."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from rsauto.memory.kinds import PlannedOptimizer
from rsauto.memory.measure import PeakMeter
from rsauto.memory.recorder import StorageRecorder
from rsauto.memory.traced_optimizers import planned_optimizer

SHAPES = [(300, 256), (64, 64), (63, 65), (512, 130), (10,)]
"""Above, at and below the size from which bitsandbytes keeps 8 bit, whole blocks and not."""


class Parameters(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for number, shape in enumerate(SHAPES):
            parameter = nn.Parameter(torch.ones(shape, dtype=dtype))
            parameter.grad = torch.ones_like(parameter)
            self.register_parameter(f"weight{number}", parameter)


def states(optimizer: Optimizer) -> list[dict[str, tuple[Any, ...]]]:
    """Shape, dtype and bytes of every tensor that belongs to each parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        {
            name: (tuple(value.shape), value.dtype, value.nbytes)
            for name, value in optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        }
        for parameter in parameters
    ]


def num_bytes(optimizer: Optimizer) -> int:
    tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return sum({t.untyped_storage()._cdata: t.nbytes for t in tensors}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, twin = Parameters(dtype), Parameters(dtype)
    theirs = bitsandbytes.optim.AdamW8bit(twin.parameters())
    theirs.step()
    ours = planned_optimizer(model, "adamw_8bit", "cuda")
    ours.step()
    with FakeTensorMode(allow_non_fake_inputs=True):
        faked = planned_optimizer(Parameters(dtype), "adamw_8bit", "cuda")
        faked.step()
    assert states(ours) == states(faked) == states(theirs)
    assert num_bytes(ours) == num_bytes(faked) == num_bytes(theirs)


def test_8bit_states_take_two_bytes_an_element() -> None:
    optimizer = planned_optimizer(Parameters(), "adamw_8bit", "cuda")
    optimizer.step()
    large, small = 300 * 256 + 64 * 64 + 512 * 130, 63 * 65 + 10
    num_scales = 300 + 16 + 260
    assert 63 * 65 < 4096 <= 64 * 64
    assert num_bytes(optimizer) == 2 * large + 2 * 4 * num_scales + 8 * small + 2 * 4 * 256


def ready(name: PlannedOptimizer) -> tuple[Parameters, Optimizer]:
    """An optimizer that has made its first step."""
    model = Parameters()
    optimizer = planned_optimizer(model, name, "cuda")
    optimizer.step()
    return model, optimizer


def recorded_peak(name: PlannedOptimizer) -> int:
    model, optimizer = ready(name)
    recorder = StorageRecorder("cuda")
    recorder.assign("adapters", model.parameters())
    recorder.assign("gradients", (p.grad for p in model.parameters() if p.grad is not None))
    for state in optimizer.state.values():
        recorder.assign("optimizer", (v for v in state.values() if isinstance(v, Tensor)))
    recorder.phase = "optimizer"
    with recorder:
        optimizer.step()
        events = recorder.finish()
    return max(itertools.accumulate(e.nbytes for e in events))


def profiled_peak(name: PlannedOptimizer) -> int:
    model, optimizer = ready(name)
    meter = PeakMeter(torch.device("cpu"), model, optimizer)
    with meter.watch():
        optimizer.step()
    assert meter.peak_bytes is not None
    return meter.peak_bytes


NUM_WEIGHTS = sum(math.prod(shape) for shape in SHAPES)


@pytest.mark.parametrize(
    "name, floats",
    [
        ("adamw", 4 * NUM_WEIGHTS),
        ("adamw_foreach", 5 * NUM_WEIGHTS),
        ("adamw_loop", 4 * NUM_WEIGHTS + 2 * 300 * 256),
        ("sgd", 3 * NUM_WEIGHTS),
    ],
)
def test_temporaries_of_a_step(name: PlannedOptimizer, floats: int) -> None:
    """Weights, gradients and states, and what a step needs beside them.

    foreach takes the root of all second moments at once, the loop that of one after the other
    and divides it into a copy; SGD's foreach adds decay to a copy of all gradients.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        faked = recorded_peak(name)
    assert faked == recorded_peak(name) == pytest.approx(4 * floats, rel=0.001)
    assert faked == pytest.approx(profiled_peak(name), rel=0.01)


def test_8bit_steps_allocate_nothing() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        _, optimizer = ready("adamw_8bit")
        resident = num_bytes(optimizer) + 2 * 4 * NUM_WEIGHTS
        assert recorded_peak("adamw_8bit") == resident


@pytest.mark.parametrize(
    "name", ["adamw", "adamw_foreach", "adamw_loop", "adamw_8bit", "adafactor", "sgd"]
)
def test_every_parameter_is_in_one_group_with_decay(name: PlannedOptimizer) -> None:
    model = Parameters()
    optimizer = planned_optimizer(model, name, "cuda")
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert len(grouped) == len(SHAPES)
    assert all(group["weight_decay"] == 0.01 for group in optimizer.param_groups)


def test_sgd_takes_its_default_on_the_device_of_the_step() -> None:
    on = {
        device: planned_optimizer(Parameters(), "sgd", device).param_groups[0]["foreach"]
        for device in ("cpu", "cuda")
    }
    assert on == {"cpu": None, "cuda": True}
