"""What a model and a dataset are like: the figures that a first study is decided on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rsauto.architecture import NotADecoderError, auto_class, num_positions
from rsauto.base import BaseSource, open_base, pick_device
from rsauto.config import DataConfig, StudyConfig, TaskType
from rsauto.data import load_rows, tokenise
from rsauto.data.chat_tokens import ChatTemplate
from rsauto.data.files import Table, extension, stem
from rsauto.data.load import is_test, split_loaders
from rsauto.errors import InputError
from rsauto.search.setup import memory_budget_bytes
from rsauto.study_file import validate
from rsauto.suggest.columns import (
    Reading,
    guessed_reading,
    known_reading,
    labelled_reading,
    look_at,
)

MOST_TRAIN_ROWS = 50_000
"""More would be tokenised at every start, and trials of a few hundred steps see less."""

MEASURED_ROWS: dict[TaskType, int] = {"CAUSAL_LM": 5000, "SEQ_CLS": MOST_TRAIN_ROWS}
"""Training rows tokenised to see how long they are; rare classes must be among them, too."""

VALIDATION_ROWS: dict[TaskType, int] = {"CAUSAL_LM": 200, "SEQ_CLS": 1000}
"""At most. A class is one observation, a completion many: accuracy needs more rows than loss."""

UNLIMITED_POSITIONS = 2**20
"""Of models that name no limit."""

_VALIDATION_WORDS = ("validation", "valid", "val", "dev")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What was asked for; the rest is decided."""

    model: str = "embedded"
    data: str = "embedded"
    subset: str | None = None
    label: str | None = None
    chat_template: str | None = None
    memory_budget: str = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A model and a dataset in figures."""

    wishes: Wishes
    source: BaseSource
    device: torch.device
    budget_bytes: int
    num_params: int
    positions: int
    """Tokens that the model can read."""
    reading: Reading
    splits: dict[str, str]
    """Keys of the data section that say which rows are for training and for validation."""
    num_train_rows: int
    num_validation_rows: int
    lengths: tuple[int, ...]
    """Tokens per row, ascending, of validation and of MEASURED_ROWS training rows."""
    class_sizes: tuple[int, ...]
    """Rows of each class among these, the largest first; empty for language modelling."""

    @property
    def width(self) -> int:
        """Features of a hidden state."""
        return int(self.source.config.get_text_config().hidden_size)


def look(wishes: Wishes) -> Seen:
    """Reads configuration, tokenizer and rows, and no weights.

    Raises InputError, as a study would, when something is not there or cannot be used.
    """
    config = _config(wishes)
    splits, table = _splits(config.data)
    source, reading = _task(config, table, wishes.label)
    if "messages" in reading.settings or wishes.chat_template is not None:
        reading = _as_chat(reading, source, wishes.chat_template)
    positions = _positions(source)
    data = _config(
        wishes,
        **splits,
        **reading.settings,
        validation_rows=VALIDATION_ROWS[source.task],
        max_train_rows=MEASURED_ROWS[source.task],
        max_length=max(2, positions),
    ).data
    rows = load_rows(data)
    tokens = tokenise(rows, data, source.tokenizer)
    is_held_back = not splits.keys() & {"validation_split", "validation_file"}
    sizes = Counter(example.label for example in tokens.train if example.label is not None)
    device = pick_device()
    return Seen(
        wishes=wishes,
        source=source,
        device=device,
        budget_bytes=memory_budget_bytes(config, device),
        num_params=_num_params(source),
        positions=positions,
        reading=reading,
        splits=splits,
        num_train_rows=len(table) - (len(rows.validation) if is_held_back else 0),
        num_validation_rows=len(rows.validation),
        lengths=tuple(sorted(tokens.train_fit.lengths + tokens.validation_fit.lengths)),
        class_sizes=tuple(sorted(sizes.values(), reverse=True)),
    )


def _config(wishes: Wishes, **data: Any) -> StudyConfig:
    values: Mapping[str, Any] = {
        "memory_budget": wishes.memory_budget,
        "model": {"name": wishes.model},
        "data": {"name": wishes.data, "subset": wishes.subset, **data},
    }
    return validate(values, source="rsauto init")


def _splits(config: DataConfig) -> tuple[dict[str, str], Table]:
    """Which split is for training and which for validation, and the rows of the first."""
    loaders = split_loaders(config)
    usable = [name for name in loaders if not is_test(name)]
    if not usable:
        raise InputError(
            f"data.name: {config.name!r} has only {', '.join(loaders)}, and rsauto neither trains "
            "nor chooses on a test split. Name training data."
        )
    called_train = [name for name in usable if name.lower().startswith("train")]
    train = "train" if "train" in usable else (called_train or usable)[0]
    chosen = {} if train == "train" else {"train_split": train}
    others = [n for n in usable if n.lower().startswith(_VALIDATION_WORDS) and n != train]
    beside = _validation_file(Path(config.name).expanduser())
    if others:
        chosen["validation_split"] = others[0]
    elif beside is not None:
        chosen["validation_file"] = str(beside)
    return chosen, loaders[train]()


def _validation_file(train: Path) -> Path | None:
    """validation.jsonl, dev.jsonl, ... beside a train.jsonl."""
    if not (train.is_file() and stem(train).startswith("train")):
        return None
    names = [train.name.replace("train", word, 1) for word in _VALIDATION_WORDS]
    found = [train.with_name(name) for name in names if train.with_name(name).is_file()]
    return found[0] if found and extension(found[0]) else None


def _task(config: StudyConfig, table: Table, label: str | None) -> tuple[BaseSource, Reading]:
    """What columns and architecture are made for: language modelling or classification."""
    columns = look_at(table)
    labelled = labelled_reading(columns, label)
    known = known_reading(columns) if label is None else None
    if labelled is not None and known is None:
        return open_base(config.model, "SEQ_CLS"), labelled
    try:
        source = open_base(config.model, "CAUSAL_LM")
    except NotADecoderError:
        pass
    else:
        return source, known or guessed_reading(columns, table.source)
    if labelled is None:
        names = ", ".join(repr(column.name) for column in columns)
        raise InputError(
            f"model.name: {config.model.name!r} is an encoder, which classifies texts, but no "
            f"column of {table.source} looks like a class. Name one with --label (the columns are "
            f"{names}), or choose a decoder such as Llama, Qwen or GPT-2."
        )
    return open_base(config.model, "SEQ_CLS"), labelled


def _as_chat(reading: Reading, source: BaseSource, chat_template: str | None) -> Reading:
    """With the template that was given, or every turn trained on where the own one has no marks."""
    if chat_template is not None:
        return replace(reading, settings={**reading.settings, "chat_template": chat_template})
    template = ChatTemplate(None, source.tokenizer)
    template.source(has_tools=False)
    try:
        template.require_marks((False, True))
    except InputError:
        return replace(reading, settings={**reading.settings, "loss_on": "all"})
    return reading


def _positions(source: BaseSource) -> int:
    """The lesser of what the model can read and what its tokenizer says it can."""
    of_model = num_positions(source.config) or UNLIMITED_POSITIONS
    return min(of_model, int(source.tokenizer.model_max_length))


def _num_params(source: BaseSource) -> int:
    with torch.device("meta"):
        return int(
            auto_class(source.task)
            .from_config(source.config, trust_remote_code=False)
            .num_parameters()
        )
