"""Labelled text becomes classes and sequences as BERT reads them, or is refused with a reason."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerBase

from rsauto import embedded
from rsauto.config import DataConfig
from rsauto.data import (
    Preflight,
    Splits,
    TokenisedData,
    collate,
    lines,
    load_rows,
    preflight,
    splits_from_objects,
    tokenise,
)
from rsauto.data.order import stratified
from rsauto.errors import InputError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "b", "c", "d"]
PAD, _, CLS, SEP, _, GOOD, BAD, FILM, A, B, C, D = range(len(WORDS))

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def bert() -> PreTrainedTokenizerBase:
    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer: PreTrainedTokenizerBase = BertTokenizerFast(vocab=vocab)
    return tokenizer


def splits_of(train: Any, validation: Any = None, **settings: Any) -> Splits:
    config = DataConfig(label="label", **settings)
    return splits_from_objects(train, validation or train, config)


def tokens_of(
    train: Rows, tokenizer: PreTrainedTokenizerBase, validation: Any = None, **settings: Any
) -> TokenisedData:
    config = DataConfig(label="label", **settings)
    return tokenise(splits_of(train, validation, **settings), config, tokenizer)


def labelled(*labels: Any) -> Rows:
    return [{"text": f"film {i}", "label": label} for i, label in enumerate(labels)]


def test_one_text_is_read_as_bert_reads_it(bert: PreTrainedTokenizerBase) -> None:
    train = [{"text": "good film", "label": 1}, {"text": "bad", "label": 0}]
    data = tokens_of(train, bert)
    assert [e.input_ids for e in data.train] == [(CLS, GOOD, FILM, SEP), (CLS, BAD, SEP)]
    assert [e.label for e in data.train] == [1, 0]
    assert (data.label_names, data.task) == (("0", "1"), "SEQ_CLS")
    batch = collate(data.train, data.pad_token_id)
    assert batch.labels.tolist() == [1, 0]
    assert batch.input_ids.tolist() == [[CLS, GOOD, FILM, SEP], [CLS, BAD, SEP, PAD]]


def test_pairs_have_token_types_and_are_cut_between_special_tokens(
    bert: PreTrainedTokenizerBase,
) -> None:
    train = [
        {"premise": "a b", "hypothesis": "c", "label": "no"},
        {"premise": "a b c d", "hypothesis": "d", "label": "yes"},
    ]
    data = tokens_of(train, bert, max_length=6)
    assert [e.input_ids for e in data.train] == [
        (CLS, A, B, SEP, C, SEP),
        (CLS, A, B, SEP, D, SEP),
    ]
    assert [e.token_type_ids for e in data.train] == [(0, 0, 0, 0, 1, 1)] * 2
    assert (data.train_fit.lengths, data.train_fit.num_truncated) == ((6, 8), 1)
    batch = collate(data.train, data.pad_token_id)
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.dtype == torch.int64
    with pytest.raises(InputError, match=r"max_length: 3 leaves no room .* adds 3 special tokens"):
        tokens_of(train, bert, max_length=3)


def test_a_decoder_reads_the_text_alone() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL_DIR)
    train = [{"text": "it is so", "label": 1}, {"text": "no", "label": 0}]
    (first, _) = tokens_of(train, tokenizer).train
    assert (list(first.input_ids), first.token_type_ids) == (
        tokenizer("it is so")["input_ids"],
        None,
    )


@pytest.mark.parametrize(
    ("columns", "settings", "expected"),
    [
        (["id", "sentence"], {}, "text '{sentence}', label 'label'"),
        (["text"], {}, "text '{text}', label 'label'"),
        (
            ["sentence1", "sentence2"],
            {},
            "text '{sentence1}', text_pair '{sentence2}', label 'label'",
        ),
        (
            ["question", "sentence"],
            {},
            "text '{question}', text_pair '{sentence}', label 'label'",
        ),
        (
            ["title", "body"],
            {"text": "{title}: {body}", "text_pair": "title"},
            "text '{title}: {body}', text_pair '{title}', label 'label'",
        ),
    ],
)
def test_texts_are_found_by_their_columns(
    columns: list[str], settings: dict[str, Any], expected: str
) -> None:
    rows = [{**dict.fromkeys(columns, f"a {i}"), "label": i} for i in range(2)]
    splits = splits_of(rows, **settings)
    assert str(splits.format) == expected
    assert splits.train[0].prompt.endswith("a 0")


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"body": "a"}, {}, r"none of them is known to be the text .*\n  text: .\{body\}."),
        ({"text": "a", "premise": "a", "hypothesis": "b"}, {}, "more than one of them may be"),
        ({"text": "a"}, {"text": "{text} {label}"}, "would give the class away"),
        ({"text": "a"}, {"text_pair": "text"}, r"data\.text: give it too"),
        ({"text": "a"}, {"text": "{txt}", "text_pair": "{txt}"}, r"data\.text_pair: .*'text'"),
    ],
)
def test_unclear_columns_are_refused(
    row: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        splits_of([{**row, "label": 0}] * 2, **settings)
    with pytest.raises(InputError, match=r"data\.label: 'label' is no column\. Did you mean 'lab"):
        splits_of([{"text": "a", "labels": 0}] * 2)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([2, 0, 1], ("0", "1", "2")),
        (["1", "0"], ("0", "1")),
        ([1.0, 0.0], ("0", "1")),
        (["1.0", "0.0"], ("0", "1")),
        ([0, 3], ("0", "1", "2", "3")),
        (["pos", "neg"], ("neg", "pos")),
        (["10", "9", "n/a"], ("10", "9", "n/a")),
        (["007", "7"], ("007", "7")),
        ([True, False], ("false", "true")),
    ],
)
def test_classes_are_numbers_in_order_or_sorted_names(
    labels: list[Any], names: tuple[str, ...], bert: PreTrainedTokenizerBase
) -> None:
    data = tokens_of(labelled(*labels), bert)
    assert data.label_names == names
    shown = [str(v).lower() if isinstance(v, bool) else str(v) for v in labels]
    assert [names[e.label or 0] for e in data.train] == [text.removesuffix(".0") for text in shown]


def test_a_data_set_names_its_classes(tmp_path: Path, bert: PreTrainedTokenizerBase) -> None:
    # Not in alphabetical order, so that the names' own order is seen.
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "ja"])}
    )
    rows = [{"sentence": f"film {i}", "label": i % 2} for i in range(30)]
    table = datasets.Dataset.from_list(rows, features=features)
    splits = splits_of(table, [{"sentence": "a", "label": 0}, {"sentence": "b", "label": "ja"}])
    assert splits.label_names == ("no", "ja")
    assert [row.label for row in splits.train[:2]] == ["no", "ja"]
    assert [row.label for row in splits.validation] == ["no", "ja"]
    table.to_parquet(str(tmp_path / "train.parquet"))
    read = load_rows(DataConfig(name=str(tmp_path / "train.parquet"), label="label"))
    assert read.label_names == ("no", "ja")
    other = features | {"label": datasets.ClassLabel(names=["ja", "no"])}
    validation = datasets.Dataset.from_list(rows, features=datasets.Features(other))
    with pytest.raises(InputError, match="named 'ja', 'no' in validation, but 'no', 'ja' in trai"):
        splits_of(table, validation)


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        (None, r"no label \(null\) in column 'label', first row 3"),
        (float("nan"), r"no label \(null\)"),
        ("", "an empty label"),
        (-1, "a negative label"),
        (0.5, r"no whole number \(regression is not supported\)"),
        ("0.5", r"no whole number \(regression is not supported\)"),
        ([1], r"neither number nor name \(list\)"),
    ],
)
def test_unusable_labels_are_counted_and_the_first_is_named(label: Any, problem: str) -> None:
    train = labelled(0, 1, label, 0, label)
    with pytest.raises(InputError, match=f"train rows: 2 of 5 rows have .*{problem}"):
        splits_of(train, labelled(0, 1))


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ([0, 1], [-1, -1], r"validation rows: every label in column 'label' is -1.*validation_fi"),
        ([0, 1], ["-1", "-1"], "is -1, so these rows have no labels"),
        ([1, 1], [1], r"every training row \(train rows\) has the label '1'"),
        (
            [0, 1],
            [0, 2, 1],
            r"1 of 3 validation rows, first row 2, have .* no training row has: .2",
        ),
        ([0, 2], [0, 1], r"no training row has: '1'"),
        (["a", "b"], ["c"], r"no training row has: 'c'"),
        ([0, 5000], [0], r"makes 5001 classes .* at most 1000 .* Is it really a class"),
        ([f"name {i}" for i in range(1001)], ["name 0"], "makes 1001 classes"),
    ],
)
def test_classes_that_cannot_be_learned_are_refused(
    train: list[Any], validation: list[Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        splits_of(labelled(*train), labelled(*validation))


def test_an_empty_text_is_refused_and_an_empty_second_one_is_not() -> None:
    with pytest.raises(InputError, match="rows: 1 of 2 rows have an empty text, first row 2"):
        splits_of([{"text": "a", "label": 0}, {"text": " ", "label": 1}])
    pairs = [{"premise": "a", "hypothesis": "", "label": i} for i in range(2)]
    assert len(splits_of(pairs).train) == 2
    with pytest.raises(InputError, match=r"no value \(null\) in column 'text'"):
        splits_of([{"text": None, "label": 0}, {"text": "a", "label": 1}])


def test_every_first_part_of_a_stratified_order_has_the_shares() -> None:
    classes = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    order = list(range(100))
    random.Random(0).shuffle(order)
    found = stratified(order, classes)
    assert sorted(found) == list(range(100))
    for size in range(1, 101):
        part = [classes[i] for i in found[:size]]
        for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
            assert abs(part.count(name) - share * size) <= 1
    of_a = [i for i in order if classes[i] == "a"]
    assert [i for i in found if classes[i] == "a"] == of_a


def test_held_back_rows_have_each_class_in_its_share() -> None:
    train = labelled(*(["rare"] * 20 + ["often"] * 180))
    splits = splits_from_objects(train, None, DataConfig(label="label"))
    assert [row.label for row in splits.validation].count("rare") == 2
    assert len(splits.validation) == 20
    assert splits == splits_from_objects(train, None, DataConfig(label="label"))
    # A class of one row stays in training.
    alone = labelled("only", *(["a"] * 50), *(["b"] * 50))
    kept = splits_from_objects(alone, None, DataConfig(label="label"))
    assert "only" in {row.label for row in kept.train}


def test_the_fingerprint_sees_labels_and_types(bert: PreTrainedTokenizerBase) -> None:
    one = [{"text": "a", "other": "b", "label": 0}, {"text": "b", "other": "c", "label": 1}]
    swapped = [row | {"label": 1 - row["label"]} for row in one]
    prints = {
        tokens_of(one, bert, text="text").fingerprint,
        tokens_of(swapped, bert, text="text").fingerprint,
        tokens_of(one, bert, text="text", text_pair="other").fingerprint,
    }
    assert len(prints) == 3


def look(train: Rows, validation: Rows, tokenizer: PreTrainedTokenizerBase) -> Preflight:
    config = DataConfig(label="label")
    splits = splits_from_objects(train, validation, config)
    return preflight(splits, tokenise(splits, config, tokenizer), config, tokenizer)


def test_the_preflight_counts_classes(bert: PreTrainedTokenizerBase) -> None:
    train = [{"text": "good film", "label": "up"},
             *({"text": f"{i}", "label": "down"} for i in range(70))]  # fmt: skip
    validation = [{"text": f"a {i}", "label": "up" if i < 15 else "down"} for i in range(60)]
    found = look(train, validation, bert)
    assert found.train.class_counts == {"down": 70, "up": 1}
    assert found.validation.largest_class == ("down", 0.75)
    assert found.warnings == ()
    shown = [line.strip() for line in lines(found)]
    for expected in (
        "classes  down 70, up 1; 214 tokens",
        "classes  down 45, up 15; 240 tokens",
        "always saying 'down' would score 75.0% in validation",
        "1  [CLS] good film [SEP] «up»",
    ):
        assert expected in shown
    assert json.loads(json.dumps(found.to_json()))["train"]["class_counts"] == {"down": 70, "up": 1}


def test_doubtful_classes_are_warned_about(bert: PreTrainedTokenizerBase) -> None:
    train = labelled(0, 1, 3)
    validation = [{"text": f"a {i}", "label": 1 if i < 4 else 0} for i in range(60)]
    warnings = look(train, validation, bert).warnings
    assert [warning.split(":")[0] for warning in warnings] == [
        "no training row has the class 2",
        "fewer than 5 validation rows have the class 1, 3",
        "93.3% of the validation rows have the class '0'",
    ]


def test_a_language_model_of_labelled_text_is_told_of_classifiers() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL_DIR)
    config = DataConfig()
    splits = splits_from_objects(labelled(*range(20)), None, config)
    data = tokenise(splits, config, tokenizer)
    assert data.label_names is None
    warnings = preflight(splits, data, config, tokenizer).warnings
    assert any("To train a classifier set data.label: label" in warning for warning in warnings)
