"""The study's rows as token ids, in the forms that trainers read without tokenising anew.

Templates, chat templates, masks and truncation are then exactly the study's, whatever a trainer
would make of the text itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rsauto.atomic import write_text
from rsauto.data import Example, TokenisedData
from rsauto.training.loss import IGNORED

FOLDER = "data"
"""Beside the settings."""


def rows_of(examples: Iterable[Example]) -> Iterator[dict[str, Any]]:
    """input_ids, attention_mask and labels, in which `IGNORED` does not count in the loss.

    Of a classifier label, the class of the row, takes the place of labels.
    """
    for example in examples:
        ids = list(example.input_ids)
        row: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if example.token_type_ids is not None:
            row["token_type_ids"] = list(example.token_type_ids)
        if example.label is not None:
            row["label"] = example.label
        else:
            counts = example.counts()
            row["labels"] = [i if c else IGNORED for i, c in zip(ids, counts, strict=True)]
        yield row


def _splits(data: TokenisedData) -> dict[str, tuple[Example, ...]]:
    return {"train": data.train, "validation": data.validation}


def write_json_lines(data: TokenisedData, folder: Path) -> None:
    """data/train.jsonl and data/validation.jsonl."""
    (folder / FOLDER).mkdir()
    for name, examples in _splits(data).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows_of(examples))
        write_text(folder / FOLDER / f"{name}.jsonl", lines)


def write_arrow(data: TokenisedData, folder: Path) -> None:
    """The folder data as `datasets.load_from_disk` reads it."""
    from datasets import Dataset, DatasetDict  # type: ignore[import-untyped, unused-ignore]

    splits = {n: Dataset.from_list(list(rows_of(rows))) for n, rows in _splits(data).items()}
    DatasetDict(splits).save_to_disk(folder / FOLDER)
