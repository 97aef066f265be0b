"""The regulariser: its gradient, and where it goes, which is into the training step alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from test_adalora_budget import adapted
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from transformers import LlamaForCausalLM

from rsauto.adalora import RsAdaLoraConfig
from rsauto.adalora.orthogonality import (
    OrthForm,
    add_gradients,
    orthogonality,
    orthogonality_gradient,
)

property_test = settings(max_examples=60, deadline=None, derandomize=True)
FORMS: list[OrthForm] = ["norm", "squared"]

# ------------------------------------------------------------------------- one factor


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank_dim", [0, 1])
@property_test
@given(r=st.integers(1, 6), d=st.integers(1, 6), seed=st.integers(0, 9999))
def test_the_closed_form_is_what_autograd_finds(
    form: OrthForm, rank_dim: int, r: int, d: int, seed: int
) -> None:
    """Also with more triplets than dimensions, where they cannot be orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    shape = (r, d) if rank_dim == 0 else (d, r)
    factor = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    (expected,) = torch.autograd.grad(orthogonality(factor, rank_dim, form), factor)
    before = factor.detach().clone()
    found = orthogonality_gradient(factor.detach(), rank_dim, form)
    torch.testing.assert_close(found, expected)
    assert torch.equal(factor, before)

    q = before.numpy() if rank_dim == 0 else before.numpy().T
    total = sum((float(q[i] @ q[j]) - (i == j)) ** 2 for i in range(len(q)) for j in range(len(q)))
    by_hand = total if form == "squared" else total**0.5
    assert orthogonality(factor, rank_dim, form).item() == pytest.approx(by_hand, rel=1e-9)


def test_two_by_two_by_hand() -> None:
    """Q = [[2, 0], [1, 1]]: Q Q^T - I = [[3, 2], [2, 1]], of squares 9 + 4 + 4 + 1 = 18.

    4 M Q = 4 [[6 + 2, 2], [4 + 1, 1]]; the norm's is that over 2 sqrt(18). P = [[2, 1], [0, 1]]
    is its transpose, so P^T P is the same.
    """
    q = torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    squared = torch.tensor([[32.0, 8.0], [20.0, 4.0]], dtype=torch.float64)
    norm = squared / (2 * 18**0.5)
    assert orthogonality(q, 0, "squared") == pytest.approx(18)
    for rank_dim, factor, of_q in ((0, q, lambda x: x), (1, q.T.contiguous(), lambda x: x.T)):
        torch.testing.assert_close(
            orthogonality_gradient(factor, rank_dim, "squared"), of_q(squared)
        )
        torch.testing.assert_close(orthogonality_gradient(factor, rank_dim, "norm"), of_q(norm))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank_dim", [0, 1])
def test_an_orthonormal_factor_has_a_gradient_of_zero(form: OrthForm, rank_dim: int) -> None:
    rows = torch.eye(5)[[3, 0, 1]]
    factor = rows if rank_dim == 0 else rows.T.contiguous()
    assert orthogonality(factor, rank_dim, form) == 0
    assert torch.equal(orthogonality_gradient(factor, rank_dim, form), torch.zeros_like(factor))
    nearly = factor + 1e-30
    assert orthogonality_gradient(nearly, rank_dim, form).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss_scale", [None, torch.tensor(8.0)])
def test_exactly_share_times_the_gradient_is_added(form: OrthForm, loss_scale: Any) -> None:
    torch.manual_seed(0)
    q, p, untouched, empty = (
        nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5, 3), (3, 4), (0, 4))
    )
    q.grad, p.grad, empty.grad = torch.randn(3, 4), torch.randn(5, 3), torch.zeros(0, 4)
    before = q.grad.clone(), p.grad.clone()
    factors = [(q, 0), (p, 1), (untouched, 0), (empty, 0)]
    add_gradients(factors, share=0.25, form=form, loss_scale=loss_scale)
    scale = 0.25 if loss_scale is None else 2.0
    for factor, rank_dim, old in ((q, 0, before[0]), (p, 1, before[1])):
        gradient = orthogonality_gradient(factor.detach(), rank_dim, form)
        torch.testing.assert_close(factor.grad, old + scale * gradient, rtol=1e-6, atol=1e-6)
    assert untouched.grad is None


def test_half_precision_is_regularised_in_single() -> None:
    factor = nn.Parameter(torch.randn(4, 64).bfloat16())
    factor.grad = torch.zeros_like(factor)
    add_gradients([(factor, 0)], share=1.0, form="norm")
    exact = orthogonality_gradient(factor.detach().float(), 0, "norm")
    assert torch.equal(factor.grad, exact.bfloat16())


# ------------------------------------------------------------------------- the training step

WEIGHT = 0.3
NUM_STEPS = 3
OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01),
}


def factors_of(model: PeftModel) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def penalty(model: PeftModel, form: OrthForm) -> Tensor:
    """As equation 4 has it, and as its code: added to the loss, and left to autograd."""
    terms = []
    for name, factor in factors_of(model).items():
        if "lora_E" not in name:
            q = factor if "lora_A" in name else factor.T
            terms.append(((q @ q.T - torch.eye(len(q))) ** 2).sum())
    if form == "squared":
        return WEIGHT * torch.stack(terms).sum()
    return WEIGHT * torch.stack(terms).sqrt().mean()


def batches(num_micro: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(8, 4, generator=generator) for _ in range(2))
    return zip(x.chunk(num_micro), y.chunk(num_micro), strict=True)


def data_loss(model: PeftModel, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


@pytest.mark.parametrize("num_micro", [1, 4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_training_on_the_loss_and_the_penalty_once(
    optimizer: str, form: OrthForm, num_micro: int
) -> None:
    """Gradients at every step, and values after three, whatever the number of micro-batches."""
    ours = adapted(orth_reg_weight=WEIGHT, orth_reg_form=form, lora_alpha=1)
    theirs = adapted(orth_reg_weight=0.0, lora_alpha=1)
    steppers = [OPTIMIZERS[optimizer](model.parameters()) for model in (ours, theirs)]
    for _ in range(NUM_STEPS):
        for x, y in batches(num_micro):
            (data_loss(ours, x, y) / num_micro).backward()
        for x, y in batches(1):
            (data_loss(theirs, x, y) + penalty(theirs, form)).backward()
        for stepper in steppers:
            stepper.step()
        for one, other in zip(factors_of(ours).values(), factors_of(theirs).values(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
        for stepper in steppers:
            stepper.zero_grad()
    for name, one in factors_of(ours).items():
        torch.testing.assert_close(one, factors_of(theirs)[name], rtol=1e-4, atol=1e-5)


def gradients_after_a_step(model: PeftModel, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    for x, y in batches(1):
        data_loss(model, x, y).backward()
    SGD(parameters, lr=0.0).step()
    return [p.grad for p in factors_of(model).values()]


def test_a_weight_of_zero_adds_nothing() -> None:
    model = adapted(orth_reg_weight=0.0)
    found = gradients_after_a_step(model, list(model.parameters()))
    for x, y in batches(1):
        expected = torch.autograd.grad(data_loss(model, x, y), list(factors_of(model).values()))
    for one, other in zip(found, expected, strict=True):
        assert one is not None and torch.equal(one, other)


def test_only_factors_that_the_optimizer_steps_are_regularised() -> None:
    model = adapted(orth_reg_weight=WEIGHT)
    stepped = [p for name, p in factors_of(model).items() if "layers.1.lora_A" in name]
    assert len(stepped) == 1
    found = gradients_after_a_step(model, stepped)
    plain = gradients_after_a_step(adapted(orth_reg_weight=0.0), stepped)
    for parameter, one, other in zip(factors_of(model).values(), found, plain, strict=True):
        assert one is not None and other is not None
        assert torch.equal(one, other) == (parameter is not stepped[0])


def test_optimizers_of_other_models_are_left_alone() -> None:
    model = adapted(orth_reg_weight=WEIGHT)
    other = nn.Linear(2, 2)
    for x, y in batches(1):
        data_loss(model, x, y).backward()
    before = [p.grad.clone() for p in factors_of(model).values() if p.grad is not None]
    other(torch.ones(1, 2)).sum().backward()
    SGD(other.parameters(), lr=0.1).step()
    after = [p.grad for p in factors_of(model).values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True) if a is not None)


def test_a_copy_of_a_model_is_regularised_as_well() -> None:
    model = adapted(orth_reg_weight=WEIGHT)
    copied = copy.deepcopy(model)
    of_copy = gradients_after_a_step(copied, list(copied.parameters()))
    for one, other in zip(
        gradients_after_a_step(model, list(model.parameters())), of_copy, strict=True
    ):
        assert one is not None and other is not None and torch.equal(one, other)


def test_a_step_with_a_closure_is_regularised_as_well() -> None:
    """The closure empties the gradients and finds them anew, inside of the step."""
    model = adapted(orth_reg_weight=WEIGHT)
    optimizer = SGD(model.parameters(), lr=0.0)
    ((x, y),) = batches(1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = data_loss(model, x, y)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    same = adapted(orth_reg_weight=WEIGHT)
    expected = gradients_after_a_step(same, list(same.parameters()))
    for parameter, other in zip(factors_of(model).values(), expected, strict=True):
        assert other is not None
        torch.testing.assert_close(parameter.grad, other)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled_before", [False, True])
def test_loss_scaling_does_not_scale_the_penalty(fused: bool, unscaled_before: bool) -> None:
    """A fused optimizer divides by the scale itself, others are handed unscaled gradients."""
    scaled, plain = (adapted(orth_reg_weight=WEIGHT) for _ in range(2))
    optimizer = SGD(scaled.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in batches(1):
        scaler.scale(data_loss(scaled, x, y)).backward()
        data_loss(plain, x, y).backward()
    if unscaled_before:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    SGD(plain.parameters(), lr=0.1).step()
    for one, other in zip(factors_of(scaled).values(), factors_of(plain).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------- what is reported


@pytest.mark.parametrize("train", [True, False])
def test_every_loss_a_model_returns_is_cross_entropy_alone(
    llama: LlamaForCausalLM, train: bool
) -> None:
    config = RsAdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_r=6, target_r=4,
        total_step=10, orth_reg_weight=5.0,
    )  # fmt: skip
    model = get_peft_model(llama, config).train(train)
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    optimizer = SGD(model.parameters(), lr=0.1)
    for step in range(1, 4):
        output = model(input_ids=tokens, labels=tokens)
        expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        torch.testing.assert_close(output.loss, expected)
        output.loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    with torch.no_grad():
        assert penalty(model, "norm") > 0.1 * WEIGHT
