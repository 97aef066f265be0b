"""The preflight shows the data as it will be trained on, and refuses what would mislead."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rsauto.config import DataConfig
from rsauto.data import Preflight, lines, preflight, splits_from_objects, tokenise
from rsauto.errors import InputError


def byte_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """One token per byte and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)} | {"</s>": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    special = {"eos_token": "</s>", **settings}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)  # type: ignore[no-untyped-call]


def look(
    train: list[dict[str, Any]],
    validation: list[dict[str, Any]] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **settings: Any,
) -> Preflight:
    config = DataConfig(**settings)
    splits = splits_from_objects(train, validation, config)
    tokenizer = tokenizer or byte_tokenizer()
    return preflight(splits, tokenise(splits, config, tokenizer), config, tokenizer)


def pairs(*texts: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in texts]


MANY = pairs(*((f"{i}?", f"{i}") for i in range(100, 160)))
OTHERS = pairs(*((f"{i}?", f"{i}") for i in range(500, 560)))


def test_numbers_of_a_clean_data_set() -> None:
    found = look(MANY, OTHERS)
    assert found.warnings == ()
    assert found.format == "prompt '{prompt}', completion '{completion}'"
    train = found.train
    assert (train.num_rows, train.num_examples, train.num_dropped) == (60, 60, 0)
    # Four bytes of prompt, three of completion, and </s>.
    assert (train.median_length, train.p95_length, train.longest_length) == (8, 8, 8)
    assert (train.num_tokens, train.num_counted_tokens) == (60 * 8, 60 * 4)
    assert json.loads(json.dumps(found.to_json()))["validation"]["num_rows"] == 60


def test_lengths_are_nearest_rank_quantiles() -> None:
    train = pairs(*(("", "x" * length) for length in range(1, 21)))
    found = look(train, OTHERS)
    # Lengths 2 to 21: ten of twenty rows have at most 11, nineteen at most 20.
    assert (found.train.median_length, found.train.p95_length) == (11, 20)
    assert found.train.longest_length == 21


def test_samples_show_what_is_counted() -> None:
    found = look(pairs(("2+2=", "4")) + MANY, OTHERS)
    shown = [[(part.text, part.counted) for part in sample] for sample in found.samples]
    assert shown[0] == [("2+2=", False), ("4</s>", True)]
    assert len(shown) == 2
    assert "  1  2+2=«4</s>»" in lines(found)


def test_text_samples_leave_out_the_first_token() -> None:
    found = look([{"text": "abc"}] * 2, [{"text": f"{i}"} for i in range(60)])
    assert [part.text for part in found.samples[0]] == ["a", "bc</s>"]


def test_lines_spell_out_control_characters_and_shorten_long_samples() -> None:
    found = look(pairs(("a\nb\x1b[31m", "é" + "x" * 900 + "end")) + MANY, OTHERS, max_length=2000)
    shown = next(line for line in lines(found) if line.startswith("  1  "))
    assert shown.startswith("  1  a\\nb\\x1b[31m«éxxx")
    assert shown.endswith("end</s>»")
    assert len(shown) < 500


def test_lines_say_everything_that_matters() -> None:
    train = [row | {"id": 1} for row in MANY]
    text = "\n".join(lines(look(train, OTHERS, max_length=7)))
    for expected in (
        "prompt '{prompt}'",
        "not used    'id'",
        "train rows, all 60 rows",
        "validation rows, all 60 rows",
        "median 8, 95 % 8, longest 8; 100.0% cut at 7",
        "420 tokens, 180 of them counted",
        "warning: 60 of 60 training rows are cut at data.max_length 7",
    ):
        assert expected in text


def test_duplicates_and_overlaps_are_counted() -> None:
    train = MANY + MANY[:3]
    validation = [*OTHERS, *MANY[:2], {"prompt": MANY[5]["prompt"], "completion": "other"}]
    found = look(train, validation)
    assert found.num_train_duplicates == 3
    assert found.num_overlapping_rows == 2
    assert found.num_overlapping_prompts == 3
    assert [warning.split(" rows ")[0] for warning in found.warnings] == [
        "2 of 63 validation",
        "1 validation",
        "3 of 63 training",
    ]


def test_validation_inside_training_is_refused() -> None:
    with pytest.raises(InputError, match=r"every validation row .* is a training row too"):
        look(MANY, MANY[10:20])


def test_equal_texts_have_no_prompts_to_overlap() -> None:
    rows = [{"text": str(i)} for i in range(60)]
    found = look(rows, [*rows[:1], *({"text": f"v{i}"} for i in range(60))])
    assert (found.num_overlapping_rows, found.num_overlapping_prompts) == (1, 0)


@pytest.mark.parametrize(
    ("train", "settings", "message"),
    [
        (MANY + pairs(("x" * 30, "a")), {"max_length": 20}, "1 of 61 training rows are dropped"),
        (MANY + pairs(("x", "a" * 30)), {"max_length": 20}, "1 of 61 training rows are cut at"),
        (MANY, {"validation_rows": 9}, "only 9 validation rows"),
        (MANY, {"prompt": r"{prompt}\n", "completion": "completion"}, "has a backslash and an n"),
    ],
)
def test_doubtful_data_is_warned_about(
    train: list[dict[str, Any]], settings: dict[str, Any], message: str
) -> None:
    (warning,) = look(train, OTHERS, **settings).warnings
    assert message in warning


def test_doubtful_tokenizers_are_warned_about() -> None:
    (warning,) = look(MANY, OTHERS, byte_tokenizer(eos_token=None)).warnings
    assert "no end-of-text token" in warning
    (warning,) = look(MANY, OTHERS, byte_tokenizer(model_max_length=7)).warnings
    assert "up to 8 tokens are longer than the 7" in warning


def test_a_label_that_is_not_learned_is_warned_about() -> None:
    train = [{"text": row["prompt"], "label": 1} for row in MANY]
    validation = [{"text": row["prompt"]} for row in OTHERS]
    (warning,) = look(train, validation).warnings
    assert "'label' is not used" in warning
