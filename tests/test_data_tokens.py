"""Token ids, the loss mask and batches, checked by decoding what the loss counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rsauto import embedded
from rsauto.config import DataConfig
from rsauto.data import (
    Example,
    TokenisedData,
    collate,
    evaluation_batches,
    padded_tokens,
    splits_from_objects,
    tokenise,
)
from rsauto.errors import InputError
from rsauto.training.loss import IGNORED, count_targets

BOS, EOS, PAD = 256, 257, 258


def byte_tokenizer(adds: str | None = None, **special: Any) -> PreTrainedTokenizerBase:
    """One token per byte; `adds` is what it puts around a text by itself, such as '<s> $A'."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    vocabulary |= {"<s>": BOS, "</s>": EOS, "<pad>": PAD}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    if adds is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=adds, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    wrapped: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special
    )  # type: ignore[no-untyped-call]
    return wrapped


PLAIN = {"eos_token": "</s>", "pad_token": "<pad>"}


def tokens_of(
    train: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> TokenisedData:
    config = DataConfig(**settings)
    validation = [{"prompt": "v:", "completion": "w", "text": "vw"}]
    return tokenise(splits_from_objects(train, validation, config), config, tokenizer)


def pairs(*texts: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in texts]


def decoded(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(example.input_ids)))


def counted(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the loss counts, decoded from the labels of a batch."""
    labels = collate([example], pad_token_id=0).labels[0]
    return str(tokenizer.decode(labels[labels != IGNORED]))


def test_the_loss_counts_completion_and_end_of_text_and_nothing_else() -> None:
    tokenizer = byte_tokenizer(**PLAIN)
    train = pairs(("2+2=", " 4"), ("Größe: ", "ü\n"), ("", "only"))
    data = tokens_of(train, tokenizer)
    for row, example in zip(train, data.train, strict=True):
        assert decoded(example, tokenizer) == row["prompt"] + row["completion"] + "</s>"
        assert counted(example, tokenizer) == row["completion"] + "</s>"
    # Nothing predicts a first token, so that of the row without a prompt is not a target.
    assert [example.num_targets for example in data.train] == [3, 4, 4]


def test_targets_agree_with_the_loss() -> None:
    data = tokens_of(pairs(("ab", "c"), ("", "abc")), byte_tokenizer(**PLAIN))
    labels = collate(data.train, data.pad_token_id).labels
    assert count_targets(labels) == sum(example.num_targets for example in data.train)


@pytest.mark.parametrize("settings", [{"text": "{text}"}, {"loss_on": "all"}])
def test_all_is_counted_on_request_and_in_the_text_format(settings: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer(**PLAIN)
    train = [{"text": "abc", "prompt": "a", "completion": "bc"}]
    if "loss_on" in settings:
        settings = settings | {"prompt": "prompt", "completion": "completion"}
    (example,) = tokens_of(train, tokenizer, **settings).train
    assert decoded(example, tokenizer) == "abc</s>"
    assert (example.num_prompt_tokens, example.num_targets) == (0, 3)


@pytest.mark.parametrize(
    ("adds", "prompt", "completion", "expected"),
    [
        (None, "a", "b", "ab</s>"),
        ("<s> $A", "a", "b", "<s>ab</s>"),
        ("$A </s>", "a", "b", "ab</s>"),
        ("<s> $A </s>", "a", "b", "<s>ab</s>"),
        ("<s> $A", "<s>a", "b</s>", "<s>ab</s>"),
        ("<s> $A", "", "b", "<s>b</s>"),
        ("<s> $A", "", "<s>b", "<s>b</s>"),
    ],
)
def test_special_tokens_come_once(
    adds: str | None, prompt: str, completion: str, expected: str
) -> None:
    tokenizer = byte_tokenizer(adds, bos_token="<s>", **PLAIN)
    (example,) = tokens_of(pairs((prompt, completion)), tokenizer).train
    assert decoded(example, tokenizer) == expected
    if completion == "b":
        assert counted(example, tokenizer) == "b</s>"


def test_tokens_never_span_prompt_and_completion() -> None:
    vocabulary = byte_tokenizer().get_vocab() | {"ab": 300}
    merging = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    merging.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merging.decoder = decoders.ByteLevel()
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=merging, eos_token="</s>"
    )  # type: ignore[no-untyped-call]
    (example,) = tokens_of(pairs(("xa", "by")), tokenizer).train
    assert tokenizer("xaby")["input_ids"][1] == 300
    assert 300 not in example.input_ids
    assert counted(example, tokenizer) == "by</s>"


def test_long_rows_are_cut_on_the_right_and_rows_without_completion_dropped() -> None:
    tokenizer = byte_tokenizer(**PLAIN)
    train = pairs(("abc", "defgh"), ("abcdef", "g"), ("abcde", "f"), ("a", "b"), ("abc", "de"))
    data = tokens_of(train, tokenizer, max_length=6)
    texts = [decoded(example, tokenizer) for example in data.train]
    assert texts == ["abcdef", "abcdef", "ab</s>", "abcde</s>"]
    assert data.train_fit.lengths == (9, 8, 7, 3, 6)
    assert (data.train_fit.num_truncated, data.train_fit.num_dropped) == (2, 1)
    assert (data.train_length, data.validation_length) == (6, 4)


def test_nothing_left_after_truncation_is_refused() -> None:
    with pytest.raises(InputError, match=r"max_length: at 4 .* needs 6; .* longest row, 9 tokens"):
        tokens_of(pairs(("abcde", "f"), ("abcdef", "gh")), byte_tokenizer(**PLAIN), max_length=4)


def test_tokenizers_without_end_or_padding() -> None:
    train = pairs(("a", "b"))
    bare = tokens_of(train, byte_tokenizer())
    assert (len(bare.train[0].input_ids), bare.pad_token_id) == (2, 0)
    assert tokens_of(train, byte_tokenizer(eos_token="</s>")).pad_token_id == EOS
    assert tokens_of(train, byte_tokenizer(**PLAIN)).pad_token_id == PAD
    # Without an end-of-text token of its own, what the tokenizer appends ends the row.
    closing = tokens_of(train, byte_tokenizer("$A </s>"))
    assert closing.train[0].input_ids[-1] == EOS


def test_batches_of_the_tokenizer_lose_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsauto.data.encoding.TEXTS_PER_CALL", 3)
    tokenizer = byte_tokenizer(**PLAIN)
    data = tokens_of(pairs(*((str(i), "x") for i in range(10))), tokenizer)
    assert [decoded(e, tokenizer) for e in data.train] == [f"{i}x</s>" for i in range(10)]


def test_fingerprint_sees_ids_masks_and_splits() -> None:
    tokenizer = byte_tokenizer(**PLAIN)
    golden = tokens_of(pairs(("a", "b"), ("c", "d")), tokenizer)
    assert golden.fingerprint[:16] == "362990d4a9141b6b"
    others = [
        tokens_of(pairs(("a", "b"), ("c", "e")), tokenizer),
        tokens_of(pairs(("", "ab"), ("c", "d")), tokenizer),
        tokens_of(pairs(("a", "b")), tokenizer),
        tokens_of(pairs(("c", "d"), ("a", "b")), tokenizer),
    ]
    assert len({data.fingerprint for data in (golden, *others)}) == 5
    assert golden.fingerprint == tokens_of(pairs(("a", "b"), ("c", "d")), tokenizer).fingerprint


def test_collate_pads_on_the_right_to_the_longest() -> None:
    batch = collate([Example((5, 6, 7), 1), Example((8, 9), 1)], pad_token_id=99)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 99]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    assert {tensor.dtype for tensor in (*batch.inputs().values(), batch.labels)} == {torch.int64}
    assert batch.to("meta").labels.is_meta
    with pytest.raises(ValueError, match="at least one example"):
        collate([], pad_token_id=0)


def test_padding_that_is_also_a_token_stays_a_target() -> None:
    # A tokenizer without padding pads with end of text; the real one must still be learned.
    batch = collate([Example((5, EOS), 1), Example((5, 6, EOS), 1)], pad_token_id=EOS)
    assert batch.labels.tolist() == [[IGNORED, EOS, IGNORED], [IGNORED, 6, EOS]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_evaluation_starts_with_the_heaviest_batch() -> None:
    examples = [Example(tuple(range(length)), 0) for length in (3, 9, 4, 9, 5)]
    batches = evaluation_batches(examples, 2)
    assert [[len(e.input_ids) for e in batch] for batch in batches] == [[9, 9], [5, 4], [3]]
    weights = [padded_tokens(batch) for batch in batches]
    assert weights == [18, 10, 3]
    assert collate(batches[1], 0).input_ids.numel() == weights[1]
    with pytest.raises(ValueError, match="batch_size"):
        evaluation_batches(examples, 0)


def test_embedded_tokenizer_keeps_prompt_and_completion_apart() -> None:
    if not (embedded.MODEL_DIR / "tokenizer.json").exists():
        pytest.skip("the embedded model is not there")
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL_DIR)
    train = pairs(("the file will read a list =", " be do"), ("no name =", " wa re"))
    data = tokens_of(train, tokenizer)
    end = tokenizer.eos_token
    assert [counted(e, tokenizer) for e in data.train] == [" be do" + end, " wa re" + end]
