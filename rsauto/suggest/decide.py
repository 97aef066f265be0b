"""The settings of a first study, each with its reason.

They are starting points, meant to be changed by who knows the model and the data better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rsauto.suggest.look import MOST_TRAIN_ROWS, Seen
from rsauto.units import bytes_text, count_text

FEWEST_STEPS, MOST_STEPS = 60, 300
"""Of a trial: fewer compare learning rates while they warm up, more make the search long."""

MOST_EPOCHS = 3

LARGEST_RANK = 256

SKEWED = 0.7
"""With a larger share of one class, accuracy rewards naming it always."""

LARGE_MODEL_PARAMETERS = 200 * 10**6
"""From here on a GPU should hold float32 weights in half of their size."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A line of the study file."""

    key: str
    """Dotted, such as data.max_length."""
    value: Any
    comment: str
    """What it is, why this value, what else is allowed."""
    is_active: bool = True
    """Otherwise it is written as a comment, to be switched on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """Everything that was seen and decided."""

    seen: tuple[tuple[str, str], ...]
    """(what was looked at, what it is like)"""
    settings: tuple[Setting, ...]

    def values(self) -> dict[str, Any]:
        """The active settings, nested as in a study file."""
        nested: dict[str, Any] = {}
        for setting in self.settings:
            if setting.is_active:
                section, _, name = setting.key.rpartition(".")
                (nested.setdefault(section, {}) if section else nested)[name] = setting.value
        return nested


def suggest(seen: Seen) -> Suggestion:
    """Decides on every setting that is worth a line."""
    settings = (*_memory(seen), *_model(seen), *_data(seen), *_training(seen), *_search(seen))
    return Suggestion(seen=tuple(_sentences(seen)), settings=settings)


def _memory(seen: Seen) -> Iterator[Setting]:
    size = bytes_text(seen.budget_bytes)
    auto = "free now" if seen.device.type == "cpu" else "on the device"
    here = f", here {size}" if seen.wishes.memory_budget == "auto" else ""
    yield Setting(
        "memory_budget",
        seen.wishes.memory_budget,
        f"No trial may need more. A size such as 24GiB; auto is what is {auto}{here}.",
    )
    if seen.wishes.memory_budget != "auto":
        yield Setting(
            "pack_memory_budget",
            "auto",
            f"Trials trained together stay within memory_budget; auto gives them what is {auto}.",
            is_active=False,
        )


def _model(seen: Seen) -> Iterator[Setting]:
    yield Setting("model.name", seen.wishes.model, "A hub id, a local folder, or embedded.")
    dtype, reason = _dtype(seen)
    yield Setting(
        "model.dtype",
        dtype,
        f"Of the frozen weights; {reason}. Or float32, bfloat16, float16, auto.",
    )
    weights_bytes = seen.num_params * getattr(torch, dtype).itemsize
    if 2 * weights_bytes <= seen.budget_bytes:
        return
    yield Setting(
        "model.quant_bits",
        8 if 2 * seen.num_params <= seen.budget_bytes else 4,
        f"The weights take {bytes_text(weights_bytes)} of {bytes_text(seen.budget_bytes)}: "
        "8 or 4 bits would take less (needs bitsandbytes).",
        is_active=False,
    )
    yield Setting(
        "model.gradient_checkpointing",
        True,
        "Computes activations twice instead of keeping them: less memory, a third more time.",
        is_active=False,
    )


def _dtype(seen: Seen) -> tuple[str, str]:
    """(dtype, reason)"""
    saved, on_cuda = seen.source.dtype, seen.device.type == "cuda"
    if saved == torch.float16:
        safe = "bfloat16" if on_cuda else "float32"
        return safe, "saved in float16, where small gradients vanish"
    if on_cuda and saved == torch.float32 and seen.num_params > LARGE_MODEL_PARAMETERS:
        return "bfloat16", "saved in float32, twice as large"
    return str(saved).removeprefix("torch."), "as saved"


def _data(seen: Seen) -> Iterator[Setting]:
    yield Setting(
        "data.name",
        seen.wishes.data,
        "A hub id, a json, jsonl, csv or parquet file, a folder of such files, or embedded.",
    )
    if seen.wishes.subset is not None:
        yield Setting("data.subset", seen.wishes.subset, "Configuration of the hub dataset.")
    for key, value in seen.splits.items():
        yield Setting(f"data.{key}", value, _SPLIT_COMMENTS[key])
    held_back = "" if seen.splits.keys() - {"train_split"} else ", held back from training"
    yield Setting(
        "data.validation_rows",
        seen.num_validation_rows,
        f"Rows that trials are judged on{held_back}. More judge finer and take longer.",
    )
    if seen.num_train_rows > MOST_TRAIN_ROWS:
        yield Setting(
            "data.max_train_rows",
            MOST_TRAIN_ROWS,
            f"Of {seen.num_train_rows} rows, so that a start is quick. Without it, all of them.",
        )
    for key, value in seen.reading.settings.items():
        guess = "A GUESS, please check. " if seen.reading.is_guess and key != "label" else ""
        yield Setting(f"data.{key}", value, guess + _READING_COMMENTS[key])
    max_length, reason = _max_length(seen)
    yield Setting("data.max_length", max_length, reason)
    if not seen.class_sizes:
        yield Setting(
            "data.forgetting",
            "english",
            "Also measures how much general English is forgotten. Or code, or a text file.",
            is_active=False,
        )


_SPLIT_COMMENTS = {
    "train_split": "Split that is trained on.",
    "validation_split": "Split that trials are judged on; never the test split.",
    "validation_file": "File of the rows that trials are judged on; never test rows.",
}

_READING_COMMENTS = {
    "messages": "Column of chats: lists of role and content, or of from and value.",
    "loss_on": "Every turn: the chat template does not mark the assistant's. Or completion.",
    "chat_template": "File of the Jinja template that writes chats as text.",
    "prompt": 'What is given, columns in braces, "\\n" for a line break; the loss ignores it.',
    "completion": "What the model learns to write.",
    "text": "The text, columns in braces.",
    "text_pair": "The second text of a pair.",
    "label": "Column of the class: whole numbers or names. It makes the study train a classifier.",
}


def _max_length(seen: Seen) -> tuple[int, str]:
    """(tokens, reason): 99 % of the rows are whole, as far as the model can read them."""
    most = seen.lengths[math.ceil(0.99 * len(seen.lengths)) - 1]
    multiple = 32 if most <= 256 else 64
    value = max(2, min(seen.positions, multiple * math.ceil(most / multiple)))
    num_cut = sum(length > value for length in seen.lengths)
    reason = (
        f"Tokens per row: 99 % of {len(seen.lengths)} rows have at most {most}, the longest "
        f"{seen.lengths[-1]}; {num_cut} would be cut."
    )
    return value, reason


def _training(seen: Seen) -> Iterator[Setting]:
    num_rows = min(seen.num_train_rows, MOST_TRAIN_ROWS)
    batch_size = min(32 if seen.class_sizes else 16, _power_of_two(num_rows // 4))
    steps = _steps(num_rows, batch_size)
    longest, _ = _max_length(seen)
    mean_length = sum(min(length, longest) for length in seen.lengths) / len(seen.lengths)
    epochs = steps * batch_size / num_rows
    shown = f"{epochs:.3g}"
    tokens = count_text(steps * batch_size * mean_length)
    yield Setting(
        "training.steps",
        steps,
        f"Of every trial: {shown} {'epoch' if shown == '1' else 'epochs'} of {num_rows} rows, "
        f"about {tokens} tokens. Or give epochs instead.",
    )
    yield Setting(
        "training.batch_size",
        batch_size,
        "Rows per step whatever the memory: micro-batches that fit are added up.",
    )
    if seen.class_sizes:
        yield Setting(
            "training.head_learning_rate",
            5e-4,
            "Of the classifier's head, trained whole; the same in every trial.",
        )


def _steps(num_rows: int, batch_size: int) -> int:
    """Steps of up to MOST_EPOCHS whole epochs, within FEWEST_STEPS and MOST_STEPS."""
    whole = (math.ceil(epochs * num_rows / batch_size) for epochs in range(MOST_EPOCHS, 0, -1))
    return max(FEWEST_STEPS, next((steps for steps in whole if steps <= MOST_STEPS), MOST_STEPS))


def _search(seen: Seen) -> Iterator[Setting]:
    high = min(LARGEST_RANK, _power_of_two(seen.width // 2))
    low = min(high, 4 if seen.width >= 1024 else 2)
    num_ranks = high.bit_length() - low.bit_length() + 1
    yield Setting(
        "search.trials",
        min(30, max(24, 14 + 2 * num_ranks)),
        "In all: the defaults, one of every rank, the search, the finalists' other seeds.",
    )
    yield Setting(
        "search.rank",
        {"low": low, "high": high},
        f"Powers of two, up to half of the model's width {seen.width}. Or a list such as [8, 16].",
    )
    yield Setting(
        "search.alpha",
        {"low": 8, "high": 64},
        "Powers of two; rsLoRA scales by alpha / sqrt(rank). Or a list.",
    )
    yield Setting(
        "search.learning_rate",
        learning_rates(seen.width),
        f"At rank 8, moved for other ranks. Two decades, from the width {seen.width}. Or a list.",
    )
    yield Setting("search.seeds", 3, "Seeds that the finalists are compared on.")
    objective, reason = _objective(seen)
    yield Setting("search.objective", objective, reason)
    yield Setting(
        "packing.trials",
        8,
        "Most trials trained together, where a short probe finds that faster. 1: one by one.",
    )


def learning_rates(width: int) -> dict[str, float]:
    """Two decades around 1e-4 at width 4096, inversely proportional to it, to one digit.

    Adam's best rate for hidden layers goes as 1 / width (arXiv:2203.03466, table 3); widths below
    128 and above 8192 are taken as these.
    """
    middle = 1e-4 * 4096 / min(8192, max(128, width))
    return {"low": float(f"{middle / 10:.0e}"), "high": float(f"{middle * 10:.0e}")}


def _objective(seen: Seen) -> tuple[str, str]:
    """(metric, reason)"""
    if not seen.class_sizes:
        return "eval_loss", "What is searched for. Or perplexity, token_accuracy, exact_match."
    share = seen.class_sizes[0] / sum(seen.class_sizes)
    chosen = "matthews" if share > SKEWED else "accuracy"
    return chosen, (
        f"What is searched for; the largest class has {share:.0%} of the rows. "
        "Or accuracy, f1, matthews, eval_loss."
    )


def _power_of_two(number: int) -> int:
    """The largest that is not above ``number``, at least 1."""
    return 1 << (max(1, number).bit_length() - 1)


def _sentences(seen: Seen) -> Iterator[tuple[str, str]]:
    params = count_text(seen.num_params)
    model = f"{seen.wishes.model}: {seen.source.config.model_type}, {params} parameters"
    yield "model", f"{model}, width {seen.width}, reads {seen.positions} tokens"
    train, validation = seen.num_train_rows, seen.num_validation_rows
    yield "data", f"{seen.wishes.data}: {train} rows to train on, {validation} to validate on"
    read = ", ".join(f"{key} {value!r}" for key, value in seen.reading.settings.items())
    check = "; a guess, please check it" if seen.reading.is_guess else ""
    yield "format", f"{read}, because {seen.reading.reason}{check}"
    if seen.class_sizes:
        share = seen.class_sizes[0] / sum(seen.class_sizes)
        yield "classes", f"{len(seen.class_sizes)}, the largest has {share:.0%} of the rows"
