"""Orders are complete, repeatable and the same everywhere."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsauto.data import batch_plan, micro_batches
from rsauto.data.order import shuffled


def test_order_is_the_same_on_every_machine() -> None:
    # Recompute by hand: sort 0..5 by six calls of random.Random(7).random().
    assert shuffled(6, random.Random(7)) == [3, 1, 0, 5, 4, 2]
    assert batch_plan(4, 3, 4, seed=1) == [(0, 3, 2), (1, 1, 0), (2, 3, 1), (0, 3, 2)]


def test_one_epoch_shows_every_example_once() -> None:
    plan = batch_plan(num_examples=12, batch_size=4, steps=3, seed=0)
    assert sorted(index for batch in plan for index in batch) == list(range(12))
    second = batch_plan(num_examples=12, batch_size=4, steps=6, seed=0)[3:]
    assert sorted(index for batch in second for index in batch) == list(range(12))
    assert second != plan


@given(
    st.integers(1, 40), st.integers(1, 17), st.integers(0, 30), st.integers(0, 2**31)
)  # fmt: skip
def test_plans_are_full_fair_and_prefixes_of_longer_ones(
    num_examples: int, batch_size: int, steps: int, seed: int
) -> None:
    plan = batch_plan(num_examples, batch_size, steps, seed)
    assert [len(batch) for batch in plan] == [batch_size] * steps
    seen = Counter(index for batch in plan for index in batch)
    counts = [seen[index] for index in range(num_examples)]
    assert max(counts) - min(counts) <= 1
    assert set(seen) <= set(range(num_examples))
    assert batch_plan(num_examples, batch_size, steps + 2, seed)[:steps] == plan


def test_seed_changes_the_plan() -> None:
    assert batch_plan(50, 10, 5, seed=0) != batch_plan(50, 10, 5, seed=1)


@pytest.mark.parametrize("bad", [(0, 1, 1), (1, 0, 1), (1, 1, -1)])
def test_impossible_plans_are_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="num_examples="):
        batch_plan(*bad, seed=0)


def test_micro_batches_keep_order_and_lose_nothing() -> None:
    assert micro_batches((5, 3, 8, 1, 9), 2) == [(5, 3), (8, 1), (9,)]
    assert micro_batches((5, 3), 4) == [(5, 3)]
    with pytest.raises(ValueError, match="micro_batch_size"):
        micro_batches((5, 3), 0)
