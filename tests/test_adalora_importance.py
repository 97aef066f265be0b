"""The importance of triplets, against its formulas in loops over double precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from adalora_oracle import Array, Factors, Scores
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adalora_budget import INIT_R, adapted, put, random_steps, shapes
from torch import Tensor

from rsauto.adalora.importance import SCORED, Factor, Importance, Score

property_test = settings(max_examples=60, deadline=None, derandomize=True)

BETAS = st.floats(0.05, 0.95)


@st.composite
def streams(draw: st.DrawFn) -> list[tuple[Factors, Factors]]:
    """Factors and gradients of one module at every step, of magnitudes far apart, some zero."""
    r, d_in, d_out = (draw(st.integers(least, 5)) for least in (0, 1, 1))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    scale = 10.0 ** draw(st.integers(-6, 6))
    sizes = {"E": (r, 1), "A": (r, d_in), "B": (d_out, r)}

    def values(scale: float) -> Factors:
        def one(shape: tuple[int, int]) -> Array:
            return (scale * rng.normal(size=shape) * (rng.random(shape) > 0.2)).astype(np.float32)

        return {name: one(shape).astype(float) for name, shape in sizes.items()}

    return [(values(1.0), values(scale)) for _ in range(draw(st.integers(1, 6)))]


def tensors(factors: Factors, names: Sequence[Factor], dtype: torch.dtype) -> dict[Factor, Tensor]:
    return {name: torch.from_numpy(factors[name]).to(dtype) for name in names}


def assert_same(importance: Importance, scores: Scores) -> None:
    """State and scores, as exactly as single precision goes."""
    for ours, theirs in (
        (importance.sensitivity, scores.sensitivity),
        (importance.uncertainty, scores.uncertainty),
    ):
        assert set(ours) == set(theirs)
        for name, tensor in ours.items():
            assert tensor.dtype == torch.float32
            largest = abs(theirs[name]).max(initial=0.0)
            np.testing.assert_allclose(tensor, theirs[name], rtol=2e-5, atol=1e-6 * largest)
    r = len(scores.sensitivity["E"])
    expected = np.array([scores.of_triplet(i) for i in range(r)])
    largest = expected.max(initial=0.0)
    np.testing.assert_allclose(importance.of_triplets(), expected, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("score", ["full", "lambda"])
@property_test
@given(streams(), BETAS, BETAS)
def test_importance_is_the_papers_at_every_step(
    score: Score, stream: list[tuple[Factors, Factors]], beta1: float, beta2: float
) -> None:
    importance = Importance()
    scores = Scores(stream[0][0], SCORED[score])
    for factors, gradients in stream:
        importance.update(
            tensors(factors, SCORED[score], torch.float32),
            tensors(gradients, SCORED[score], torch.float32),
            beta1,
            beta2,
        )
        scores.update(factors, gradients, beta1, beta2)
        assert_same(importance, scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@property_test
@given(streams())
def test_factors_of_half_precision_are_followed_in_single(
    dtype: torch.dtype, stream: list[tuple[Factors, Factors]]
) -> None:
    """The oracle is given what half precision made of the numbers, and no more is lost."""
    importance = Importance()
    scores = Scores(stream[0][0])
    for step in stream:
        factors, gradients = (tensors(one, SCORED["full"], dtype) for one in step)
        if not all(gradient.isfinite().all() for gradient in gradients.values()):
            continue
        importance.update(factors, gradients, 0.85, 0.85)
        exact = [{n: t.double().numpy() for n, t in one.items()} for one in (factors, gradients)]
        scores.update(exact[0], exact[1], 0.85, 0.85)
    if importance.sensitivity:
        assert_same(importance, scores)


@property_test
@given(streams(), st.data())
def test_what_is_kept_goes_on_as_if_it_had_been_alone(
    stream: list[tuple[Factors, Factors]], data: st.DataObject
) -> None:
    r = len(stream[0][0]["E"])
    mask = data.draw(st.lists(st.booleans(), min_size=r, max_size=r))
    index = [i for i in range(r) if mask[i]]

    def kept(factors: Factors) -> Factors:
        return {n: a[:, index] if n == "B" else a[index] for n, a in factors.items()}

    importance = Importance()
    scores = Scores(kept(stream[0][0]))
    for number, step in enumerate(stream):
        parts = [kept(one) for one in step]
        shown = parts if number > 0 else step
        factors, gradients = (tensors(one, SCORED["full"], torch.float32) for one in shown)
        importance.update(factors, gradients, 0.85, 0.7)
        scores.update(parts[0], parts[1], 0.85, 0.7)
        if number == 0:
            importance.keep(torch.tensor(index, dtype=torch.long))
        assert_same(importance, scores)


def test_two_steps_by_hand() -> None:
    """One triplet of lambda 3, Q (1, 2), P (-1, 0)^T, betas one half.

    w g is 6, (4, -2) and (-5, 0), then zero. I: 3, then 1.5 for lambda, likewise halved for all.
    U: |6 - 3| / 2 = 1.5, then (1.5 + |0 - 1.5|) / 2 = 1.5. So of an entry with w g = x, I U is
    |x|/2 |x|/4 after one step and |x|/4 |x|/4 after two.
    """
    weights = {"E": [[3.0]], "A": [[1.0, 2.0]], "B": [[-1.0], [0.0]]}
    gradients = {"E": [[2.0]], "A": [[4.0, -1.0]], "B": [[5.0], [9.0]]}
    factors = {name: torch.tensor(value) for name, value in weights.items()}
    importance = Importance()
    importance.update(factors, {n: torch.tensor(v) for n, v in gradients.items()}, 0.5, 0.5)
    assert importance.of_triplets().tolist() == [36 / 8 + (16 + 4) / 8 / 2 + 25 / 8 / 2]
    importance.update(factors, {n: torch.zeros_like(w) for n, w in factors.items()}, 0.5, 0.5)
    assert importance.of_triplets().tolist() == [36 / 16 + (16 + 4) / 16 / 2 + 25 / 16 / 2]


@pytest.mark.parametrize("score", ["full", "lambda"])
def test_lambda_alone_keeps_eight_bytes_a_triplet(score: Score) -> None:
    """Two numbers of four bytes: for each entry of P, lambda and Q, or for each lambda."""
    model = adapted(score=score)
    allocator = model.base_model.allocator()
    assert list(allocator.tensors()) == []
    put(model, random_steps(1)[0], [range(INIT_R)] * 3)
    allocator.update_and_allocate(1)
    entries = sum(b * r for module in shapes() for b, r in module.values())
    triplets = INIT_R * len(shapes())
    expected = 8 * (entries if score == "full" else triplets)
    assert sum(t.numel() * t.element_size() for t in allocator.tensors()) == expected
    assert entries == sum(p.numel() for _, p in allocator.factors())


def test_the_optimizers_weights_and_gradients_are_left_alone() -> None:
    weight, gradient = torch.randn(3, 2), torch.randn(3, 2)
    before = weight.clone(), gradient.clone()
    Importance().update({"A": weight}, {"A": gradient}, 0.85, 0.85)
    assert torch.equal(weight, before[0]) and torch.equal(gradient, before[1])


def test_signed_sums_over_a_triplet_agree_which_lambda_alone_relies_on() -> None:
    """Of w dL/dw over a row of Q, a column of P, and for its lambda, in double precision."""
    model = adapted().double()
    model(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
    for layer in model.base_model.allocator().layers.values():
        moved = {n: p.detach() * p.grad for n, p in layer.factors("default").items()}
        torch.testing.assert_close(moved["A"].sum(1), moved["E"][:, 0])
        torch.testing.assert_close(moved["B"].sum(0), moved["E"][:, 0])
        assert moved["E"].abs().min() > 0
