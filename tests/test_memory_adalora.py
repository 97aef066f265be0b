"""The memory of AdaLoRA and of rank patterns: traced, planned, measured, and given back."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from examples import data_of
from planning import kind_of, planner_of
from test_memory import SMALL_LLAMA, error, profile_at, rounded
from test_memory_truth import ALONE, CLASSES, CONFIGS, LM, PADDED, require_equal
from test_quantised import LLAMA, quantised, write
from tiny_study import study_values
from torch import nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, T5Config
from typer.testing import CliRunner, Result

import rsauto
from rsauto.adalora.allocator import RankAllocator
from rsauto.base import prepare
from rsauto.cli import app
from rsauto.config import TaskType
from rsauto.data import Example
from rsauto.errors import InputError
from rsauto.memory import profiles, trace
from rsauto.memory.depth import repeated_layers
from rsauto.memory.kinds import Bits, DtypeName, Prediction, StepKind, StepSize
from rsauto.memory.measure import PeakMeter
from rsauto.memory.profiles import Profiles
from rsauto.memory.trace import build_model, estimated_profile, trace_step
from rsauto.records import AllocationSpec, RankPattern, TrialRecord, TrialSpec
from rsauto.search.driver import study_events
from rsauto.search.events import TrialSettled
from rsauto.search.setup import Setup, set_up
from rsauto.search.space import Space
from rsauto.study_file import validate
from rsauto.training.trial import Bench, Trial

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

CPU = torch.device("cpu")
EVEN = tuple(Example((*range(3 + n % 7, 40 + n % 7),), 4) for n in range(16))
"""Rows of 37 tokens."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def one_layer(name: str, task: TaskType = LM) -> PretrainedConfig:
    config = CONFIGS[name]()
    config.num_hidden_layers = 1
    if task == CLASSES:
        config.num_labels, config.pad_token_id = 3, 0
    return config


def adalora(config: PretrainedConfig, **changes: Any) -> StepKind:
    return kind_of(config, **{"method": "adalora", "attn_implementation": "auto"} | changes)


HALF = "bfloat16"
LLAMA_PATTERN: RankPattern = (
    ("model.layers.0.self_attn.q_proj", 1),
    ("model.layers.0.self_attn.o_proj", 7),
    ("model.layers.0.mlp.down_proj", 3),
)
GPT2_PATTERN: RankPattern = (("transformer.h.0.attn.c_attn", 5), ("transformer.h.0.mlp.c_proj", 2))


# --------------------------------------------------------------------------------- the trace


@pytest.mark.parametrize(
    "name, task, changes",
    [
        ("llama", LM, {"dtype": HALF, "lora_dropout": 0.1}),
        ("llama", LM, {"dtype": HALF, "adapter_dtype": HALF, "optimizer": "adafactor"}),
        ("llama", LM, {"quant_bits": 8, "lora_dropout": 0.1, "score": "lambda"}),
        ("llama", LM, {"quant_bits": 4, "dtype": HALF, "gradient_checkpointing": True}),
        ("llama", LM, {"gradient_checkpointing": True, "use_reentrant": True}),
        ("llama", LM, {"score": "lambda", "orth_reg": False, "optimizer": "sgd"}),
        ("llama", LM, {"method": "rsadalora", "autocast": HALF, "accumulate": True}),
        ("gpt2", LM, {"quant_bits": 4, "autocast": HALF}),
        ("gpt2", LM, {"dtype": HALF, "autocast": HALF, "clip": False}),
        ("bert", CLASSES, {"orth_reg": False}),
        ("bert", CLASSES, {"quant_bits": 8, "dtype": HALF, "adapter_dtype": HALF}),
        ("llama", LM, {"method": "lora", "rank_pattern": LLAMA_PATTERN, "lora_dropout": 0.1}),
        ("gpt2", LM, {"method": "lora", "rank_pattern": GPT2_PATTERN, "quant_bits": 4}),
    ],
    ids=str,
)
@pytest.mark.sample(5)
def test_a_fake_step_is_the_real_one(name: str, task: TaskType, changes: dict[str, Any]) -> None:
    require_equal(adalora(one_layer(name, task), task=task, **changes), PADDED)


def test_so_is_one_of_a_single_sequence() -> None:
    require_equal(adalora(one_layer("llama"), padded=False), ALONE)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adafactor", "gradient_checkpointing": True, "adapter_dtype": HALF},
        {"quant_bits": 4, "score": "lambda", "device_type": "cuda", "dtype": HALF},
    ],
    ids=str,
)
@pytest.mark.sample(1)
def test_two_traces_give_every_rank_batch_and_length(changes: dict[str, Any]) -> None:
    kind = adalora(one_layer("llama"), target_modules=("q_proj", "down_proj"), **changes)
    profile = profile_at(kind)
    lengths = ((40, 40), (40, 40)) if kind.device_type == "cuda" else ((17, 33), (10, 15))
    for rank, (batch, length) in zip((1, 130), enumerate(lengths, start=2), strict=True):
        size = StepSize(rank, batch, *length)
        granule = 512 if kind.device_type == "cuda" else 64
        direct = trace_step(kind, size)
        assert profile.sizes(size, granule).tolist() == rounded(direct, granule)
        assert profile.num_trainable_params(rank) == direct.num_trainable_params
        assert profile.flops_per_token(rank) == pytest.approx(
            4.0 * direct.linear_weights[0] + 6.0 * direct.linear_weights[1]
        )
    assert 2 in profile.exponents[:, 0], "the products of P and of Q with themselves, r x r"


def test_without_orthogonality_nothing_grows_with_the_square_of_the_rank() -> None:
    profile = profile_at(adalora(one_layer("llama"), orth_reg=False, target_modules=("q_proj",)))
    assert 2 not in profile.exponents[:, 0]


def module_sizes(num_layers: int = 2) -> dict[str, int]:
    """Inputs and outputs of each adapted layer of SMALL_LLAMA."""
    attention = {f"self_attn.{n}_proj": 64 + 64 for n in "qkvo"}
    mlp = {f"mlp.{n}_proj": 64 + 192 for n in ("gate", "up", "down")}
    sizes = attention | mlp
    return {f"model.layers.{i}.{n}": size for i in range(num_layers) for n, size in sizes.items()}


@pytest.mark.parametrize("score, per_param", [("full", 8), ("lambda", 0)])
@pytest.mark.sample(1)
def test_the_importance_counts_with_the_optimizer(score: str, per_param: int) -> None:
    """Two averages in float32 for each number that is scored: 16 B a parameter with AdamW, or 8."""
    kind = adalora(SMALL_LLAMA, score=score)
    found = profile_at(kind).predict(StepSize(16, 4, 40, 40), "cpu")
    numbers = sum(16 * (size + 1) for size in module_sizes().values())
    lambdas = 14 * 16 if score == "lambda" else 0
    counters = 64 * 3 * 14
    assert found.num_trainable_params == numbers
    assert found.breakdown["adapters"] == 4 * numbers
    assert found.breakdown["optimizer"] == (8 + per_param) * numbers + 8 * lambdas + counters


# --------------------------------------------------------------------------------- deep models

DEEP = LlamaConfig(
    num_hidden_layers=12, vocab_size=64, hidden_size=32, intermediate_size=48,
    num_attention_heads=2, num_key_value_heads=2,
)  # fmt: skip


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers of each model that is traced from now on."""
    depths: list[int] = []
    real = trace.record_step

    def record(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        depths.append(max(len(m) for m in model.modules() if isinstance(m, nn.ModuleList)))
        return real(model, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(trace, "record_step", record)
    return depths


def uneven(ranks: list[int]) -> RankPattern:
    return tuple((f"model.layers.{i}.self_attn.q_proj", r) for i, r in enumerate(ranks))


@pytest.mark.parametrize(
    "changes, traced",
    [
        ({"target_modules": ("q_proj",), "score": "lambda", "quant_bits": 4}, [4, 3, 2]),
        ({"method": "lora", "rank_pattern": uneven([4] * 12)}, [4, 3, 2]),
        ({"method": "lora", "rank_pattern": uneven([*range(1, 13)])}, [12]),
        ({"method": "lora", "rank_pattern": uneven([4] * 11)}, [12]),
    ],
    ids=str,
)
@pytest.mark.sample(1)
def test_equal_layers_are_traced_a_few_at_a_time(
    changes: dict[str, Any], traced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ranks differ, or a module has none, no layer stands for another."""
    kind, size = adalora(DEEP, **changes), StepSize(8, 3, 20, 12)
    direct = trace_step(kind, size)
    depths = counted(monkeypatch)
    from_few = trace_step(kind, size, may_cut=True)
    assert depths == traced
    for name in ("nbytes", "phase", "operation", "tag"):
        few = [getattr(event, name) for event in from_few.events]
        assert few == [getattr(event, name) for event in direct.events], name
    assert from_few.num_trainable_params == direct.num_trainable_params


def test_a_rank_pattern_has_one_memory_and_no_largest_rank() -> None:
    planner = planner_of(one_layer("llama"), 20, rank_pattern=LLAMA_PATTERN)
    low, high = (planner.predict(r, batch_size=2, micro_batch_size=2) for r in (2, 64))
    assert replace(low, rank=64) == high
    assert low.num_trainable_params == 1 * 64 + 7 * 64 + 3 * (48 + 32)
    with pytest.raises(ValueError, match="no largest rank"):
        planner.largest_rank(memory_budget_bytes=2**30, batch_size=2)
    with torch.device("meta"):
        assert repeated_layers(build_model(planner.kind, 8)) is None


# --------------------------------------------------------------------------------- real trials


class EachStep(PeakMeter):
    """Measures every window of a trial apart."""

    peaks: ClassVar[list[int]] = []

    @contextmanager
    def watch(self, heavy: bool = True) -> Iterator[None]:
        self._peak_bytes = None
        with super().watch():
            yield
        assert self._peak_bytes is not None
        EachStep.peaks.append(self._peak_bytes)


@pytest.fixture
def each_step(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Peaks of the optimizer steps of a trial, then of its evaluation."""
    monkeypatch.setattr("rsauto.training.trial.PeakMeter", EachStep)
    EachStep.peaks.clear()
    return EachStep.peaks


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """The embedded model on a few short rows."""
    values = study_values(tmp_path_factory.mktemp("rows"), method=["rslora", "rsadalora"])
    values |= {"model": {"name": "embedded"}, "memory_budget": "1GiB"}
    return set_up(validate(values))


@pytest.fixture(scope="module")
def bench(setup: Setup) -> Bench:
    return Bench(model=setup.load_model().model, base_name="embedded", data=setup.data, device=CPU)


def trained(setup: Setup, bench: Bench, spec: TrialSpec) -> tuple[Prediction, Trial]:
    """What was planned for a trial, and the trial when it has ended."""
    found = setup.predict(spec)
    assert found is not None and found.rank == spec.rank
    with Trial(bench, replace(spec, micro_batch_size=found.micro_batch_size)) as trial:
        for _ in trial.steps():
            pass
        assert trial.num_trainable_params is not None
        if spec.allocation is None or spec.allocation.recovery == "paper":
            assert trial.num_trainable_params == found.num_trainable_params
    return found, trial


def adalora_spec(setup: Setup, rank: int, **allocation: Any) -> TrialSpec:
    spec = setup.space.middle(rank, "rsadalora")
    assert spec.allocation is not None
    return replace(spec, allocation=replace(spec.allocation, **allocation))


@pytest.mark.parametrize(
    "rank, allocation",
    [(8, {"score": "full"}), (64, {"orth_reg_weight": 0.0})],
)
@pytest.mark.sample(1)
def test_a_trial_needs_what_was_predicted(
    setup: Setup, bench: Bench, rank: int, allocation: dict[str, Any]
) -> None:
    spec = adalora_spec(setup, rank, recovery="paper", **allocation)
    found, trial = trained(setup, bench, spec)
    assert trial.measured_peak_bytes is not None
    assert abs(error(found.peak_bytes, trial.measured_peak_bytes)) < 0.005


@pytest.mark.parametrize("bits, dtype", [(8, "float32"), (4, HALF)])
@pytest.mark.sample(1)
def test_on_bitsandbytes_layers_as_well(tmp_path: Path, bits: Bits, dtype: DtypeName) -> None:
    base = quantised(write(tmp_path, LLAMA), bits, getattr(torch, dtype))
    spec = TrialSpec(
        role="search", method="rsadalora", rank=12, alpha=12, scaling_rule="rslora",
        learning_rate=1e-3, init_rank=18, target_rank=12, lambda_lr_ratio=4.0, steps=3,
        num_evals=1, batch_size=4, micro_batch_size=4,
        allocation=AllocationSpec(tinit=0, tfinal=1, recovery="paper"),
    )  # fmt: skip
    planner = planner_of(LLAMA, 37, padded=False, method="adalora", quant_bits=bits, dtype=dtype)
    found = planner.predict(18, batch_size=4, micro_batch_size=4)
    data = data_of(EVEN, EVEN[:4])
    model = prepare(base, gradient_checkpointing=False)
    with Trial(Bench(model=model, base_name="x", data=data, device=CPU), spec) as trial:
        assert len(list(trial.steps())) == 3
        assert trial.measured_peak_bytes is not None
    assert abs(error(found.peak_bytes, trial.measured_peak_bytes)) < 0.01


def test_a_refit_needs_what_was_predicted_for_its_ranks(setup: Setup, bench: Bench) -> None:
    generator = random.Random(0)
    names = [n for n, m in bench.model.named_modules() if isinstance(m, nn.Linear) and "." in n]
    pattern = tuple((name, generator.choice([1, 3, 40, 90])) for name in names[:-3])
    spec = replace(setup.space.middle(16, "rslora"), role="refit", rank_pattern=pattern)
    found, trial = trained(setup, bench, spec)
    even = setup.predict(replace(spec, rank_pattern=None))
    assert even is not None and even.num_trainable_params != found.num_trainable_params
    assert trial.measured_peak_bytes is not None
    assert abs(error(found.peak_bytes, trial.measured_peak_bytes)) < 0.005


class Kept:
    """Of every step after allocation: bytes of adapters, gradients, states and importance, and
    the closed form for the triplets that are left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[int] = []
        self.expected: list[int] = []
        real = RankAllocator.update_and_allocate

        def observed(allocator: RankAllocator, step: int, optimizer: Optimizer) -> None:
            real(allocator, step, optimizer)
            self.found.append(self._bytes(allocator, optimizer))
            self.expected.append(self._closed_form(allocator))

        monkeypatch.setattr(RankAllocator, "update_and_allocate", observed)

    def _bytes(self, allocator: RankAllocator, optimizer: Optimizer) -> int:
        factors = [factor for _, factor in allocator.factors()]
        gradients = [factor.grad for factor in factors if factor.grad is not None]
        states = [v for state in optimizer.state.values() for v in state.values()]
        tensors = [*factors, *gradients, *states, *allocator.tensors()]
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def _closed_form(self, allocator: RankAllocator) -> int:
        """Float32: weight, gradient and two moments, and two averages until the pattern is fixed;
        a counter of 4 bytes for each of the three factors."""
        copies = 4 if allocator.finished else 6
        sizes = {n: m.in_features + m.out_features + 1 for n, m in allocator.layers.items()}
        numbers = sum(rank * sizes[name] for name, rank in allocator.rank_pattern.items())
        return 4 * copies * numbers + 4 * 3 * len(sizes)


def test_pruned_triplets_give_their_memory_back(
    bench: Bench, setup: Setup, monkeypatch: pytest.MonkeyPatch, each_step: list[int]
) -> None:
    """Rows are of one length, so that nothing but the ranks makes a later step smaller."""
    even = replace(bench, data=data_of(EVEN, EVEN[:2]))
    kept = Kept(monkeypatch)
    schedule = {"tinit": 3, "tfinal": 3, "score": "full"}
    spec = replace(adalora_spec(setup, 32), steps=12, num_evals=1, micro_batch_size=4)
    peaks = {}
    for recovery in ("paper", "none"):
        assert spec.allocation is not None
        chosen = replace(spec.allocation, recovery=recovery, **schedule)
        each_step.clear()
        with Trial(even, replace(spec, allocation=chosen)) as trial:
            assert len(list(trial.steps())) == 12
        peaks[recovery] = each_step[1:12]  # the first step begins without states
    masked, freed = peaks["paper"], peaks["none"]
    assert kept.found[12:] == kept.expected[12:]
    before, middle, after = (kept.found[12 + step - 1] for step in (3, 6, 9))
    assert before > 1.2 * middle > 1.2 * after
    assert kept.found[20] == kept.found[23], "the pattern is fixed"
    assert freed[:2] == masked[:2], "nothing is pruned in the warm-up"
    assert all(ours <= theirs for ours, theirs in zip(freed[2:], masked[2:], strict=True))
    assert freed[0] > freed[4] > freed[9] and masked[0] == masked[4]
    # Weights, moments and averages; at the loss, where the peak is, there are no gradients.
    assert freed[0] - freed[9] >= 5 / 6 * before - 3 / 4 * after

    planner = planner_of(bench.model.config, 37, 37, method="adalora")
    found = planner.predict(48, batch_size=4, micro_batch_size=4)
    assert max(freed) <= max(masked) <= found.peak_bytes < 1.005 * max(masked)


WIDE = LlamaConfig(
    hidden_size=64, intermediate_size=2048, num_hidden_layers=1, vocab_size=64,
    num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
PAIRS = tuple(Example((3 + n, 4 + n), 1) for n in range(12))


@pytest.mark.parametrize(
    "optimizer, dtype, recovery, allocation, targets",
    [
        ("adamw", HALF, "none", {"score": "lambda", "orth_reg_weight": 0.0}, "all-linear"),
        ("sgd", HALF, "paper", {"score": "lambda", "orth_reg_weight": 0.0}, ("gate_proj",)),
        ("sgd", "float32", "none", {"score": "lambda", "orth_reg_weight": 0.0}, "all-linear"),
        ("sgd", "float32", "none", {"score": "full"}, "all-linear"),
        ("adamw", "float32", "none", {"orth_reg_weight": 0.0}, ("q_proj", "gate_proj")),
        ("adamw", "float32", "paper", {}, ("q_proj", "gate_proj")),
    ],
    ids=str,
)
@pytest.mark.sample(2)
def test_the_prediction_bounds_the_allocation_itself(
    optimizer: Any, dtype: Any, recovery: Any, allocation: dict[str, Any], targets: Any,
    each_step: list[int],
) -> None:  # fmt: skip
    """Two tokens and a rank above the hidden size: the peak is where triplets are scored, pruned
    and made smaller."""
    torch.manual_seed(0)
    model = prepare(LlamaForCausalLM(WIDE), gradient_checkpointing=False)
    spec = TrialSpec(
        role="search", method="rsadalora", rank=64, alpha=64, scaling_rule="rslora",
        learning_rate=1e-3, target_modules=targets, init_rank=96, target_rank=64,
        lambda_lr_ratio=4.0, adapter_dtype=dtype, optimizer=optimizer, batch_size=1,
        micro_batch_size=1, max_length=2, steps=6, num_evals=1,
        allocation=AllocationSpec(tinit=0, tfinal=1, recovery=recovery, **allocation),
    )  # fmt: skip
    planner = planner_of(WIDE, 2, adapter_dtype=dtype)
    found = planner.predict(
        96, batch_size=1, micro_batch_size=1, method="adalora", target_modules=targets,
        optimizer=optimizer, score=allocation.get("score", "full"),
        orth_reg="orth_reg_weight" not in allocation,
    )  # fmt: skip
    with Trial(
        Bench(model=model, base_name="x", data=data_of(PAIRS, PAIRS), device=CPU), spec
    ) as t:
        assert len(list(t.steps())) == 6
    assert 0.8 * found.peak_bytes < max(each_step) <= found.peak_bytes


# --------------------------------------------------------------------------------- a study


def test_a_budget_may_hold_lora_of_a_rank_and_not_adalora(tmp_path: Path) -> None:
    values = study_values(
        tmp_path, method=["rslora", "rsadalora"], rank=[64], alpha=[8], learning_rate=[1e-3],
        strategy="grid", trials=6, seeds=1,
    )  # fmt: skip
    values["training"] |= {"steps": 2, "num_evals": 1, "micro_batch_size": 1}
    values |= {"memory_budget": "1GiB", "adalora": {"init_ratio": 1.2}}
    setup = set_up(validate(values))
    lora, ours = (setup.space.middle(64, method) for method in ("rslora", "rsadalora"))
    needs = [setup.planner.needed_bytes(setup.smallest_prediction(s)) for s in (lora, ours)]
    assert needs[0] < needs[1]
    config = validate(values | {"memory_budget": needs[1] - 1})
    found: dict[str, TrialRecord] = {}
    for event in study_events(config, tmp_path / "out", report=False):
        if isinstance(event, TrialSettled) and event.record.role == "search":
            found[event.record.method] = event.record
        if len(found) == 2:
            break
    assert [found[m].outcome for m in ("rslora", "rsadalora")] == ["complete", "infeasible"]
    assert [found[m].smallest_budget_bytes for m in ("rslora", "rsadalora")] == needs
    refused = found["rsadalora"]
    assert (refused.rank, refused.init_rank) == (64, math.ceil(1.2 * 64))
    assert refused.measured_peak_bytes is None


# --------------------------------------------------------------------------------- the plan

CONFIG = one_layer("llama")
MODEL: dict[str, Any] = {**CONFIG.to_dict(), "dtype": "float32"}
TARGETS = ("q_proj", "down_proj")
PROFILES = Profiles()


def planned(**changes: Any) -> rsauto.Plan:
    settings: dict[str, Any] = {
        "ranks": [3, 8], "max_length": 32, "device": "cpu", "target_modules": TARGETS,
        "method": "rsadalora",
    }  # fmt: skip
    return rsauto.plan(MODEL, profiles=PROFILES, **{**settings, **changes})


def test_the_rank_of_a_plan_is_the_target_and_its_memory_that_of_the_initial_one() -> None:
    found = planned(init_ratio=1.5)
    assert [(row.rank, row.init_rank) for row in found.ranks] == [(3, 5), (8, 12)]
    planner = planner_of(
        CONFIG, 32, method="adalora", score="lambda", target_modules=TARGETS,
        attn_implementation="auto",
    )  # fmt: skip
    for row in found.ranks:
        assert row.init_rank is not None
        direct = planner.predict(row.init_rank, batch_size=1, micro_batch_size=1)
        assert row.prediction == replace(direct, rank=row.rank)
    assert planned(method="adalora", init_ratio=1.5).ranks == found.ranks
    assert [row.init_rank for row in planned(init_ratio=2.5).ranks] == [8, 20]
    assert [row.init_rank for row in planned(method="rslora").ranks] == [None, None]
    theirs = planned(method="peft_adalora", init_ratio=3).at(8)
    triplets = 8 * (32 + 32 + 1) + 8 * (48 + 32 + 1)
    assert (theirs.init_rank, theirs.prediction.num_trainable_params) == (None, triplets)


@pytest.mark.parametrize("init_ratio", [1.0, 1.1, 1.5, 1.7, 16.0])
def test_the_initial_rank_is_the_studys_own(init_ratio: float) -> None:
    values: dict[str, Any] = {
        "training": {"steps": 10, "num_evals": 1},
        "search": {"method": "rsadalora", "rank": [1, 7, 10, 30, 100]},
        "adalora": {"init_ratio": init_ratio},
    }
    config = validate(values)
    space = Space(config, config.search.ranks, steps=10, max_length=32)
    planner = planned(init_ratio=init_ratio).planner
    for rank in space.ranks:
        assert planner.initial_rank(rank) == space.middle(rank).init_rank


def test_the_score_and_orthogonality_are_planned_for() -> None:
    full, less = (planned(ranks=[64], score=score).at(64) for score in ("full", "lambda"))
    numbers = full.prediction.num_trainable_params
    saved = full.prediction.peak_bytes - less.prediction.peak_bytes
    assert saved == pytest.approx(8 * numbers, rel=0.02)
    loose = planned(ranks=[64], orth_reg=False).planner.kind
    assert loose.orth_reg is False


def test_the_largest_rank_is_a_target_as_well() -> None:
    budget = planned(batch_size=2).at(20).needed_bytes
    found = planned(batch_size=2, memory_budget=budget)
    assert found.largest_rank == 20
    assert found.at(20).fits and not found.at(21).fits
    plain = planned(batch_size=2, memory_budget=budget, method="rslora")
    assert plain.largest_rank is not None and plain.largest_rank > 30
    change = found.cheapest_change(24)
    assert change is not None and change.settings == {"micro_batch_size": 1}
    again = planned(batch_size=2, memory_budget=budget, micro_batch_size=1).at(24)
    assert again.fits and again.needed_bytes == change.needed_bytes
    frame = found.feasible(ranks=[20, 21])
    assert frame["fits"].tolist() == [True, False]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"init_ratio": 0.9}, "init_ratio: 0.9 is not a number from 1 to 16"),
        ({"init_ratio": "2"}, "init_ratio: '2' is not a number"),
        ({"init_ratio": math.nan}, "init_ratio: nan"),
        ({"score": "lambd"}, "score: 'lambd' is not known. Did you mean 'lambda'"),
        ({"orth_reg": 0.1}, "orth_reg: 0.1 is neither true nor false"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words.replace("?", r"\?")):
        planned(**changes)


def run(*arguments: str | Path, columns: int = 80) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": str(columns)})


def said(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    values = study_values(tmp_path, method=["rslora", "rsadalora"], rank=[4, 8])
    values |= {"memory_budget": "1GiB", "adalora": {"init_ratio": 2, "score": "lambda"}}
    values["adalora"]["orth_reg_weight"] = 0
    values["training"]["micro_batch_size"] = 4
    path = tmp_path / "study.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_a_study_is_planned_for_the_method_that_needs_most(study_file: Path) -> None:
    on_cpu = ("--device", "cpu")
    text = said(run(study_file, *on_cpu, columns=160))
    assert "Trained: rsAdaLoRA on all-linear" in text
    assert "A rank is the target, and memory that of the initial one, 2 times as high" in text
    assert "importance from lambda alone; P and Q are not kept orthogonal." in text
    assert "planned is rsAdaLoRA, which needs most. Give --method rslora to plan rsLoRA." in text
    ours = json.loads(run(study_file, *on_cpu, "--json").stdout)
    assert [(row["rank"], row["init_rank"]) for row in ours["ranks"]] == [(4, 8), (8, 16)]
    assert ours["method"] == "rsadalora"
    initial = [
        line.split()[:2] for line in run(study_file, *on_cpu, columns=160).stdout.splitlines()
    ]
    assert ["4", "8"] in initial and ["rank", "initial"] in initial
    other = run(study_file, *on_cpu, "--method", "rslora", "--json")
    theirs = json.loads(other.stdout)
    assert "planned is rsLoRA. Give --method rsadalora" in " ".join(other.stderr.split())
    for one, two in zip(ours["ranks"], theirs["ranks"], strict=True):
        assert two["init_rank"] is None
        assert one["needed_bytes"] > two["needed_bytes"]


def test_options_are_for_adalora_without_a_study_too(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODEL))
    settings = (
        "--model", path, "--ranks", "8", "--max-length", "32", "--device", "cpu",
        "--target-modules", ",".join(TARGETS),
    )  # fmt: skip
    given = ("--method", "adalora", "--init-ratio", "3", "--score", "full", "--json")
    (row,) = json.loads(run(*settings, *given).stdout)["ranks"]
    direct = planned(ranks=[8], init_ratio=3, score="full").at(8)
    assert (row["init_rank"], row["needed_bytes"]) == (24, direct.needed_bytes)
    wrong = run(*settings, "--method", "adalora", "--init-ratio", "0")
    assert wrong.exit_code == 2 and "init_ratio: 0.0 is not a number from 1 to 16" in wrong.stderr


# --------------------------------------------------------------------------------- estimates

T5 = T5Config(
    vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_labels=3,
    decoder_start_token_id=0,
)  # fmt: skip


def test_a_step_that_cannot_be_traced_is_estimated_with_the_importance() -> None:
    size = StepSize(12, 3, 20, 16)
    full = Profiles().predict(adalora(T5, task="SEQ_CLS", score="full"), size)
    assert full.estimated
    assert full.breakdown["optimizer"] == 16 * full.num_trainable_params
    other = estimated_profile(adalora(T5, task="SEQ_CLS", score="lambda"), "asked for")
    less = other.predict(size, "cpu")
    assert less.breakdown["optimizer"] == 8 * full.num_trainable_params
    with pytest.raises(InputError, match=r"peft_adalora cannot be planned .* Plan rslora"):
        estimated_profile(kind_of(T5, task="SEQ_CLS", method="peft_adalora"), "asked for")


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("size", [StepSize(12, 4, 40, 40), StepSize(300, 1, 8, 8)])
def test_the_estimate_is_not_below_the_traced_step(size: StepSize, checkpointed: bool) -> None:
    """The second is nearly all factors, of which Q is there once more, multiplied by lambda."""
    kind = adalora(
        SMALL_LLAMA, score="full", attn_implementation="sdpa", gradient_checkpointing=checkpointed
    )
    traced = max(itertools.accumulate(e.nbytes for e in trace_step(kind, size).events))
    found = estimated_profile(kind, "asked for").predict(size, "cpu")
    assert traced <= found.reserved_bytes < 2.2 * traced


def test_plans_are_made_anew_when_the_tuner_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept on disk is known by the code that traces, and AdaLoRA is part of it."""
    digest = profiles._versions.__wrapped__
    before, real = digest(), Path.read_bytes

    def changed(path: Path) -> bytes:
        return real(path) + (b"#" if path.parts[-2:] == ("adalora", "layer.py") else b"")

    monkeypatch.setattr(Path, "read_bytes", changed)
    assert digest() != before
