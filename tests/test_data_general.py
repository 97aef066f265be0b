"""The texts on which forgetting is measured: nothing lost, nothing added, all of it counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rsauto.data.general import GENERAL_TEXTS, general_examples, general_text
from rsauto.embedded import MODEL_DIR
from rsauto.errors import InputError


@pytest.fixture(scope="module")
def embedded() -> PreTrainedTokenizerBase:
    """Puts nothing before a text."""
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    """One token a word, number 1 for 'w1' and so on; puts <s>, number 0, before a text."""
    vocab = {"<s>": 0, **{f"w{n}": n for n in range(1, 40)}, "<unk>": 40}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def write(folder: Path, count: int) -> str:
    path = folder / "text.txt"
    path.write_text(" ".join(f"w{n}" for n in range(1, count + 1)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", GENERAL_TEXTS)
def test_the_sequences_put_together_are_the_text(
    name: str, embedded: PreTrainedTokenizerBase
) -> None:
    examples = general_examples(name, embedded, 100)
    joined = [token for example in examples for token in example.input_ids]
    text = general_text(name)
    assert len(text.encode()) > 8000
    decoded = embedded.decode(joined, clean_up_tokenization_spaces=False)
    assert text.startswith(decoded)
    assert len(text) - len(decoded) < 10, "at most a last token is left out"
    assert {len(example.input_ids) for example in examples[:-1]} == {100}
    assert all(example.num_targets == len(example.input_ids) - 1 for example in examples)


def test_every_sequence_has_the_prefix_and_it_is_not_counted(
    tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    examples = general_examples(write(tmp_path, 8), words, 4)
    assert [example.input_ids for example in examples] == [
        (0, 1, 2, 3), (0, 4, 5, 6), (0, 7, 8),
    ]  # fmt: skip
    assert [example.num_prompt_tokens for example in examples] == [1, 1, 1]
    assert [example.num_targets for example in examples] == [3, 3, 2]


def test_a_last_token_alone_is_left_out(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    examples = general_examples(write(tmp_path, 7), words, 4)
    assert [example.input_ids for example in examples] == [(0, 1, 2, 3), (0, 4, 5, 6)]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["empty"]),
        (b" \n\n ", ["empty"]),
        (b"w1", ["1 tokens", "longer text"]),
        ("w1 \xe9t\xe9".encode("latin-1"), ["not UTF-8", "byte 3"]),
        (b"w1 " * 3_400_000, ["10.2 MB", "at most 10 MB"]),
    ],
    ids=["empty", "blank", "short", "latin-1", "large"],
)
def test_a_text_that_cannot_be_used_is_refused(
    tmp_path: Path, words: PreTrainedTokenizerBase, content: bytes, parts: list[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        general_examples(str(path), words, 4)
    assert str(caught.value).startswith(f"data.forgetting: {str(path)!r}")
    for part in parts:
        assert part in str(caught.value)


def test_a_name_that_is_no_file_gets_the_names_there_are(
    tmp_path: Path, words: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"'englsh' does not exist.*Did you mean 'english'"):
        general_examples("englsh", words, 4)
    with pytest.raises(InputError, match=r"cannot be read.*Give english, code, or a text file"):
        general_examples(str(tmp_path), words, 4)


def test_a_length_without_room_for_text_is_refused(words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"data.max_length: 2 .* at least 3"):
        general_examples("english", words, 2)
