"""How many search trials are trained at once: what memory holds, and what a short probe finds fast.

Nothing here changes a result; every number that is measured is one of time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch

from rsauto.adapters.lora import remove_adapter
from rsauto.adapters.optimizers import build_optimizer
from rsauto.packing.layers import NotPackableError
from rsauto.packing.optimizer import PackedOptimizer
from rsauto.records import TrialSpec
from rsauto.search import pack_memory
from rsauto.search.agenda import num_searched
from rsauto.search.setup import Setup
from rsauto.training.loop import train
from rsauto.training.member import Advance
from rsauto.training.packed import Pack
from rsauto.training.trial import Bench, is_out_of_memory, put_on_adapter

PROBED_STEPS = range(3, 11)
"""Of every size, as many as PROBED_SECONDS allow; the first is not counted."""

PROBED_SECONDS = 0.4
"""The fastest step is what counts, so that others at the machine do not: short ones need many."""

LEAST_GAIN = 1.1
"""How much faster than one by one a pack must be, and a larger pack than a smaller one: the more
run at once, the less the sampler knows of when it proposes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlan:
    """How search trials are run."""

    size: int
    """Most trials at once; 1 runs them one by one."""
    rows: int = 1
    """Micro-batch of each."""
    tokens: int = 1
    """Mean tokens of it."""
    optimizer: PackedOptimizer = "adamw"
    admission: Literal["elastic", "together"] = "elastic"
    ratio: float | None = None
    """Time one by one over time packed, as probed; None where it was not."""
    reason: str = ""
    """Why they run one by one; empty where they do not."""
    can_hold: bool = False
    """Whether trials can stand still at a rung until others have come there."""


def plan_packs(setup: Setup, bench: Bench, specs: Sequence[TrialSpec], most: int) -> PackPlan:
    """The fastest pack of at most ``most`` trials like ``specs``; runs some steps to tell."""
    specs = [spec for spec in specs if may_share(spec, specs[:1])]
    reason = _reason_against(setup, bench, specs)
    if reason:
        return PackPlan(size=1, reason=reason)
    rows = pack_memory.pack_rows(setup, specs)
    size = pack_memory.pack_size(setup, specs, rows, most)
    plan = PackPlan(
        size=max(1, size),
        rows=rows,
        tokens=pack_memory.tokens_of(setup, specs[0].batch_size, rows),
        optimizer=cast(PackedOptimizer, specs[0].optimizer),
        admission=setup.config.packing.admission,
        can_hold=True,
    )
    if most == 1:
        name = "trials" if setup.config.packing.trials == 1 else "lookahead"
        return replace(plan, reason=f"packing.{name} is 1")
    if size < 2:
        return replace(plan, reason=_reason_of_memory(setup, specs[0], rows))
    try:
        return _fastest(setup, bench, plan, specs)
    except NotPackableError as error:
        return PackPlan(size=1, reason=str(error))
    except Exception as error:  # alone they may well run, and tell what is wrong if not
        full = is_out_of_memory(error)
        reason = "the device had no room for more" if full else f"{type(error).__name__}: {error}"
        return PackPlan(size=1, reason=f"a short probe of packs failed: {reason}")


def may_share(spec: TrialSpec, others: Sequence[TrialSpec]) -> bool:
    """Whether a trial can join a pack of others: all but rank, alpha and rates is shared.

    Those of other layers could be trained with them, but would make each other larger: what a layer
    is given is kept for all trials where one adapts it.
    """
    return not others or _kind(spec) == _kind(others[0])


def _kind(spec: TrialSpec) -> object:
    allocation = spec.allocation and replace(spec.allocation, tinit=0, tfinal=0)
    return (
        spec.optimizer, spec.batch_size, spec.adapter_dtype, spec.target_modules,
        spec.rank_pattern, allocation,
    )  # fmt: skip


def _reason_against(setup: Setup, bench: Bench, specs: Sequence[TrialSpec]) -> str:
    """Why trials cannot be packed at all; empty where they can."""
    if setup.config.packing.mode == "off":
        return "packing.mode is off"
    if setup.config.training.activation_moments:
        return "activation moments are measured of one trial at a time"
    if setup.spread.size > 1:
        return f"each is spread over {setup.spread.size} processes"
    if not specs or num_searched(setup.config) < 2:
        return "there are not two search trials to run"
    if specs[0].optimizer not in get_args(PackedOptimizer):
        return f"{specs[0].optimizer} is not packed; adamw and sgd are"
    if len(set((getattr(bench.model, "hf_device_map", None) or {}).values())) > 1:
        return "the model is spread over several devices"
    if any(
        module.p > 0 for module in bench.model.modules() if isinstance(module, torch.nn.Dropout)
    ):
        return "dropout is on"
    if specs[0].steps <= PROBED_STEPS.start:
        return f"{specs[0].steps} steps are too few to find out what is faster"
    return ""


def _reason_of_memory(setup: Setup, spec: TrialSpec, rows: int) -> str:
    if math.isinf(pack_memory.needed_bytes(setup, [spec], rows, 2)):
        return "what a pack of trials needs cannot be predicted on this model"
    return "the memory budget holds one trial at a time"


def _fastest(setup: Setup, bench: Bench, plan: PackPlan, specs: Sequence[TrialSpec]) -> PackPlan:
    """The size with the least time a trial; one by one where no pack is faster."""
    alone: dict[TrialSpec, float] = {}
    best: tuple[float, int] = (1.0, 1)
    for size in itertools.takewhile(
        lambda n: n < 2 * plan.size, (2**k for k in itertools.count(1))
    ):
        size = min(size, plan.size)
        some = list(itertools.islice(itertools.cycle(specs), size))
        if not pack_memory.fits(setup, some, plan.rows):
            some = [min(specs, key=lambda spec: spec.rank)] * size
        for spec in dict.fromkeys(some):
            if spec not in alone:
                alone[spec] = _seconds_alone(bench, _as_alone(setup, spec))
        ratio = sum(alone[spec] for spec in some) / _seconds_packed(bench, plan, some)
        if ratio < LEAST_GAIN * best[0]:
            break
        best = (ratio, size)
    ratio, size = best
    if size == 1:
        return replace(plan, size=1, reason="a short probe found packs no faster than one by one")
    return replace(plan, size=size, ratio=ratio)


def _seconds_packed(bench: Bench, plan: PackPlan, specs: Sequence[TrialSpec]) -> float:
    """Of one step of all of them together."""
    with Pack(bench, optimizer=plan.optimizer, rows=plan.rows, tokens=plan.tokens) as pack:
        for spec in specs:
            pack.admit(_probe(spec))
        return _fastest_of(map(_seconds_of, iter(pack.advance, None)), specs[0].steps)


def _seconds_of(advances: Sequence[Advance]) -> float:
    """Of a step of a whole pack."""
    return sum(advance.point.seconds for advance in advances if advance.point is not None)


def _fastest_of(seconds: Iterator[float], num_steps: int) -> float:
    """The least of the times of some steps, without the first and without the trial's last."""
    times: list[float] = []
    for time in itertools.islice(seconds, min(num_steps - 1, PROBED_STEPS.stop - 1)):
        times.append(time)
        if len(times) >= PROBED_STEPS.start and sum(times) > PROBED_SECONDS:
            break
    return min(times[1:])


def _as_alone(setup: Setup, spec: TrialSpec) -> TrialSpec:
    """As it is run alone, in the micro-batch and order of operations that are best for it."""
    prediction = setup.predict(spec)
    assert prediction is not None, "only what fits is probed"
    size, order = prediction.micro_batch_size, prediction.product_order
    return replace(_probe(spec), micro_batch_size=size, product_order=order)


def _seconds_alone(bench: Bench, spec: TrialSpec) -> float:
    """Of one step of a trial that has the device for itself."""
    adapted = put_on_adapter(bench, spec).to(bench.device)
    try:
        optimizer = build_optimizer(
            adapted,
            name=spec.optimizer,
            learning_rate=spec.learning_rate,
            lr_ratio=spec.lr_ratio,
            head_learning_rate=spec.head_learning_rate,
            lambda_lr_ratio=spec.lambda_lr_ratio,
        )
        points = train(adapted, optimizer, bench.data, spec, device=bench.device)
        return _fastest_of((point.seconds for point in points), spec.steps)
    finally:
        remove_adapter(adapted)


def _probe(spec: TrialSpec) -> TrialSpec:
    """Without evaluations on the way."""
    return replace(spec, num_evals=1)
