"""Everything a study needs to know before the first weight is read or the first file written."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import cast

import psutil
import torch

from rsauto.base import BaseSource, LoadedBase, load_weights, pick_device, prepare, to_device
from rsauto.config import StudyConfig
from rsauto.data import Preflight, TokenisedData
from rsauto.devices import card_of, outside_bytes
from rsauto.errors import BudgetError, InputError
from rsauto.memory.kinds import (
    Attention,
    DtypeName,
    Prediction,
    StepKind,
    configuration_text,
)
from rsauto.memory.planner import MemoryPlanner, MicroBatch, TrialSettings
from rsauto.memory.product import mean_tokens, planned_order
from rsauto.memory.profiles import Profiles
from rsauto.memory.sharded import ShardedBase, sharded_base
from rsauto.quantisation import saved_bits
from rsauto.records import AllocationSpec, ProductOrder, TrialSpec
from rsauto.search.reading import Objects as Objects
from rsauto.search.reading import read
from rsauto.search.space import Space
from rsauto.training.evaluate import FORGETTING_METRICS, METRICS
from rsauto.training.spread import ALONE, Spread
from rsauto.units import bytes_text


@dataclass(frozen=True)
class Setup:
    """A study that may start: its data are read, and at least one rank fits."""

    config: StudyConfig
    device: torch.device
    source: BaseSource
    objects: Objects
    data: TokenisedData
    preflight: Preflight
    planner: MemoryPlanner
    memory_budget_bytes: int
    space: Space
    """Restricted to ranks that fit with at least one choice of layers."""
    spread: Spread = ALONE
    """The processes that train each trial together; the budget is that of the device of each."""

    def rows_of_a_device(self, batch_size: int) -> tuple[int, MicroBatch]:
        """(rows of a batch on the device that has most, micro-batch), one a multiple of the other.

        Without a multiple to be had the last micro-batch is smaller, and planned as a whole one.
        """
        rows, micro = (
            math.ceil(batch_size / self.spread.size),
            self.config.training.micro_batch_size,
        )
        if micro == "auto":
            return rows, micro
        size = min(micro, rows)
        return size * math.ceil(rows / size), size

    def predict(self, spec: TrialSpec) -> Prediction | None:
        """The trial at the largest micro-batch that fits the budget, None when none does.

        In the order of operations that takes fewer of them there, if that fits as well.
        """
        found = self.at_largest_micro_batch(spec)
        if found is None or self._cheaper_order(spec, found.micro_batch_size) == "factors":
            return found
        merged = self.planner.predict(
            spec.rank,
            batch_size=self.rows_of_a_device(spec.batch_size)[0],
            micro_batch_size=found.micro_batch_size,
            **planned(spec) | {"product_order": "merged"},
        )
        fits = self.planner.needed_bytes(merged) <= self.memory_budget_bytes
        return merged if fits and not merged.estimated else found

    def at_largest_micro_batch(self, spec: TrialSpec) -> Prediction | None:
        """`predict` in the plain order of operations, in which every method and dtype can run."""
        rows, micro = self.rows_of_a_device(spec.batch_size)
        found = self.planner.largest_micro_batch(
            spec.init_rank or spec.rank,
            memory_budget_bytes=self.memory_budget_bytes,
            batch_size=rows,
            micro_batch_size=micro,
            **planned(spec),
        )
        return None if found is None else replace(found, rank=spec.rank)

    def _cheaper_order(self, spec: TrialSpec, micro_batch_size: int) -> ProductOrder:
        lengths = [len(example.input_ids) for example in self.data.train]
        rows, _ = self.rows_of_a_device(spec.batch_size)
        num_tokens = mean_tokens(lengths, rows, micro_batch_size)
        return planned_order(replace(self.planner.kind, **planned(spec)), spec.rank, num_tokens)

    def smallest_prediction(self, spec: TrialSpec) -> Prediction:
        """What the trial needs at the smallest micro-batch it may use."""
        rows, micro = self.rows_of_a_device(spec.batch_size)
        found = self.planner.predict(
            spec.init_rank or spec.rank,
            batch_size=rows,
            micro_batch_size=1 if micro == "auto" else micro,
            **planned(spec),
        )
        return replace(found, rank=spec.rank)

    def load_model(self) -> LoadedBase:
        """The base model on the device, frozen; on the CPU where it is to be sharded."""
        if self.objects.model is not None:
            checkpointing = self.config.model.gradient_checkpointing
            return LoadedBase(to_device(prepare(self.objects.model, checkpointing), self.device))
        device = torch.device("cpu") if self.spread.shards_base else self.device
        return load_weights(self.source, self.config.model, device)


def planned(spec: TrialSpec) -> TrialSettings:
    """What the memory of a trial depends on, beside its rank and batch. AdaLoRA needs most at its
    initial rank."""
    allocation = spec.allocation or AllocationSpec(tinit=0, tfinal=0)
    return {
        # Equal kinds of step share their traces: the scaling rule is of no account.
        "method": "lora" if spec.allocation is None else "adalora",
        "target_modules": spec.target_modules,
        "rank_pattern": spec.rank_pattern,
        "score": allocation.score,
        "orth_reg": allocation.orth_reg_weight > 0,
        "optimizer": spec.optimizer,
        "clip": spec.max_grad_norm is not None,
    }


def set_up(config: StudyConfig, objects: Objects | None = None, spread: Spread = ALONE) -> Setup:
    """Reads configuration, tokenizer and data, and plans memory.

    Raises InputError for anything wrong with them, and BudgetError when no rank fits.
    """
    setup = set_up_unrestricted(config, objects, spread)
    return replace(setup, space=replace(setup.space, ranks=_feasible_ranks(setup)))


def set_up_unrestricted(
    config: StudyConfig, objects: Objects | None = None, spread: Spread = ALONE
) -> Setup:
    """`set_up` without asking which ranks fit: its space has them all."""
    objects = objects or Objects()
    _check_objective(config)
    _require_shares(config, objects, spread)
    device = pick_device()
    source, data, checks = read(config, objects)
    quant_bits = saved_bits(source.config) or config.model.quant_bits
    return Setup(
        config=config,
        device=device,
        source=source,
        objects=objects,
        data=data,
        preflight=checks,
        planner=_planner(config, source, data, device, spread),
        memory_budget_bytes=memory_budget_bytes(config, device),
        space=Space(
            config, config.search.ranks, _steps(config, data), config.data.max_length, quant_bits
        ),
        spread=spread,
    )


def _planner(
    config: StudyConfig,
    source: BaseSource,
    data: TokenisedData,
    device: torch.device,
    spread: Spread,
) -> MemoryPlanner:
    """Plans for the longest batches that the data can give to a device, the first one's."""
    lengths = _lengths_of_a_batch(data, config.training.batch_size)
    base: ShardedBase | None = None
    if spread.shards_base:
        bits = saved_bits(source.config) or config.model.quant_bits
        base = sharded_base(source, bits, spread.size)
    kind = StepKind(
        model_config=configuration_text(json.loads(source.config.to_json_string(use_diff=False))),
        task=source.task,
        dtype=cast(DtypeName, str(source.dtype).removeprefix("torch.")),
        adapter_dtype=config.model.adapter_dtype,
        quant_bits=saved_bits(source.config) or config.model.quant_bits,
        attn_implementation=cast(Attention, source.attn_implementation),
        gradient_checkpointing=config.model.gradient_checkpointing,
        has_token_types=data.train[0].token_type_ids is not None,
        device_type="cuda" if device.type == "cuda" else "cpu",
    )
    return MemoryPlanner(
        kind,
        train_lengths=lengths[:: spread.size],
        eval_length=max(data.validation_length, *(len(e.input_ids) for e in data.general), 1),
        profiles=Profiles.on_disk(),
        outside_bytes=_outside_bytes(device),
        sharded_base=base,
    )


def _lengths_of_a_batch(data: TokenisedData, batch_size: int) -> list[int]:
    """Tokens of the sequences of the longest batch there can be, longest first.

    Where an epoch does not fill its last batch, the next one does, and may bring a row again. Of
    fewer rows than a batch has, some come several times: only the longest is then certain.
    """
    lengths = sorted((len(example.input_ids) for example in data.train), reverse=True)
    if len(lengths) < batch_size:
        return lengths[:1]
    if len(lengths) % batch_size:
        lengths = [length for length in lengths for _ in range(2)]
    return lengths[:batch_size]


def _outside_bytes(device: torch.device) -> int:
    """What CUDA keeps outside of PyTorch's allocator on this very card."""
    if device.type != "cuda":
        return 0
    return outside_bytes(card_of(torch.cuda.get_device_properties(device)))


def memory_budget_bytes(config: StudyConfig, device: torch.device) -> int:
    """The budget in bytes; 'auto' is the device's whole memory, on a CPU what is free now."""
    if config.memory_budget != "auto":
        return config.memory_budget
    return device_bytes(device)


def device_bytes(device: torch.device) -> int:
    """All memory of a GPU; on a CPU what is free now."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().available)


def feasible_ranks(setup: Setup) -> tuple[int, ...]:
    """Ranks of the space that fit with at least one choice of layers. Raises BudgetError."""
    fitting = tuple(
        rank
        for rank in setup.space.ranks
        if any([setup.at_largest_micro_batch(spec) is not None for spec in probes(setup, rank)])
    )
    if not fitting:
        smallest = min(
            (setup.smallest_prediction(spec) for spec in probes(setup, setup.space.ranks[0])),
            key=setup.planner.needed_bytes,
        )
        raise BudgetError(
            f"memory_budget: {bytes_text(setup.memory_budget_bytes)} is too little for any rank. "
            f"The smallest, rank {smallest.rank}, needs "
            f"{bytes_text(setup.planner.needed_bytes(smallest))} at micro_batch_size "
            f"{smallest.micro_batch_size}. Raise memory_budget, or lower search.rank, "
            "data.max_length or model.dtype, turn on model.gradient_checkpointing, or set "
            "model.quant_bits: 4."
        )
    return fitting


def with_allowance(setup: Setup, share: float) -> Setup:
    """The setup with another share added to every prediction; its space may have no rank left."""
    changed = replace(setup, planner=setup.planner.with_allowance(share))
    unrestricted = replace(changed, space=replace(setup.space, ranks=setup.config.search.ranks))
    try:
        ranks = feasible_ranks(unrestricted)
    except BudgetError:
        ranks = ()
    return replace(changed, space=replace(setup.space, ranks=ranks))


def probes(setup: Setup, rank: int) -> list[TrialSpec]:
    """One trial of ``rank`` for every method and choice of layers; nothing else changes bytes."""
    middles = [setup.space.middle(rank, method) for method in setup.config.search.method]
    choices = setup.config.target_choices()
    return [replace(middle, target_modules=t) for middle in middles for t in choices]


def _feasible_ranks(setup: Setup) -> tuple[int, ...]:
    """`feasible_ranks`, its errors told in the words of the setting they come from."""
    try:
        return feasible_ranks(setup)
    except InputError as error:
        if setup.config.search.target_modules is None:
            raise
        raise InputError(
            [p.replace("model.target_modules", "search.target_modules") for p in error.problems]
        ) from None


def _steps(config: StudyConfig, data: TokenisedData) -> int:
    training = config.training
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    return max(1, math.ceil(training.epochs * len(data.train) / training.batch_size))


def _require_shares(config: StudyConfig, objects: Objects, spread: Spread) -> None:
    """Raises InputError for what cannot be spread over several processes."""
    if spread.size == 1:
        return
    if objects.model is not None or objects.train is not None:
        raise InputError(
            f"model, train: objects of one process, but {spread.size} were launched, each of which "
            "loads its own. Name them in model.name and data.name instead."
        )
    if config.training.batch_size < spread.size:
        raise InputError(
            f"training.batch_size: {config.training.batch_size} rows cannot be shared out over "
            f"{spread.size} processes. Set it to at least {spread.size}, or launch fewer."
        )


def _check_objective(config: StudyConfig) -> None:
    known = ("eval_loss", *METRICS[config.data.task])
    if config.data.forgetting is not None:
        known += FORGETTING_METRICS
    if config.search.objective not in known:
        raise InputError(
            f"search.objective: {config.search.objective!r} is not measured. "
            f"Choose one of {', '.join(known)}."
        )
