"""The model's configuration and the rows of a study, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rsauto.adapters.head import is_classifier
from rsauto.architecture import is_encoder, num_positions, pad_like
from rsauto.base import BaseSource, open_base, weights_fingerprint, with_labels
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
from rsauto.errors import InputError


@dataclass(frozen=True)
class Objects:
    """A model and data that are already loaded, given through Python instead of by name."""

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    train: Sequence[Mapping[str, Any]] | None = None
    validation: Sequence[Mapping[str, Any]] | None = None


class Read(NamedTuple):
    """What a study is about."""

    source: BaseSource
    data: TokenisedData
    preflight: Preflight


def read(config: StudyConfig, objects: Objects) -> Read:
    """Configuration, tokenizer and data. Raises InputError for anything wrong with them."""
    source = _source(config, objects)
    data, checks = _read_data(config, objects, source)
    _require_positions(source, data)
    _require_vocabulary(source, data)
    if data.label_names is not None:
        source = _with_labels(source, objects, data)
    return Read(source, data, checks)


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
