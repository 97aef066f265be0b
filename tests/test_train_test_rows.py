"""The test split: found by its name, tokenised as the other rows, left out where it is no use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertTokenizerFast

from rsauto.data.held_out import HeldOut, held_out
from rsauto.embedded import MODEL_DIR
from rsauto.embedded.task import load_split
from rsauto.study_file import validate


def write(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def found(name: object, has_token_types: bool = False, **data: Any) -> HeldOut:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    config = validate({"data": {"name": str(name), "max_length": 32, **data}}).data
    return held_out(config, tokenizer, has_token_types=has_token_types)


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n} is", "completion": f" {n + 1}"} for n in range(count)]


def labelled(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"row {n}", "label": label} for n, label in enumerate(labels)]


def test_all_rows_of_the_embedded_task() -> None:
    test = found("embedded")
    assert len(test.examples) == len(load_split("test")) == 512
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    row = load_split("test")[0]
    text = tokenizer.decode(test.examples[0].input_ids, skip_special_tokens=True)
    assert text == row["prompt"] + row["completion"]
    assert test.source == "embedded task, test, 512 rows"


def test_of_a_folder_that_has_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", train=pairs(30), test=pairs(4))
    assert len(found(folder).examples) == 4
    (folder / "test.jsonl").unlink()
    without = found(folder)
    assert not without.examples and "none in the data" in without.source


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (labelled(-1, -1), "every label in column 'label' is -1"),
        (labelled(0, 2), "has classes that were not trained: 2"),
        ([{"text": "a"}], "has no column 'label'"),
        (labelled(0, None), "no label (null)"),
    ],
)
def test_one_that_is_no_use_is_left_out_with_the_reason(
    rows: list[dict[str, Any]], words: str, tmp_path: Path
) -> None:
    train = labelled(*[0, 1] * 20)
    test = found(write(tmp_path / "data", train=train, test=rows), text="{text}", label="label")
    assert not test.examples
    assert test.source.startswith("'test' cannot be used") and words in test.source


def test_long_rows_are_cut_and_types_dropped_as_for_the_others(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "row"]))
    long = [{"text": "row " * 50, "label": 1}]
    folder = write(tmp_path / "data", train=labelled(*[0, 1] * 20), test=long)
    config = validate({"data": {"name": str(folder), "max_length": 8, "text": "{text}",
                                "label": "label"}}).data  # fmt: skip
    tokenizer = BertTokenizerFast(vocab_file=str(vocabulary))
    for has_types in (True, False):
        (example,) = held_out(config, tokenizer, has_token_types=has_types).examples
        assert len(example.input_ids) == 8 and example.label == 1
        assert (example.token_type_ids is not None) == has_types
    assert torch.tensor(example.input_ids).max() < 6
