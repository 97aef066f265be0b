"""From text to token ids, and which of them the loss counts.

    prefix + ids(prompt) + ids(completion) + end        cut on the right at max_length

prefix  what the tokenizer puts before a text by itself (often <s>); nothing if it puts nothing
end     the tokenizer's end-of-text token, or what it puts after a text if it has none

Prompt and completion are tokenised apart. Tokenising them joined may merge the last characters of
the prompt with the first of the completion into one token: the mask would then cut through it, and
the prompt seen in training would not be the prompt given when the model is used.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rsauto.config import DataConfig
from rsauto.data.load import Splits
from rsauto.data.template import Row
from rsauto.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS_PER_CALL = 1000
"""Texts given to the tokenizer at once; its intermediate records are larger than the ids."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence."""

    input_ids: tuple[int, ...]
    num_prompt_tokens: int
    """Leading tokens that the loss ignores: prefix and prompt, or 0 where all is trained on."""

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss; the first never does, because nothing predicts it."""
        return len(self.input_ids) - max(1, self.num_prompt_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How the rows of a split fitted into max_length."""

    lengths: tuple[int, ...]
    """Tokens of every row before it was cut, dropped rows included."""
    num_truncated: int
    """Rows cut, dropped ones not included."""
    num_dropped: int
    """Rows of which no token was left to learn from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenisedData:
    """Both splits as token ids, in the order of their rows."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    train_fit: Fit
    validation_fit: Fit
    pad_token_id: int
    train_length: int
    """Tokens of the longest training example."""
    validation_length: int
    fingerprint: str
    """SHA-256 over token ids and masks of both splits, in hexadecimal."""


def tokenise(
    splits: Splits, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> TokenisedData:
    """Tokenise both splits; `config` gives `loss_on` and `max_length`.

    Raises InputError when truncation leaves no example of a split.
    """
    train, train_fit = _tokenise_rows(splits.train, "train", splits, config, tokenizer)
    validation, validation_fit = _tokenise_rows(
        splits.validation, "validation", splits, config, tokenizer
    )
    return TokenisedData(
        train=train,
        validation=validation,
        train_fit=train_fit,
        validation_fit=validation_fit,
        pad_token_id=pad_token_id(tokenizer),
        train_length=max(len(example.input_ids) for example in train),
        validation_length=max(len(example.input_ids) for example in validation),
        fingerprint=fingerprint(train, validation),
    )


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up batches. Which one does not matter: it is masked in every use."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    return 0


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(prefix, end): the ids around a text, as in the module's equation.

    Raises InputError when a text's own tokens cannot be found between the tokenizer's additions.
    """
    plain = _encode(["a"], tokenizer, special=False)[0]
    whole = _encode(["a"], tokenizer, special=True)[0]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            break
    else:
        raise InputError(
            f"model: {type(tokenizer).__name__} changes a text when it adds special tokens, so "
            f"that prompt and completion cannot be told apart. Use another tokenizer."
        )
    suffix = whole[start + len(plain) :]
    eos = tokenizer.eos_token_id
    return tuple(whole[:start]), (eos,) if isinstance(eos, int) else tuple(suffix)


def fingerprint(train: Sequence[Example], validation: Sequence[Example]) -> str:
    """SHA-256 in hexadecimal; lengths are hashed too, so that no two data sets run together."""
    digest = hashlib.sha256()
    for split in (train, validation):
        digest.update(struct.pack("<Q", len(split)))
        for example in split:
            length = len(example.input_ids)
            digest.update(struct.pack("<QQ", length, example.num_prompt_tokens))
            digest.update(struct.pack(f"<{length}I", *example.input_ids))
    return digest.hexdigest()


def _encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, special: bool = False
) -> list[list[int]]:
    encoded: list[list[int]] = []
    for start in range(0, len(texts), TEXTS_PER_CALL):
        batch = tokenizer(
            list(texts[start : start + TEXTS_PER_CALL]),
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            # Longer than the model's context is no matter for a warning here: it is cut later.
            verbose=False,
        )
        encoded.extend(batch["input_ids"])
    return encoded


def _tokenise_rows(
    rows: Sequence[Row],
    name: str,
    splits: Splits,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[tuple[Example, ...], Fit]:
    """The examples of one split, and what truncation did to its rows."""
    prefix, end = special_tokens(tokenizer)
    prompts = _encode([row.prompt for row in rows], tokenizer)
    completions = _encode([row.completion for row in rows], tokenizer)
    count_all = config.loss_on == "all" or splits.format.prompt is None
    whole = [
        _join(prompt, completion, prefix, end, count_all)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    cut = [
        Example(example.input_ids[: config.max_length], example.num_prompt_tokens)
        for example in whole
    ]
    kept = tuple(example for example in cut if example.num_targets > 0)
    lengths = tuple(len(example.input_ids) for example in whole)
    if not kept:
        raise InputError(_nothing_left(name, whole, config.max_length))
    return kept, Fit(
        lengths=lengths,
        num_truncated=sum(
            length > config.max_length and example.num_targets > 0
            for length, example in zip(lengths, cut, strict=True)
        ),
        num_dropped=len(rows) - len(kept),
    )


def _join(
    prompt: list[int],
    completion: list[int],
    prefix: tuple[int, ...],
    end: tuple[int, ...],
    count_all: bool,
) -> Example:
    """One whole sequence. Special tokens that the text already has are not added twice."""
    head = tuple(prompt)
    body = tuple(completion)
    opening = head or body
    if prefix and opening[: len(prefix)] != prefix:
        head = prefix + head
    if end and body[-len(end) :] != end:
        body += end
    return Example(head + body, 0 if count_all else len(head))


def _nothing_left(name: str, whole: Sequence[Example], max_length: int) -> str:
    needed = min(max(1, example.num_prompt_tokens) + 1 for example in whole)
    return (
        f"data.max_length: at {max_length} tokens none of the {len(whole)} {name} rows keeps a "
        f"token to learn from. The shortest prompt needs {needed}; raise max_length to cover the "
        f"longest row, {max(len(example.input_ids) for example in whole)} tokens."
    )
