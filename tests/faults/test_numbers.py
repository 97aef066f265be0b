"""Numbers that are none, wherever they come in: one trial diverges, and nothing else is touched."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from examples import data_of
from packs import Run, alone, assert_equal, bits, drain, packed, unmetered
from test_packed_adalora import placed
from test_training import DATA, EOS, bench_of, rows, spec_of
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from rsauto.adapters.lora import lora_layers
from rsauto.base import prepare
from rsauto.data import Example
from rsauto.records import TrialSpec
from rsauto.training.loop import Diverged
from rsauto.training.member import Member
from rsauto.training.packed import Pack
from rsauto.training.trial import Bench, Trial

pytestmark = pytest.mark.usefixtures("unmetered")
__all__ = ["unmetered"]

STEPS = 4
Where = Literal["loss", "gradient", "evaluation"]
TOLD = {"loss": "loss", "gradient": "gradient norm", "evaluation": "validation loss"}


@dataclass(frozen=True)
class Fault:
    """A number that is none, in what the last block gives or is given back."""

    where: Where
    step: int
    value: float = math.nan

    def strikes(self, is_training: bool, steps_done: int) -> bool:
        """Evaluations come after their step."""
        if self.where == "evaluation":
            return not is_training and steps_done >= self.step - 1
        return is_training and steps_done == self.step - 1

    @property
    def told(self) -> str:
        return rf"^step {self.step}: {TOLD[self.where]} (nan|inf|-inf)$"

    def put(self, hidden: Tensor, rows: slice) -> Tensor:
        """The rows of one trial, with the fault in them, or in their gradient."""
        factor = torch.ones_like(hidden)
        factor[rows.start] = self.value
        if self.where != "gradient":
            return hidden * factor
        hidden.register_hook(lambda gradient: gradient * factor)
        return hidden


@contextmanager
def broken(model: nn.Module, change: Any) -> Iterator[None]:
    """The model with a last norm whose output goes through ``change``."""
    norm = model.get_submodule("model.norm")
    hook = norm.register_forward_hook(lambda _module, _inputs, output: change(output))
    try:
        yield
    finally:
        hook.remove()


def struck_alone(bench: Bench, spec: TrialSpec, fault: Fault) -> Run:
    with Trial(bench, spec) as trial:
        run = Run()

        def change(hidden: Tensor) -> Tensor:
            strikes = fault.strikes(bench.model.training, len(run.points))
            return fault.put(hidden, slice(0, 1)) if strikes else hidden

        with broken(bench.model, change):
            try:
                for point in trial.steps():
                    run.points.append(point)
            except Diverged as error:
                run.error = error
    return run


def struck_in_a_pack(bench: Bench, specs: list[TrialSpec], who: int, fault: Fault) -> list[Run]:
    """All in one pack, and the fault in the rows of one of them, until it is released."""
    runs = [Run() for _ in specs]
    with Pack(bench, optimizer="adamw", rows=8) as pack:
        members = [pack.admit(spec) for spec in specs]

        def taking_part() -> list[Member]:
            order = [next(m for m in members if m.tensors is t) for t in pack._model.trials]
            if bench.model.training:
                return order
            return [m for m in order if m.evaluates_next]

        def change(hidden: Tensor) -> Tensor:
            there, struck = taking_part(), members[who]
            if struck not in there or not fault.strikes(bench.model.training, struck.steps_done):
                return hidden
            size = len(hidden) // len(there)
            place = there.index(struck)
            return fault.put(hidden, slice(place * size, (place + 1) * size))

        with broken(bench.model, change):
            drain(pack, members, runs)
    return runs


def three(**changes: Any) -> list[TrialSpec]:
    return [
        spec_of(**{"steps": STEPS, "num_evals": STEPS, "learning_rate": 1e-3 * (n + 1), **changes})
        for n in range(3)
    ]


FAULTS = [
    Fault(where, step, value)
    for where in ("loss", "gradient", "evaluation")
    for step, value in ((1, math.nan), (2, math.inf), (STEPS, math.nan))
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.where} {f.step} {f.value}")
@pytest.mark.sample(4)
def test_a_number_that_is_none_ends_its_trial_at_its_step_and_no_other(
    llama: LlamaForCausalLM, fault: Fault
) -> None:
    bench, specs = bench_of(llama), three()
    fault_free = packed(bench, specs)
    # Who leaves after a sound step was seated in it, as who diverges in it.
    without = packed(bench, specs, leaves={1: fault.step})
    by_itself = struck_alone(bench, specs[1], fault)
    runs = struck_in_a_pack(bench, specs, 1, fault)
    for found in (by_itself, runs[1]):
        assert isinstance(found.error, Diverged)
        assert re.match(fault.told, str(found.error)), str(found.error)
        assert len(found.points) == fault.step - 1
    assert bits(runs[1]) == bits(fault_free[1])[: fault.step - 1]
    for number in (0, 2):
        assert runs[number].error is None
        assert bits(runs[number]) == bits(without[number])
    assert not list(lora_layers(llama))
    assert all(p.isfinite().all() for p in llama.parameters())


@pytest.mark.parametrize("recovery", ["none", "paper"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_adalora_places_the_ranks_of_others_as_if_nobody_had_diverged(
    llama: LlamaForCausalLM, where: Where, recovery: str
) -> None:
    """In the very step in which ranks are placed, and scores of one trial are no numbers."""
    way = {"recovery": recovery, "score": "full"}
    specs = [placed(4, 6, way=way), placed(4, 8, way=way), placed(2, 4, way=way)]
    expected = packed(bench_of(llama), specs, leaves={1: 3})
    runs = struck_in_a_pack(bench_of(llama), specs, 1, Fault(where, 3))
    assert isinstance(runs[1].error, Diverged) and len(runs[1].points) == 2
    for number in (0, 2):
        assert bits(runs[number]) == bits(expected[number])


def test_a_trial_of_another_rank_in_the_same_buffer_is_out_of_reach(
    llama: LlamaForCausalLM,
) -> None:
    """Pads of the smaller ranks are zeros, and nothing that is no number is multiplied by them."""
    bench = bench_of(llama)
    specs = [replace(s, rank=rank) for s, rank in zip(three(), (2, 64, 33), strict=True)]
    runs = struck_in_a_pack(bench, specs, 1, Fault("gradient", 2, math.inf))
    assert isinstance(runs[1].error, Diverged)
    for number in (0, 2):
        assert_equal(replace(runs[number], flops=0.0), without_flops(alone(bench, specs[number])))


def without_flops(run: Run) -> Run:
    return replace(run, flops=0.0, patterns=[])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_a_rate_that_overflows_half_precision(
    llama: LlamaForCausalLM, dtype: torch.dtype, rate: float
) -> None:
    """A result or a divergence, the same alone and packed; nothing else of the pack is touched."""
    llama.to(dtype)  # type: ignore[arg-type]
    bench, specs = bench_of(llama), three(max_grad_norm=None)
    expected = packed(bench, [specs[0], specs[2]])
    specs[1] = replace(specs[1], learning_rate=rate)
    by_itself, runs = alone(bench, specs[1]), packed(bench, specs)
    assert (by_itself.error is None) == (runs[1].error is None)
    assert rate == 1e3 or isinstance(by_itself.error, Diverged)
    for found in (by_itself, runs[1]):
        assert all(math.isfinite(number) for step in found.numbers for number in step)
    for run, one in zip((runs[0], runs[2]), expected, strict=True):
        assert [p.step for p in run.points] == [1, 2, 3, 4]
        assert run.losses == pytest.approx(one.losses, rel=1e-6)


def test_the_loss_on_the_general_text_is_watched_as_well(llama: LlamaForCausalLM) -> None:
    """The validation rows may be fine, and forgetting no number: its token is only in the text."""
    own = 63
    rare = tuple(
        Example(tuple(min(i, own - 1) for i in x.input_ids), x.num_prompt_tokens)
        for x in (*DATA.train, *DATA.validation)
    )
    general = (Example((2, own, 3, 4), 0),)
    bench = bench_of(llama, data_of(rare[:40], rare[40:], general))
    with torch.no_grad():
        llama.get_input_embeddings().weight[own] = torch.nan  # type: ignore[union-attr,operator]
    spec = three()[0]
    for run in (alone(bench, spec), packed(bench, [spec])[0]):
        assert str(run.error) == "step 1: loss on the general text nan"


# ------------------------------------------------------------ the smallest there is


SHORT = (Example((5, EOS), 1), Example((7, 9, EOS), 1))


def test_a_batch_of_one_row_with_one_counted_token(llama: LlamaForCausalLM) -> None:
    bench = bench_of(llama, data_of(SHORT, SHORT[:1]))
    spec = spec_of(batch_size=1, micro_batch_size=1, max_length=2, steps=3, num_evals=1)
    run = alone(bench, spec)
    assert run.error is None and all(map(math.isfinite, run.losses))
    with Pack(bench, optimizer="adamw", rows=1) as pack:
        member = pack.admit(spec)
        found = [advance.point for _ in range(3) for advance in pack.advance()]
        assert member.is_finished
    assert [p.train_loss for p in found if p] == pytest.approx(run.losses, abs=1e-5)


def test_a_sequence_of_one_token_beside_others_counts_for_nothing(llama: LlamaForCausalLM) -> None:
    """It predicts no token; a trial must not divide by it."""
    lonely = Example((5,), 0)
    validation = rows(3, seed=2)
    with_it = bench_of(llama, data_of((*SHORT, lonely), (*validation, lonely)))
    spec = spec_of(batch_size=3, micro_batch_size=1, max_length=8, steps=3, num_evals=3)
    run = alone(with_it, spec)
    assert run.error is None and all(map(math.isfinite, run.losses))
    without = bench_of(llama, data_of(SHORT, validation))
    first = alone(without, replace(spec, batch_size=2, steps=1, num_evals=1)).points[0]
    assert run.losses[0] == pytest.approx(first.train_loss, abs=1e-6)
    assert run.points[0].evaluation is not None and first.evaluation is not None
    assert run.points[0].evaluation.eval_loss == pytest.approx(first.evaluation.eval_loss, abs=0.05)


# ------------------------------------------------------------ other shapes of models


def test_tied_weights_change_no_bit_and_are_never_trained(llama: LlamaForCausalLM) -> None:
    spec = three()[0]
    untied = llama
    with torch.no_grad():
        untied.lm_head.weight.copy_(untied.model.embed_tokens.weight)
    expected = bits(alone(bench_of(untied), spec))
    untied.lm_head.weight = untied.model.embed_tokens.weight
    untied.config.tie_word_embeddings = True
    before = untied.lm_head.weight.detach().clone()
    assert bits(alone(bench_of(untied), spec)) == expected
    (together,) = packed(bench_of(untied), [spec])
    assert together.losses == pytest.approx([step[0] for step in expected], abs=1e-5)
    assert torch.equal(untied.lm_head.weight, before)
    assert untied.lm_head.weight is untied.model.embed_tokens.weight


def test_convolutions_that_are_linear_layers_diverge_alone_as_well() -> None:
    """GPT-2 has no nn.Linear but its head; one of its trials leaves the numbers in a pack."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=40,
                        bos_token_id=1, eos_token_id=1)  # fmt: skip
    model = GPT2LMHeadModel(config)
    prepare(model, gradient_checkpointing=False)
    assert not [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    bench, specs = bench_of(model.eval()), three(max_grad_norm=None)  # type: ignore[arg-type]
    expected = packed(bench, [specs[0], specs[2]])
    specs[1] = replace(specs[1], learning_rate=1e30)
    runs = packed(bench, specs)
    assert isinstance(runs[1].error, Diverged)
    for run, one in zip((runs[0], runs[2]), expected, strict=True):
        assert run.losses == pytest.approx(one.losses, abs=1e-5)
