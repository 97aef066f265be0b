"""Everything a study needs to know before the first weight is read or the first file written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rsauto.adapters.head import is_classifier
from rsauto.architecture import is_encoder, num_positions, pad_like
from rsauto.base import (
    BaseSource,
    LoadedBase,
    load_weights,
    open_base,
    pick_device,
    prepare,
    to_device,
    weights_fingerprint,
    with_labels,
)
from rsauto.config import StudyConfig
from rsauto.data import (
    Preflight,
    TokenisedData,
    general_examples,
    load_rows,
    preflight,
    splits_from_objects,
    tokenise,
    without_token_types,
)
from rsauto.devices import card_of, outside_bytes
from rsauto.errors import BudgetError, InputError
from rsauto.memory.kinds import Attention, DtypeName, Prediction, StepKind
from rsauto.memory.planner import MemoryPlanner, TrialSettings
from rsauto.memory.product import mean_tokens, planned_order
from rsauto.memory.profiles import Profiles
from rsauto.quantisation import saved_bits
from rsauto.records import AllocationSpec, ProductOrder, TrialSpec
from rsauto.search.space import Space
from rsauto.training.evaluate import FORGETTING_METRICS, METRICS
from rsauto.units import bytes_text


@dataclass(frozen=True)
class Objects:
    """A model and data that are already loaded, given through Python instead of by name."""

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    train: Sequence[Mapping[str, Any]] | None = None
    validation: Sequence[Mapping[str, Any]] | None = None


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

    def predict(self, spec: TrialSpec) -> Prediction | None:
        """The trial at the largest micro-batch that fits the budget, None when none does.

        In the order of operations that takes fewer of them there, if that fits as well.
        """
        found = self.at_largest_micro_batch(spec)
        if found is None or self._cheaper_order(spec, found.micro_batch_size) == "factors":
            return found
        merged = self.planner.predict(
            spec.rank,
            batch_size=spec.batch_size,
            micro_batch_size=found.micro_batch_size,
            **planned(spec) | {"product_order": "merged"},
        )
        fits = self.planner.needed_bytes(merged) <= self.memory_budget_bytes
        return merged if fits and not merged.estimated else found

    def at_largest_micro_batch(self, spec: TrialSpec) -> Prediction | None:
        """`predict` in the plain order of operations, in which every method and dtype can run."""
        found = self.planner.largest_micro_batch(
            spec.init_rank or spec.rank,
            memory_budget_bytes=self.memory_budget_bytes,
            batch_size=spec.batch_size,
            micro_batch_size=self.config.training.micro_batch_size,
            **planned(spec),
        )
        return None if found is None else replace(found, rank=spec.rank)

    def _cheaper_order(self, spec: TrialSpec, micro_batch_size: int) -> ProductOrder:
        lengths = [len(example.input_ids) for example in self.data.train]
        num_tokens = mean_tokens(lengths, spec.batch_size, micro_batch_size)
        return planned_order(replace(self.planner.kind, **planned(spec)), spec.rank, num_tokens)

    def smallest_prediction(self, spec: TrialSpec) -> Prediction:
        """What the trial needs at the smallest micro-batch it may use."""
        micro = self.config.training.micro_batch_size
        found = self.planner.predict(
            spec.init_rank or spec.rank,
            batch_size=spec.batch_size,
            micro_batch_size=1 if micro == "auto" else micro,
            **planned(spec),
        )
        return replace(found, rank=spec.rank)

    def load_model(self) -> LoadedBase:
        """The base model on the device, frozen."""
        if self.objects.model is not None:
            checkpointing = self.config.model.gradient_checkpointing
            return LoadedBase(to_device(prepare(self.objects.model, checkpointing), self.device))
        return load_weights(self.source, self.config.model, self.device)


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


def set_up(config: StudyConfig, objects: Objects | None = None) -> Setup:
    """Reads configuration, tokenizer and data, and plans memory.

    Raises InputError for anything wrong with them, and BudgetError when no rank fits.
    """
    objects = objects or Objects()
    _check_objective(config)
    device = pick_device()
    source = _source(config, objects)
    data, checks = _read_data(config, objects, source)
    _require_positions(source, data)
    _require_vocabulary(source, data)
    if data.label_names is not None:
        source = _with_labels(source, objects, data)
    quant_bits = saved_bits(source.config) or config.model.quant_bits
    setup = Setup(
        config=config,
        device=device,
        source=source,
        objects=objects,
        data=data,
        preflight=checks,
        planner=_planner(config, source, data, device),
        memory_budget_bytes=memory_budget_bytes(config, device),
        space=Space(
            config, config.search.ranks, _steps(config, data), config.data.max_length, quant_bits
        ),
    )
    return replace(setup, space=replace(setup.space, ranks=_feasible_ranks(setup)))


def _planner(
    config: StudyConfig, source: BaseSource, data: TokenisedData, device: torch.device
) -> MemoryPlanner:
    """Plans for the longest batches that the data can give."""
    kind = StepKind(
        model_config=source.config.to_json_string(use_diff=False),
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
        train_lengths=_lengths_of_a_batch(data, config.training.batch_size),
        eval_length=max(data.validation_length, *(len(e.input_ids) for e in data.general), 1),
        profiles=Profiles.on_disk(),
        outside_bytes=_outside_bytes(device),
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


def _require_positions(source: BaseSource, data: TokenisedData) -> None:
    """Raises InputError when rows are longer than the model has positions for."""
    limit = num_positions(source.config)
    longest = max(data.train_length, data.validation_length)
    if limit is not None and longest > limit:
        raise InputError(
            f"data.max_length: rows have up to {longest} tokens, but {source.name!r} has "
            f"positions for {limit}. Set data.max_length to at most {limit}."
        )


def _require_vocabulary(source: BaseSource, data: TokenisedData) -> None:
    """Raises InputError when the tokenizer has ids that the model has no embedding for."""
    size = int(source.config.get_text_config().vocab_size)
    examples = (*data.train, *data.validation, *data.general)
    largest = max(data.pad_token_id, *(max(example.input_ids) for example in examples))
    if largest >= size:
        raise InputError(
            f"model.name: the tokenizer gives token {largest}, but {source.name!r} has a "
            f"vocabulary of {size}. They do not belong together, or tokens were added to the "
            "tokenizer and the model's embeddings were not resized."
        )


def _source(config: StudyConfig, objects: Objects) -> BaseSource:
    if objects.model is None:
        return open_base(config.model, config.data.task)
    if objects.tokenizer is None:
        raise InputError("tokenizer: give the tokenizer together with the model.")
    if config.model.quant_bits is not None:
        raise InputError(
            f"model.quant_bits: {config.model.quant_bits}, but the given model is loaded already. "
            "Load it quantised yourself, and leave model.quant_bits out."
        )
    if is_classifier(objects.model) != (config.data.task == "SEQ_CLS"):
        raise InputError(
            f"model: a {type(objects.model).__name__} was given, but "
            + ("data.label is not." if is_classifier(objects.model) else "data.label is, too.")
            + " A sequence classifier and data.label belong together."
        )
    if config.data.task == "CAUSAL_LM" and is_encoder(objects.model.config):
        raise InputError(
            f"model: {type(objects.model).__name__} reads both ways, so it would see the tokens it "
            "is to predict. Give a decoder; or, to classify texts, data.label."
        )
    return BaseSource(
        name=str(objects.model.config.name_or_path or "in-memory"),
        config=objects.model.config,
        tokenizer=objects.tokenizer,
        dtype=objects.model.dtype,
        attn_implementation=str(objects.model.config._attn_implementation),
        task=config.data.task,
        fingerprint=weights_fingerprint(objects.model),
    )


def _with_labels(source: BaseSource, objects: Objects, data: TokenisedData) -> BaseSource:
    """The source with the data's classes. Raises InputError where a loaded model has others."""
    assert data.label_names is not None
    if objects.model is None:
        return with_labels(source, data.label_names, data.pad_token_id)
    if source.config.num_labels != len(data.label_names):
        raise InputError(
            f"model: it was loaded with num_labels={source.config.num_labels}, but the data have "
            f"{len(data.label_names)} classes. Load it with num_labels={len(data.label_names)}."
        )
    pad_like(source.config, data.pad_token_id)
    return source


def _read_data(
    config: StudyConfig, objects: Objects, source: BaseSource
) -> tuple[TokenisedData, Preflight]:
    if objects.train is None:
        splits = load_rows(config.data)
    else:
        splits = splits_from_objects(objects.train, objects.validation, config.data)
    data = tokenise(splits, config.data, source.tokenizer)
    if getattr(source.config, "type_vocab_size", 0) < 2:
        data = without_token_types(data)
    if config.data.forgetting is not None:
        longest = max(data.train_length, data.validation_length)
        general = general_examples(config.data.forgetting, source.tokenizer, longest)
        data = replace(data, general=general)
    return data, preflight(splits, data, config.data, source.tokenizer)


def _steps(config: StudyConfig, data: TokenisedData) -> int:
    training = config.training
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    return max(1, math.ceil(training.epochs * len(data.train) / training.batch_size))


def _check_objective(config: StudyConfig) -> None:
    known = ("eval_loss", *METRICS[config.data.task])
    if config.data.forgetting is not None:
        known += FORGETTING_METRICS
    if config.search.objective not in known:
        raise InputError(
            f"search.objective: {config.search.objective!r} is not measured. "
            f"Choose one of {', '.join(known)}."
        )
