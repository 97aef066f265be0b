"""Which triplets are active: exactly as many as the budget, and those that the paper would keep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from adalora_oracle import Array, Factors, Outcome, Rules, Step, allocation, best
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rsauto.adalora import RsAdaLoraConfig
from rsauto.adalora.budget import BudgetSchedule, keep_best

property_test = settings(max_examples=60, deadline=None, derandomize=True)

# ------------------------------------------------------------------------- choosing

LARGEST = torch.finfo(torch.float32).max
VALUES = st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, -1.0, LARGEST, math.nan, math.inf, -math.inf])
TRIPLETS = st.lists(st.lists(st.tuples(VALUES, st.booleans()), max_size=5), max_size=5)


@st.composite
def choices(draw: st.DrawFn) -> tuple[list[list[float]], list[list[bool]], int]:
    modules = draw(TRIPLETS)
    total = sum(map(len, modules))
    budget = draw(st.one_of(st.integers(0, total), st.sampled_from([0, total])))
    scores = [[value for value, _ in one] for one in modules]
    return scores, [[active for _, active in one] for one in modules], budget


def kept(scores: list[list[float]], active: list[list[bool]], budget: int) -> list[list[bool]]:
    masks = keep_best(
        [torch.tensor(s, dtype=torch.float32) for s in scores],
        [torch.tensor(a, dtype=torch.bool) for a in active],
        budget,
    )
    assert all(mask.dtype == torch.bool for mask in masks)
    return [mask.tolist() for mask in masks]


@property_test
@given(choices())
def test_exactly_the_budget_is_kept_and_it_is_the_best(
    choice: tuple[list[list[float]], list[list[bool]], int],
) -> None:
    scores, active, budget = choice
    masks = kept(scores, active, budget)
    assert [len(m) for m in masks] == [len(s) for s in scores]
    assert sum(map(sum, masks)) == budget
    assert masks == best(scores, active, budget)

    flat = [
        (-math.inf if math.isnan(value) else value, is_kept)
        for values, mask in zip(scores, masks, strict=True)
        for value, is_kept in zip(values, mask, strict=True)
    ]
    lowest = min((value for value, is_kept in flat if is_kept), default=math.inf)
    highest = max((value for value, is_kept in flat if not is_kept), default=-math.inf)
    assert lowest >= highest


@property_test
@given(choices())
def test_a_budget_one_larger_keeps_one_more(
    choice: tuple[list[list[float]], list[list[bool]], int],
) -> None:
    """So that a falling budget only ever takes triplets away, scores being equal."""
    scores, active, budget = choice
    fewer, more = (
        np.array(list(itertools.chain(*kept(scores, active, some))), dtype=bool)
        for some in (max(0, budget - 1), budget)
    )
    assert not (fewer & ~more).any()
    assert (more & ~fewer).sum() == min(budget, 1)


def test_a_tie_goes_to_the_active_then_evenly_over_the_modules() -> None:
    tied = [[0.0] * 3, [0.0] * 3, [0.0] * 3]
    assert kept(tied, [[True] * 3] * 3, 4) == [[1, 1, 0], [1, 0, 0], [1, 0, 0]]
    masked = [[False, True, False], [False] * 3, [True] * 3]
    assert kept(tied, masked, 5) == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("budget", [-1, 4])
def test_a_budget_that_cannot_be_met_is_refused(budget: int) -> None:
    with pytest.raises(ValueError, match="between 0 and 3"):
        kept([[1.0, 2.0], [3.0]], [[True, True], [True]], budget)


def test_no_modules_and_no_triplets() -> None:
    assert kept([], [], 0) == []
    assert kept([[], []], [[], []], 0) == [[], []]


# ------------------------------------------------------------------------- the schedule


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    total_step = draw(st.integers(1, 60))
    tfinal = draw(st.integers(0, total_step - 1))
    target = draw(st.integers(1, 200))
    return Rules(
        initial=target + draw(st.integers(0, 400)),
        target=target,
        tinit=draw(st.integers(0, total_step - tfinal - 1)),
        tfinal=tfinal,
        total_step=total_step,
        delta_t=draw(st.integers(1, 12)),
    )


def schedule_of(rules: Rules) -> BudgetSchedule:
    return BudgetSchedule(
        initial=rules.initial,
        target=rules.target,
        tinit=rules.tinit,
        tfinal=rules.tfinal,
        total_step=rules.total_step,
        delta_t=rules.delta_t,
    )


@property_test
@given(rules())
def test_the_budget_falls_along_the_cubic_of_the_paper(rules: Rules) -> None:
    schedule = schedule_of(rules)
    steps = range(1, rules.total_step + 3)
    budgets = [schedule.budget(step) for step in steps]
    assert budgets == [rules.budget(step) for step in steps]
    assert all(before >= after for before, after in itertools.pairwise(budgets))
    assert all(schedule.budget(t) == rules.initial for t in range(1, rules.tinit + 1))
    assert all(schedule.budget(t) == rules.target for t in steps if t >= schedule.final_step)
    assert schedule.final_step == rules.total_step - rules.tfinal


@property_test
@given(rules())
def test_triplets_are_chosen_every_delta_t_and_always_at_the_final_step(rules: Rules) -> None:
    schedule = schedule_of(rules)
    for step in range(1, rules.total_step + 3):
        assert schedule.allocates(step) == rules.allocates(step), step
    assert schedule.allocates(schedule.final_step)


def test_a_budget_that_is_whole_in_the_formula_is_not_rounded_down() -> None:
    """4 + 125 (1 - t/5)^3, whose cubes are 64, 27, 8 and 1."""
    schedule = BudgetSchedule(initial=129, target=4, tinit=0, tfinal=0, total_step=5)
    assert [schedule.budget(step) for step in range(6)] == [129, 68, 31, 12, 5, 4]


# ------------------------------------------------------------------------- a whole allocation

WIDTHS = (4, 8, 4, 4)
INIT_R = 4


class Chain(nn.Module):
    """Linear layers of the given widths, one after another."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def adapted(widths: Sequence[int] = WIDTHS, **changes: Any) -> PeftModel:
    """A chain with AdaLoRA on every layer, at random as if it had been trained."""
    torch.manual_seed(0)
    values = {"init_r": INIT_R, "target_r": 2, "total_step": 12, "orth_reg_weight": 0.0}
    config = RsAdaLoraConfig(
        target_modules=r".*layers\.\d+", init_lora_weights=False, **{**values, **changes}
    )
    return get_peft_model(Chain(widths), config)


def rules_of(config: RsAdaLoraConfig, num_modules: int) -> Rules:
    assert config.total_step is not None
    return Rules(
        initial=config.init_r * num_modules,
        target=config.target_r * num_modules,
        tinit=config.tinit,
        tfinal=config.tfinal,
        total_step=config.total_step,
        delta_t=config.deltaT,
        beta1=config.beta1,
        beta2=config.beta2,
        score=config.score,
        recovery=config.recovery,
    )


def shapes(widths: Sequence[int] = WIDTHS, r: int = INIT_R) -> list[dict[str, tuple[int, int]]]:
    return [{"E": (r, 1), "A": (r, a), "B": (b, r)} for a, b in itertools.pairwise(widths)]


def random_steps(num_steps: int, seed: int = 0) -> list[Step]:
    rng = np.random.default_rng(seed)

    def draw(scale: float) -> list[Factors]:
        return [{n: scale * rng.normal(size=s) for n, s in one.items()} for one in shapes()]

    return [rounded((draw(1.0), draw(10.0 ** rng.integers(-3, 3)))) for _ in range(num_steps)]


def rounded(step: Step) -> Step:
    """To what single precision holds, so that both sides begin with the same numbers."""

    def single(factors: Sequence[Factors]) -> list[Factors]:
        return [{n: a.astype(np.float32).astype(float) for n, a in one.items()} for one in factors]

    return single(step[0]), single(step[1])


def tied_steps(num_steps: int, seed: int = 0) -> list[Step]:
    """Few small whole numbers, exact in single precision with betas of one half."""
    rng = np.random.default_rng(seed)

    def draw() -> list[Factors]:
        return [
            {n: np.repeat(rng.integers(-1, 2, s[:1]), s[1]).reshape(s).astype(float)
             if n != "B" else np.ones(s) for n, s in one.items()}
            for one in shapes()
        ]  # fmt: skip

    return [(draw(), draw()) for _ in range(num_steps)]


def zero_steps(num_steps: int) -> list[Step]:
    return [
        (factors, [{n: np.zeros_like(a) for n, a in one.items()} for one in gradients])
        for factors, gradients in random_steps(num_steps)
    ]


def not_finite_steps(num_steps: int) -> list[Step]:
    """One bad entry in one factor of one module, now and then."""
    steps = random_steps(num_steps, seed=1)
    bad = itertools.cycle([math.nan, math.inf, -math.inf])
    for t in range(1, num_steps, 3):
        gradients = steps[t][1]
        gradients[t % len(gradients)]["EAB"[t % 3]][0, 0] = next(bad)
    return steps


def huge_steps(num_steps: int) -> list[Step]:
    steps = random_steps(num_steps, seed=2)
    for t, (_, gradients) in enumerate(steps):
        for array in gradients[t % len(gradients)].values():
            array *= 2.0**40
    return steps


def alternating_steps(num_steps: int) -> list[Step]:
    """What was best becomes worst, so that masked triplets have to come back."""
    steps = random_steps(num_steps, seed=3)
    for t, (_, gradients) in enumerate(steps):
        for one in gradients:
            one["E"] *= np.array([[100.0, 100.0, 0.01, 0.01]]).T ** (1 if t % 4 < 2 else -1)
    return steps


STREAMS = {
    "random": random_steps,
    "ties": tied_steps,
    "zeros": zero_steps,
    "not finite": not_finite_steps,
    "huge": huge_steps,
    "alternating": alternating_steps,
}


def put(model: PeftModel, step: Step, left: Sequence[Sequence[int]]) -> None:
    """Sets values and gradients of the triplets that are left."""
    for layer, factors, gradients, index in zip(
        model.base_model.allocator().layers.values(), *step, left, strict=True
    ):
        for name, parameter in layer.factors("default").items():
            parameter.data.copy_(torch.from_numpy(part(factors[name], name, index)))
            parameter.grad = None
            if len(index):
                gradient = torch.from_numpy(part(gradients[name], name, index))
                parameter.grad = gradient.to(parameter.dtype)


def part(array: Array, name: str, index: Sequence[int]) -> Array:
    return array[:, list(index)] if name == "B" else array[list(index)]


def check(model: PeftModel, step: Step, outcome: Outcome) -> None:
    """Lambdas, masks and ranks, of every module."""
    allocator = model.base_model.allocator()
    ranks = [sum(mask) for mask in outcome.masks]
    assert list(allocator.rank_pattern.values()) == ranks
    for layer, factors, mask, index in zip(
        allocator.layers.values(), step[0], outcome.masks, outcome.left, strict=True
    ):
        state = layer.triplets["default"]
        assert state.mask.tolist() == [mask[i] for i in index]
        held = np.where(np.array(mask)[:, None], factors["E"], 0.0)
        for name, parameter in layer.factors("default").items():
            expected = part(held if name == "E" else factors[name], name, index)
            assert np.array_equal(parameter.detach().numpy(), expected)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("recovery", ["paper", "none"])
@pytest.mark.parametrize("score", ["full", "lambda"])
@pytest.mark.parametrize(("tinit", "tfinal", "delta_t"), [(0, 2, 1), (2, 1, 2), (1, 0, 4)])
def test_every_step_is_the_papers(
    stream: str, recovery: str, score: str, tinit: int, tfinal: int, delta_t: int
) -> None:
    num_steps = 7 if stream == "ties" else 12
    model = adapted(
        score=score, recovery=recovery, tinit=tinit, tfinal=tfinal, deltaT=delta_t,
        total_step=num_steps, **({"beta1": 0.5, "beta2": 0.5} if stream == "ties" else {}),
    )  # fmt: skip
    rules = rules_of(model.peft_config["default"], len(WIDTHS) - 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    steps = STREAMS[stream](num_steps + 2)
    left: list[list[int]] = [list(range(INIT_R))] * (len(WIDTHS) - 1)
    totals = []
    for number, (step, outcome) in enumerate(
        zip(steps, allocation(steps, rules), strict=True), start=1
    ):
        put(model, step, left)
        model.base_model.update_and_allocate(number, optimizer)
        check(model, step, outcome)
        left = outcome.left
        totals.append(sum(model.base_model.rank_pattern().values()))
    assert totals[-1] == rules.target
    assert model.base_model.allocator().finished
    assert list(model.base_model.allocator().tensors()) == []


def test_the_streams_do_what_they_are_for() -> None:
    """Triplets come back in one, modules end with none in one, steps are skipped in one."""
    rules = Rules(initial=12, target=6, tinit=0, tfinal=2, total_step=12)
    masks = [np.array(o.masks) for o in allocation(alternating_steps(14), rules)]
    assert any((after & ~before).any() for before, after in itertools.pairwise(masks))
    *_, last = allocation(huge_steps(14), rules)
    *_, lopsided = allocation(lopsided_steps(14), rules)
    assert min(map(sum, lopsided.masks)) == 0 and sum(map(sum, last.masks)) == 6

    model = adapted(tfinal=2)
    for number, step in enumerate(not_finite_steps(9), start=1):
        put(model, step, [range(INIT_R)] * 3)
        model.base_model.update_and_allocate(number)
        assert model.base_model.allocator().num_skipped == (number + 1) // 3


def lopsided_steps(num_steps: int) -> list[Step]:
    """The first module is of no importance."""
    steps = random_steps(num_steps, seed=4)
    for _, gradients in steps:
        for array in gradients[0].values():
            array *= 1e-6
    return steps


@pytest.mark.parametrize("recovery", ["paper", "none"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("module", [0, 2])
def test_one_gradient_that_is_not_finite_changes_no_choice(
    recovery: str, bad: float, module: int
) -> None:
    """The run is the one without that step: the module is neither spared nor pruned for it."""
    steps = lopsided_steps(12)
    steps[2][1][module]["B"][:] = bad
    with_it, without = (patterns_of(steps, recovery, leave_out) for leave_out in ({}, {3}))
    assert with_it == without
    assert with_it[-1][0] == 0 < with_it[-1][2]


def patterns_of(steps: Sequence[Step], recovery: str, leave_out: Iterable[int]) -> list[list[int]]:
    """The ranks of the modules at every step past the third; some steps make no call."""
    model = adapted(recovery=recovery, tinit=3, tfinal=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    patterns = []
    for number, step in enumerate(steps, start=1):
        if number not in leave_out:
            layers = model.base_model.allocator().layers.values()
            put(model, step, [range(layer.r["default"]) for layer in layers])
            model.base_model.update_and_allocate(number, optimizer)
        if number > 3:
            patterns.append(list(model.base_model.rank_pattern().values()))
    return patterns


def test_a_module_that_took_no_part_has_gradients_of_zero() -> None:
    steps = random_steps(12)
    for _, gradients in steps:
        for array in gradients[1].values():
            array[:] = 0.0
    model = adapted(tfinal=2)
    for number, (step, outcome) in enumerate(
        zip(steps, allocation(steps, rules_of(model.peft_config["default"], 3)), strict=True), 1
    ):
        put(model, step, [range(INIT_R)] * 3)
        for parameter in list(model.base_model.allocator().layers.values())[1].parameters():
            parameter.grad = None
        model.base_model.update_and_allocate(number)
        check(model, step, outcome)


@pytest.mark.parametrize("recovery", ["paper", "none"])
def test_nothing_is_masked_where_the_initial_rank_is_the_target(recovery: str) -> None:
    model = adapted(init_r=4, target_r=4, recovery=recovery, tfinal=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for number, step in enumerate(random_steps(12), start=1):
        put(model, step, [range(4)] * 3)
        model.base_model.update_and_allocate(number, optimizer)
        assert set(model.base_model.rank_pattern().values()) == {4}
        for layer, factors in zip(
            model.base_model.allocator().layers.values(), step[0], strict=True
        ):
            assert np.array_equal(layer.lora_E["default"].detach().numpy(), factors["E"])


@pytest.mark.parametrize("recovery", ["paper", "none"])
def test_a_first_call_after_the_final_step_spreads_the_rank_evenly(recovery: str) -> None:
    model = adapted(tfinal=4, recovery=recovery)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    put(model, random_steps(1)[0], [range(INIT_R)] * 3)
    model.base_model.update_and_allocate(11, optimizer)
    assert list(model.base_model.rank_pattern().values()) == [2, 2, 2]
    assert model.base_model.allocator().finished
    for layer in model.base_model.allocator().layers.values():
        assert layer.lora_E["default"].count_nonzero() == 2


def test_an_unknown_number_of_steps_is_refused() -> None:
    model = adapted(total_step=None)
    put(model, random_steps(1)[0], [range(INIT_R)] * 3)
    with pytest.raises(ValueError, match=r"total_step: not set.*RsAdaLoraCallback"):
        model.base_model.update_and_allocate(1)


def test_a_call_after_zero_grad_is_refused() -> None:
    model = adapted()
    put(model, random_steps(1)[0], [range(INIT_R)] * 3)
    torch.optim.SGD(model.parameters()).zero_grad()
    with pytest.raises(ValueError, match=r"no gradients.*before optimizer.zero_grad"):
        model.base_model.update_and_allocate(1)
    assert list(model.base_model.allocator().tensors()) == []
