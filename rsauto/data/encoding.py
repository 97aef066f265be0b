"""Token ids with what the loss counts of them, and the tokenizer's calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS_PER_CALL = 1000
"""Texts given to the tokenizer at once; its intermediate records are larger than the ids."""

CHARACTERS = 4_000_000
"""Characters given to it at once, where texts are long."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence."""

    input_ids: tuple[int, ...]
    num_prompt_tokens: int = 0
    """Leading tokens that the loss ignores: prefix and prompt, or 0 where all is trained on."""
    mask: bytes | None = None
    """One byte a token, 1 where the loss counts it; given only for chats, whose counted tokens are
    not all at the end. None: all after num_prompt_tokens."""
    label: int | None = None
    """Class of the whole sequence; None for language modelling."""
    token_type_ids: tuple[int, ...] | None = None
    """Which of two texts a token belongs to, where the tokenizer tells."""

    @property
    def num_targets(self) -> int:
        """What counts in the loss: tokens but the first, which nothing predicts, or the class."""
        if self.label is not None:
            return min(1, len(self.input_ids))
        if self.mask is not None:
            return sum(self.mask[1:])
        return len(self.input_ids) - max(1, self.num_prompt_tokens)

    def cut(self, length: int) -> Example:
        """At most the first `length` tokens of it."""
        types = self.token_type_ids
        return Example(
            input_ids=self.input_ids[:length],
            num_prompt_tokens=self.num_prompt_tokens,
            mask=None if self.mask is None else self.mask[:length],
            label=self.label,
            token_type_ids=None if types is None else types[:length],
        )

    def counts(self) -> list[bool]:
        """Token by token, whether the loss of language modelling counts it."""
        mask = self.mask
        first = max(1, self.num_prompt_tokens)
        return [
            index >= first if mask is None else index > 0 and mask[index] == 1
            for index in range(len(self.input_ids))
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How the rows of a split fitted into max_length."""

    lengths: tuple[int, ...]
    """Tokens of every row before it was cut, dropped rows included."""
    num_truncated: int
    """Rows cut, dropped ones not included."""
    num_dropped: int
    """Rows of which no token was left to learn from."""
    num_not_prefix: int = 0
    """Chats whose prompt is written otherwise when its completion follows."""


def encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, special: bool = False
) -> list[list[int]]:
    """Token ids of every text; `special` adds what the tokenizer puts around a text by itself."""
    options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False}
    return [
        ids
        for batch in encode_batches(texts, tokenizer, add_special_tokens=special, **options)
        for ids in batch["input_ids"]
    ]


def encode_batches(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[str] | None = None,
    **options: Any,
) -> Iterator[Mapping[str, Any]]:
    """What the tokenizer returns for texts, or for pairs, in the parts that `_calls` makes.

    `options` are the tokenizer's own.
    """
    for these in _calls(texts, pairs):
        yield tokenizer(
            list(texts[these]),
            None if pairs is None else list(pairs[these]),
            # Longer than the model's context is no matter for a warning here: it is cut later.
            verbose=False,
            **options,
        )


def _calls(texts: Sequence[str], pairs: Sequence[str] | None) -> Iterator[slice]:
    """Slices of at most TEXTS_PER_CALL texts and, unless one alone has more, of CHARACTERS."""
    start = characters = 0
    for index, text in enumerate(texts):
        length = len(text) + (0 if pairs is None else len(pairs[index]))
        if index - start == TEXTS_PER_CALL or (index > start and characters + length > CHARACTERS):
            yield slice(start, index)
            start, characters = index, 0
        characters += length
    if texts:
        yield slice(start, len(texts))
