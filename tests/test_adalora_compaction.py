"""Giving triplets back: what is left trains on as if it had always been alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_adalora_budget import adapted
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from transformers.optimization import Adafactor

WIDTHS = (8, 4, 8, 4)
"""The second layer's Q and the first and last's P are square at the initial rank."""
INIT_R = 4
COMPACTED_AT = 3
RANK_DIM = {"A": 0, "E": 0, "B": 1}

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "fused adamw": lambda p: AdamW(p, lr=0.01, fused=True),
    "adamw": lambda p: AdamW(p, lr=0.01, fused=False, foreach=False),
    "adamw of many at once": lambda p: AdamW(p, lr=0.01, foreach=True, amsgrad=True),
    "sgd": lambda p: SGD(p, lr=0.01, momentum=0.9),
    "adafactor": lambda p: Adafactor(p, lr=0.01, scale_parameter=False, relative_step=False),
    "adafactor with momentum": lambda p: Adafactor(
        p, lr=0.01, scale_parameter=True, relative_step=False, beta1=0.9
    ),
}


class HandMade(nn.Module):
    """The chain with triplets of any number, written out: W x + b + gamma P diag(lambda) Q x."""

    def __init__(self, model: PeftModel, factors: list[dict[str, Tensor]]) -> None:
        super().__init__()
        layers = model.base_model.allocator().layers.values()
        self.bases = [copy.deepcopy(layer.get_base_layer()) for layer in layers]
        self.gammas = [float(layer.scaling["default"]) for layer in layers]
        self.factors = nn.ModuleList(
            nn.ParameterDict({name: nn.Parameter(t) for name, t in one.items()}) for one in factors
        )

    def forward(self, x: Tensor) -> Tensor:
        for base, gamma, one in zip(self.bases, self.gammas, self.factors, strict=True):
            hidden = (x @ one["A"].T) * one["E"].T
            x = torch.tanh(base(x) + gamma * hidden @ one["B"].T)
        return x


def loss_of(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(6, n, generator=generator) for n in (WIDTHS[0], WIDTHS[-1]))
    return (model(x) - y).square().mean()


def factors_of(model: PeftModel) -> list[dict[str, nn.Parameter]]:
    layers = model.base_model.allocator().layers.values()
    return [{str(n): p for n, p in layer.factors("default").items()} for layer in layers]


def copies(factors: list[dict[str, nn.Parameter]]) -> list[dict[str, Tensor]]:
    return [{name: p.detach().clone() for name, p in one.items()} for one in factors]


def before_compaction(optimizer: MakeOptimizer, **changes: Any) -> tuple[PeftModel, Optimizer]:
    """Trained until the first allocation is due: stepped, with the gradients of that step."""
    values = {"deltaT": COMPACTED_AT, "tfinal": 4, "total_step": 12, "lora_alpha": 2}
    model = adapted(WIDTHS, recovery="none", **{**values, **changes})
    for one in factors_of(model):
        for name, parameter in one.items():
            # So that what is kept is not what comes first.
            parameter.data.copy_(parameter.data.roll(2, RANK_DIM[name]))
    stepper = optimizer([p for one in factors_of(model) for p in one.values()])
    for step in range(1, COMPACTED_AT + 1):
        stepper.zero_grad()
        loss_of(model, step).backward()
        stepper.step()
        if step < COMPACTED_AT:
            model.base_model.update_and_allocate(step, stepper)
    return model, stepper


def kept_triplets(before: Tensor, after: Tensor) -> list[int]:
    """Which rows of Q are still there."""
    return [i for i, row in enumerate(before) if any(torch.equal(row, other) for other in after)]


def part(tensor: Tensor, dim: int, index: list[int]) -> Tensor:
    """Picked entry by entry."""
    picked = [tensor[i] if dim == 0 else tensor[:, i] for i in index]
    return torch.stack(picked, dim).clone()


def part_of_state(key: str, value: Any, parameter: Tensor, dim: int, index: list[int]) -> Any:
    """By what the optimizer means by it: a number a row, a number a column, one an entry."""
    if key == "exp_avg_sq_row":
        return part(value, 0, index) if dim == 0 else value.clone()
    if key == "exp_avg_sq_col":
        return part(value, 0, index) if dim == 1 else value.clone()
    if isinstance(value, Tensor) and value.ndim == 2:
        assert value.shape == parameter.shape
        return part(value, dim, index)
    return copy.deepcopy(value)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_step_after_is_that_of_a_smaller_model_built_by_hand(optimizer: str) -> None:
    make = OPTIMIZERS[optimizer]
    model, stepper = before_compaction(make)
    parameters = factors_of(model)
    values = copies(parameters)
    states = [
        {name: copy.deepcopy(dict(stepper.state[p])) for name, p in one.items()}
        for one in parameters
    ]
    alive = loss_of(model, COMPACTED_AT)
    model.base_model.update_and_allocate(COMPACTED_AT, stepper)
    assert alive.requires_grad

    after = factors_of(model)
    kept = [kept_triplets(v["A"], a["A"].detach()) for v, a in zip(values, after, strict=True)]
    assert [len(index) for index in kept] == list(model.base_model.rank_pattern().values())
    assert kept == [[0, 2, 3], [0, 2, 3], [2]]

    small = HandMade(
        model,
        [
            {name: part(value, RANK_DIM[name], index) for name, value in one.items()}
            for one, index in zip(values, kept, strict=True)
        ],
    )
    small_stepper = make(list(small.factors.parameters()))
    for m, index in enumerate(kept):
        for name, parameter in after[m].items():
            assert parameter is parameters[m][name]
            state = {
                key: part_of_state(key, value, values[m][name], RANK_DIM[name], index)
                for key, value in states[m][name].items()
            }
            assert_same_state(stepper.state[parameter], state)
            small_stepper.state[small.factors[m][name]] = state

    for seed in (10, 11):
        for one, one_stepper in ((model, stepper), (small, small_stepper)):
            one_stepper.zero_grad()
            loss_of(one, seed).backward()
            one_stepper.step()
        for m, one in enumerate(after):
            for name, parameter in one.items():
                torch.testing.assert_close(parameter, small.factors[m][name], rtol=1e-6, atol=1e-6)
    assert not torch.equal(after[0]["A"].detach(), part(values[0]["A"], 0, kept[0]))


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected) and expected
    for key, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


def test_gradients_are_those_of_the_triplets_that_are_left() -> None:
    model, stepper = before_compaction(OPTIMIZERS["adamw"])
    parameters = factors_of(model)
    values = copies(parameters)
    gradients = [
        {n: p.grad.clone() for n, p in o.items() if p.grad is not None} for o in parameters
    ]
    model.base_model.update_and_allocate(COMPACTED_AT, stepper)
    for value, gradient, one in zip(values, gradients, parameters, strict=True):
        index = kept_triplets(value["A"], one["A"].detach())
        for name, parameter in one.items():
            assert torch.equal(parameter.grad, part(gradient[name], RANK_DIM[name], index))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_modules_without_triplets_train_on(optimizer: str) -> None:
    """One of no importance loses all at the first allocation; two more allocations follow."""
    model, stepper = before_compaction(OPTIMIZERS[optimizer], target_r=1, orth_reg_weight=0.1)
    layers = list(model.base_model.allocator().layers.values())
    first, *others = factors_of(model)
    for parameter in first.values():
        parameter.data.mul_(1e-12)
    for tensor in layers[0].triplets["default"].importance.tensors():
        tensor.zero_()
    model.base_model.update_and_allocate(COMPACTED_AT, stepper)
    assert layers[0].r["default"] == 0
    assert {n: tuple(p.shape) for n, p in first.items()} == {"E": (0, 1), "A": (0, 8), "B": (4, 0)}
    for step in range(COMPACTED_AT + 1, 11):
        before = copies(others)
        stepper.zero_grad()
        loss_of(model, step).backward()
        stepper.step()
        for one, old in zip(others, before, strict=True):
            for name, parameter in one.items():
                assert parameter.isfinite().all()
                assert parameter.numel() == 0 or not torch.equal(parameter, old[name])
        model.base_model.update_and_allocate(step, stepper)
    assert sum(model.base_model.rank_pattern().values()) == 3
    assert model.base_model.allocator().finished


def test_several_compactions_free_what_they_promise() -> None:
    """Factors, gradients and both moments, in bytes, as the budget falls step by step."""
    model, stepper = before_compaction(OPTIMIZERS["fused adamw"], deltaT=1, tfinal=2)
    for step in range(COMPACTED_AT, 13):
        model.base_model.update_and_allocate(step, stepper)
        ranks = list(model.base_model.rank_pattern().values())
        expected = sum(r * (1 + a + b) for r, a, b in zip(ranks, WIDTHS, WIDTHS[1:], strict=False))
        parameters = [p for one in factors_of(model) for p in one.values()]
        moments = [stepper.state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq")]
        assert sum(p.numel() for p in parameters) == expected
        assert sum(m.numel() for m in moments) == 2 * expected
        # What is kept must not hold the whole that it was cut from.
        assert all(
            t.untyped_storage().nbytes() == t.numel() * t.element_size()
            for t in [*parameters, *moments]
        )
        stepper.zero_grad()
        loss_of(model, step).backward()
        stepper.step()
    assert ranks and sum(ranks) == 6


def everything(model: PeftModel, stepper: Optimizer | None) -> list[Any]:
    """Values, gradients, masks and the optimizer's state."""
    parameters = [p for one in factors_of(model) for p in one.values()]
    layers = model.base_model.allocator().layers.values()
    states = [] if stepper is None else [dict(stepper.state[p]) for p in parameters]
    return [
        *(p.detach() for p in parameters),
        *(p.grad for p in parameters),
        *(layer.triplets["default"].mask for layer in layers),
        *(value for state in states for value in state.values() if isinstance(value, Tensor)),
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("state1", torch.zeros(4, 4, dtype=torch.uint8)),
        ("absmax1", torch.zeros(1)),
        ("momentum_buffer", torch.zeros(16)),
    ],
    ids=["eight bits an entry", "a number a block", "flat"],
)
def test_a_state_of_unknown_shape_is_refused_before_anything_changes(
    key: str, value: Tensor
) -> None:
    """It is the last of all factors that has it, so that others would have been made smaller."""
    model, stepper = before_compaction(OPTIMIZERS["adamw"])
    stepper.state[factors_of(model)[-1]["B"]][key] = value
    before = [t.clone() for t in everything(model, stepper)]
    with pytest.raises(ValueError, match=rf"recovery: none.*'{key}' of AdamW.*recovery: paper"):
        model.base_model.update_and_allocate(COMPACTED_AT, stepper)
    after = everything(model, stepper)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_missing_optimizer_is_refused_before_anything_changes() -> None:
    model, _ = before_compaction(OPTIMIZERS["adamw"])
    before = [t.clone() for t in everything(model, None)]
    with pytest.raises(ValueError, match=r"update_and_allocate\(step, optimizer\).*paper"):
        model.base_model.update_and_allocate(COMPACTED_AT)
    after = everything(model, None)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
