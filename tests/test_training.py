"""One trial against the same trial written by hand with stock PEFT, torch and transformers."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import data_of
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM, get_scheduler
from transformers.optimization import Adafactor

from rsauto.adapters.lora import add_adapter, lora_layers, trainable_parameters
from rsauto.base import prepare
from rsauto.data import Example, TokenisedData, batch_plan, micro_batches
from rsauto.memory.measure import PeakMeter
from rsauto.records import StepPoint, TrialSpec
from rsauto.training.evaluate import evaluate
from rsauto.training.flops import linear_weights, training_flops
from rsauto.training.loop import (
    Diverged,
    accumulate_gradients,
    clip_gradients,
    gradient_norms,
    watched_steps,
)
from rsauto.training.schedule import Schedule, evaluation_steps, rate_multiplier, warmup_steps
from rsauto.training.trial import Bench, OutOfMemory, Trial

CPU = torch.device("cpu")


class Unmetered:
    """Instead of the profiler, which costs more than these trials do."""

    peak_bytes = None

    def __init__(self, *_: object) -> None:
        pass

    def watch(self, heavy: bool = True) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.fixture(autouse=True)
def unmetered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsauto.training.trial.PeakMeter", Unmetered)


EOS = 1


def rows(num_rows: int, seed: int) -> tuple[Example, ...]:
    """Random prompts and completions of many lengths, which can only be learnt by heart."""
    generator = random.Random(seed)
    found = []
    for _ in range(num_rows):
        prompt = [generator.randrange(2, 64) for _ in range(generator.randrange(1, 7))]
        completion = [generator.randrange(2, 64) for _ in range(generator.randrange(1, 5))]
        found.append(Example((*prompt, *completion, EOS), len(prompt)))
    return tuple(found)


DATA = data_of(rows(40, seed=1), rows(11, seed=2))


def spec_of(**changes: Any) -> TrialSpec:
    rule = changes.pop("rule", "rslora")
    settings = {
        "rank": 4,
        "alpha": 8,
        "learning_rate": 2e-3,
        "batch_size": 16,
        "micro_batch_size": 8,
        "max_length": 16,
        "steps": 4,
        "num_evals": 2,
        "max_grad_norm": 0.5,
        **changes,
    }
    return TrialSpec(role="search", method=rule, scaling_rule=rule, **settings)


def bench_of(model: LlamaForCausalLM, data: TokenisedData = DATA) -> Bench:
    return Bench(model=model, base_name="embedded", data=data, device=CPU)


def run(model: LlamaForCausalLM, spec: TrialSpec, data: TokenisedData = DATA) -> list[StepPoint]:
    with Trial(bench_of(model, data), spec) as trial:
        return list(trial.steps())


def losses(points: list[StepPoint]) -> list[float]:
    return [point.train_loss for point in points]


# ------------------------------------------------------------ the same trial, written by hand


def padded(examples: list[Example], pad: int = 0) -> dict[str, torch.Tensor]:
    longest = max(len(x.input_ids) for x in examples)
    ids, mask, labels = [], [], []
    for x in examples:
        tail = longest - len(x.input_ids)
        ids.append([*x.input_ids, *[pad] * tail])
        mask.append([1] * len(x.input_ids) + [0] * tail)
        labels.append(
            [-100] * x.num_prompt_tokens + list(x.input_ids[x.num_prompt_tokens :]) + [-100] * tail
        )
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


def optimizer_by_hand(model: nn.Module, spec: TrialSpec) -> Optimizer:
    rates: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rates["lora_B" in name].append(parameter)
    groups = [
        {"params": rates[False], "lr": spec.learning_rate},
        {"params": rates[True], "lr": spec.learning_rate * spec.lr_ratio},
    ]
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=spec.weight_decay)
    if spec.optimizer == "sgd":
        return torch.optim.SGD(groups, weight_decay=spec.weight_decay)
    return Adafactor(
        groups,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
        weight_decay=spec.weight_decay,
    )


def by_hand(model: LlamaForCausalLM, spec: TrialSpec) -> tuple[list[float], list[float], float]:
    """Losses and mean gradient norms of every step, and the final loss on the validation rows."""
    torch.manual_seed(spec.seed)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            use_rslora=spec.scaling_rule == "rslora",
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    adapted.train()
    optimizer = optimizer_by_hand(adapted, spec)
    schedule = get_scheduler(
        spec.schedule, optimizer, num_warmup_steps=0, num_training_steps=spec.steps
    )
    step_losses, norms = [], []
    for indices in batch_plan(len(DATA.train), spec.batch_size, spec.steps, spec.seed):
        loss = adapted(**padded([DATA.train[i] for i in indices])).loss
        loss.backward()
        parameters = [p for p in adapted.parameters() if p.requires_grad]
        norms.append(sum(float(p.grad.norm()) for p in parameters) / len(parameters))
        if spec.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, spec.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step_losses.append(float(loss.detach()))
    adapted.eval()
    with torch.no_grad():
        final = float(adapted(**padded(list(DATA.validation))).loss)
    return step_losses, norms, final


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rule": "lora", "learning_rate": 4e-3},
        {"lr_ratio": 16.0, "learning_rate": 5e-4},
        {"rule": "lora", "lr_ratio": 16.0, "seed": 5},
        {"weight_decay": 0.1, "schedule": "cosine", "max_grad_norm": None},
        {"optimizer": "sgd", "learning_rate": 0.3, "schedule": "constant"},
        {"optimizer": "sgd", "learning_rate": 0.1, "rule": "lora", "lr_ratio": 16.0},
        {"optimizer": "adafactor", "schedule": "constant"},
        {"optimizer": "adafactor", "lr_ratio": 16.0, "learning_rate": 5e-4},
    ],
    ids=str,
)
@pytest.mark.sample(4)
def test_a_trial_is_what_stock_peft_and_torch_give_step_by_step(
    llama: LlamaForCausalLM, changes: dict[str, Any]
) -> None:
    spec = spec_of(steps=7, **changes)
    expected_losses, expected_norms, expected_final = by_hand(copy.deepcopy(llama), spec)
    points = run(llama, spec)
    assert losses(points) == pytest.approx(expected_losses, abs=1e-5)
    assert [p.grad_norm for p in points] == pytest.approx(expected_norms, abs=1e-5)
    assert points[-1].evaluation is not None
    assert points[-1].evaluation.eval_loss == pytest.approx(expected_final, abs=1e-5)
    assert abs(expected_losses[-1] - expected_losses[0]) > 0.05, "nothing was learnt, or compared"
    # The clip at 0.5 is active, or the comparison says nothing about it.
    assert max(expected_norms) * math.sqrt(28) > 0.5


def test_two_runs_are_equal_to_the_last_bit(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    found = []
    for name in ("first", "second"):
        with Trial(bench_of(llama), spec_of()) as trial:
            points = [replace(p, seconds=0.0) for p in trial.steps()]
            trial.save(tmp_path / name, "card")
        weights = (tmp_path / name / "adapter_model.safetensors").read_bytes()
        found.append((points, weights))
    assert found[0] == found[1]


def test_another_seed_is_another_start_and_another_order(llama: LlamaForCausalLM) -> None:
    assert losses(run(llama, spec_of(seed=0))) != losses(run(llama, spec_of(seed=1)))


def test_the_base_model_is_untouched_by_a_trial(llama: LlamaForCausalLM) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    run(llama, spec_of(learning_rate=0.1))
    after = llama.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("micro_batch_size", [4, 1, 5])
def test_losses_do_not_depend_on_how_the_batch_is_cut(
    llama: LlamaForCausalLM, micro_batch_size: int
) -> None:
    whole = run(llama, spec_of(micro_batch_size=16))
    cut = run(llama, spec_of(micro_batch_size=micro_batch_size))
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-5)
    assert [p.tokens for p in cut] == [p.tokens for p in whole]


def test_gradients_do_not_depend_on_how_the_batch_is_cut(llama: LlamaForCausalLM) -> None:
    adapted = add_adapter(llama, spec_of())
    with torch.no_grad():
        for layer in lora_layers(adapted):
            layer.lora_B["default"].weight.normal_(std=0.1)
    parameters = list(trainable_parameters(adapted).values())
    grads = []
    for size in (12, 5, 1):
        accumulate_gradients(adapted, micro_batches(range(12), size), DATA, CPU)
        grads.append([p.grad.clone() for p in parameters if p.grad is not None])
        adapted.zero_grad()
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-4, atol=1e-6)


def test_tokens_are_counted_without_padding(llama: LlamaForCausalLM) -> None:
    points = run(llama, spec_of(steps=3))
    plan = batch_plan(len(DATA.train), 16, 3, 0)
    counts = [sum(len(DATA.train[i].input_ids) for i in indices) for indices in plan]
    assert [p.tokens for p in points] == [counts[0], sum(counts[:2]), sum(counts)]
    assert [p.step for p in points] == [1, 2, 3]


def test_a_point_of_the_curve_sums_up_the_steps_since_the_last(llama: LlamaForCausalLM) -> None:
    with Trial(bench_of(llama), spec_of(steps=5, num_evals=2)) as trial:
        points = list(trial.steps())
        assert [p.step for p in trial.curve] == [2, 5]
    assert trial.curve[0].train_loss == pytest.approx(sum(losses(points[:2])) / 2)
    assert trial.curve[1].train_loss == pytest.approx(sum(losses(points[2:])) / 3)
    assert trial.curve[1].grad_norm == pytest.approx(sum(p.grad_norm for p in points[2:]) / 3)


# ------------------------------------------------------------ schedules


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("num_steps", "num_warmup"), [(10, 0), (10, 3), (7, 1), (1, 0)])
def test_schedules_are_those_of_transformers_with_the_warm_up_one_step_ahead(
    name: Schedule, num_steps: int, num_warmup: int
) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=num_warmup,
        num_training_steps=num_steps,
    )
    multipliers = []
    for _ in range(num_steps + 1):
        multipliers.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = [rate_multiplier(name, step, num_steps, num_warmup) for step in range(num_steps)]
    assert ours[:num_warmup] == pytest.approx(multipliers[1 : num_warmup + 1])
    assert ours[num_warmup:] == pytest.approx(multipliers[num_warmup:num_steps])
    assert all(0 < multiplier <= 1 for multiplier in ours)


def test_the_rate_that_was_used_is_the_rate_that_is_told(llama: LlamaForCausalLM) -> None:
    spec = spec_of(steps=4, warmup_share=0.5, learning_rate=1e-3)
    assert [p.learning_rate for p in run(llama, spec)] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])


@given(num_steps=st.integers(1, 10_000), share=st.floats(0, 0.999))
def test_warm_up_is_a_share_of_the_steps_rounded_up(num_steps: int, share: float) -> None:
    found = warmup_steps(num_steps, share)
    assert 0 <= found <= num_steps
    assert found - 1 < num_steps * share <= found


@given(num_steps=st.integers(1, 500), num_evals=st.integers(1, 600))
def test_evaluations_are_spread_evenly_and_end_with_the_last_step(
    num_steps: int, num_evals: int
) -> None:
    found = evaluation_steps(num_steps, num_evals)
    assert len(found) == min(num_steps, num_evals)
    assert found[-1] == num_steps
    gaps = [b - a for a, b in zip((0, *found), found, strict=False)]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


def test_peaks_are_looked_for_where_a_batch_is_larger_than_all_before() -> None:
    def example(length: int) -> Example:
        return Example(tuple(range(length)), 0)

    data = data_of(tuple(example(n) for n in (9, 3, 5, 4, 7)), (example(2),))
    one_row_each = [[(i,)] for i in range(5)]
    # Step 1 has no optimizer states yet; of 3, 5, 4 and 7 tokens three are larger.
    assert watched_steps(one_row_each, data, (1, 2, 3, 4, 5)) == {2, 3, 5}
    # Between two evaluations only the largest decides.
    assert watched_steps(one_row_each, data, (4, 5)) == {3, 5}
    assert watched_steps(one_row_each, data, (5,)) == {5}
    assert watched_steps(one_row_each[:1], data, (1,)) == {1}
    # A step is as large as its largest micro-batch with padding: 2 x 5 beats 1 x 9.
    assert watched_steps([[(0,)], [(0,)], [(1, 2), (3,)]], data, (2, 3)) == {2, 3}


# ------------------------------------------------------------ evaluation


def token_weighted_loss(model: nn.Module, examples: tuple[Example, ...]) -> float:
    total, count = 0.0, 0
    with torch.no_grad():
        for x in examples:
            targets = len(x.input_ids) - x.num_prompt_tokens
            total += float(model(**padded([x])).loss) * targets
            count += targets
    return total / count


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_eval_loss_is_the_mean_over_tokens_whatever_the_batch_size(
    llama: LlamaForCausalLM, batch_size: int
) -> None:
    found = evaluate(llama, DATA.validation, batch_size=batch_size, pad_token_id=0, device=CPU)
    assert found.eval_loss == pytest.approx(token_weighted_loss(llama, DATA.validation), abs=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(found.eval_loss))


def test_exact_match_is_how_often_greedy_decoding_gives_the_completion(
    llama: LlamaForCausalLM,
) -> None:
    learnt = rows(8, seed=3)
    data = data_of(learnt, (*learnt, *rows(8, seed=4)))
    spec = spec_of(learning_rate=1e-2, steps=60, num_evals=3, batch_size=8, alpha=16)
    seen = []
    with Trial(bench_of(llama, data), spec) as trial:
        for point in trial.steps():
            if point.evaluation is None:
                continue
            right = right_tokens = 0
            for x in data.validation:
                prompt = torch.tensor([x.input_ids[: x.num_prompt_tokens]])
                truth = list(x.input_ids[x.num_prompt_tokens :])
                generated = llama.generate(  # the adapter is on the model itself
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=len(truth),
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
                right += generated[0, prompt.shape[1] :].tolist() == truth
                with torch.no_grad():
                    guesses = llama(torch.tensor([x.input_ids])).logits[0].argmax(-1).tolist()
                right_tokens += sum(
                    g == t for g, t in zip(guesses[x.num_prompt_tokens - 1 :], truth, strict=False)
                )
            num_tokens = sum(len(x.input_ids) - x.num_prompt_tokens for x in data.validation)
            metrics = point.evaluation.metrics
            assert metrics["exact_match"] == right / len(data.validation)
            assert metrics["token_accuracy"] == pytest.approx(right_tokens / num_tokens)
            seen.append(right)
    assert any(0 < right < len(data.validation) for right in seen), seen


def test_evaluation_leaves_training_mode_as_it_was(llama: LlamaForCausalLM) -> None:
    for training in (True, False):
        llama.train(training)
        evaluate(llama, DATA.validation, batch_size=4, pad_token_id=0, device=CPU)
        assert llama.training is training


# ------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_trial_that_leaves_the_numbers_diverges_and_is_taken_off(
    llama: LlamaForCausalLM, optimizer: str
) -> None:
    spec = spec_of(learning_rate=1e20, optimizer=optimizer, max_grad_norm=None)
    with pytest.raises(Diverged, match=r"^step [23]: loss (nan|inf)"):
        run(llama, spec)
    assert not list(lora_layers(llama))


def test_a_loss_that_is_no_number_diverges_at_its_step(llama: LlamaForCausalLM) -> None:
    with torch.no_grad():
        llama.lm_head.weight[0, 0] = math.nan
    with pytest.raises(Diverged, match=r"^step 1: loss nan"):
        run(llama, spec_of())


def raise_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nDetails")


def allocate_too_much() -> None:
    torch.empty(2**58)


@pytest.mark.parametrize(
    ("fail", "at_call"),
    [
        (raise_out_of_memory, 1),  # in the first step
        (allocate_too_much, 3),  # in the first evaluation
        (raise_out_of_memory, 6),  # in the second step, with optimizer states
    ],
)
def test_out_of_memory_ends_the_trial_and_the_next_one_is_as_if_it_had_not_been(
    llama: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[], None],
    at_call: int,
) -> None:
    expected = losses(run(llama, spec_of(steps=2)))
    forward, calls = llama.forward, iter(range(1, 1000))

    def full(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at_call:
            fail()
        return forward(*args, **kwargs)

    monkeypatch.setattr(llama, "forward", full)
    with pytest.raises(OutOfMemory) as caught:
        run(llama, spec_of(steps=2))
    monkeypatch.undo()
    assert "\n" not in str(caught.value) and "memory" in str(caught.value)
    assert not list(lora_layers(llama))
    assert not any(p.requires_grad or p.grad is not None for p in llama.parameters())
    assert losses(run(llama, spec_of(steps=2))) == expected


def test_out_of_memory_while_the_adapter_is_put_on_counts_as_well(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise_out_of_memory()

    monkeypatch.setattr("peft.tuners.lora.layer.Linear.update_layer", full)
    with pytest.raises(OutOfMemory, match=r"^CUDA out of memory"):
        run(llama, spec_of())
    assert not list(lora_layers(llama))


def test_another_error_of_torch_is_not_taken_for_want_of_memory(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        torch.zeros(2, 3) @ torch.zeros(2, 3)

    monkeypatch.setattr(llama, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(llama, spec_of())
    assert not list(lora_layers(llama))


def test_a_trial_left_in_the_middle_is_taken_off(llama: LlamaForCausalLM) -> None:
    with Trial(bench_of(llama), spec_of()) as trial:
        next(trial.steps())
        assert list(lora_layers(llama))
        assert trial.last is not None and trial.last.step == 1
    assert not list(lora_layers(llama))


# ------------------------------------------------------------ norms, operations, precision


def test_gradient_norms_and_clipping_are_torchs(llama: LlamaForCausalLM) -> None:
    adapted = add_adapter(llama, spec_of())
    parameters = list(trainable_parameters(adapted).values())
    generator = torch.Generator().manual_seed(0)
    for scale in (10.0, 1e-3):  # one that is clipped, one that is not
        for p in parameters:
            p.grad = scale * torch.randn(p.shape, generator=generator)
        expected = [float(torch.linalg.matrix_norm(p.grad)) for p in parameters]  # type: ignore[arg-type]
        mean, total = gradient_norms(parameters)
        assert mean == pytest.approx(sum(expected) / len(expected), rel=1e-6)
        assert total == pytest.approx(math.sqrt(sum(x * x for x in expected)), rel=1e-6)
        twins = [nn.Parameter(p.detach().clone()) for p in parameters]
        for twin, p in zip(twins, parameters, strict=True):
            twin.grad = None if p.grad is None else p.grad.clone()
        clip_gradients(parameters, total, 1.0)
        torch.nn.utils.clip_grad_norm_(twins, 1.0)
        torch.testing.assert_close([p.grad for p in parameters], [t.grad for t in twins])


def test_flops_are_those_that_torch_counts(llama: LlamaForCausalLM) -> None:
    adapted = add_adapter(llama, spec_of(rank=8))
    frozen, trainable = linear_weights(adapted)
    in_blocks = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert frozen == in_blocks + 32 * 64
    sizes_in_and_out = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert trainable == 8 * sizes_in_and_out

    batch = padded([Example(tuple(range(16)), 0)] * 4)
    counter = FlopCounterMode(display=False)
    with counter:
        adapted(**batch).loss.backward()
    counted = sum(
        count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if "attention" not in str(operation) and "bmm" not in str(operation)
    )
    # Nothing is learnt below the first block, so torch skips the gradient of its inputs: the
    # activations' gradient of q, k and v, and of their A.
    skipped = 2 * (32 * 32 + 2 * 32 * 16 + 3 * 8 * 32)
    assert counted == training_flops(adapted, 4 * 16) - 4 * 16 * skipped
    assert training_flops(adapted, 64) == pytest.approx(counted, rel=0.1)


def test_a_trial_knows_its_size_its_operations_and_its_memory(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rsauto.training.trial.PeakMeter", PeakMeter)
    with Trial(bench_of(llama), spec_of(steps=2)) as trial:
        assert trial.flops == 0 and trial.num_trainable_params is None
        points = list(trial.steps())
        expected = 4 * (2 * (2 * 64 + 2 * 48 + 3 * 80))
        assert trial.num_trainable_params == expected
        frozen = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 64
        assert trial.flops == points[-1].tokens * (4 * frozen + 6 * expected)
        assert trial.measured_peak_bytes is not None
        assert trial.measured_peak_bytes > sum(p.numel() * 4 for p in llama.parameters())
    monkeypatch.undo()
    with Trial(bench_of(llama), spec_of(steps=2)) as trial:
        assert losses(list(trial.steps())) == losses(points), "measuring must not change a trial"


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_changes_no_loss(llama: LlamaForCausalLM) -> None:
    plain = losses(run(llama, spec_of()))
    prepare(llama, gradient_checkpointing=True)
    assert losses(run(llama, spec_of())) == pytest.approx(plain, abs=1e-6)
    assert llama.is_activation_checkpointing


def test_float32_adapters_learn_on_a_bfloat16_model(llama: LlamaForCausalLM) -> None:
    spec = spec_of(steps=12, learning_rate=1e-2, num_evals=1, micro_batch_size=16)
    full = losses(run(llama, spec))
    llama.to(torch.bfloat16)  # type: ignore[arg-type]
    half = losses(run(llama, spec))
    assert half[-1] < half[0] - 0.5
    assert half == pytest.approx(full, abs=0.2)


def test_a_trained_trial_is_saved_as_the_model_that_was_evaluated(
    llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    fresh = copy.deepcopy(llama)
    spec = spec_of(steps=10, learning_rate=1e-2, alpha=16)
    with Trial(bench_of(llama), spec) as trial:
        last = list(trial.steps())[-1]
        trial.save(tmp_path / "adapter", "card")
    assert last.evaluation is not None
    before = token_weighted_loss(fresh, DATA.validation)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    after = token_weighted_loss(loaded, DATA.validation)
    assert after == pytest.approx(last.evaluation.eval_loss, abs=1e-5)
    assert abs(after - before) > 0.05
