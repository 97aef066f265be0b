"""The first examples as people can read them, with what is learned of them set apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rsauto.data.encoding import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_CHARACTERS = 400
"""Of each part of a sample, in `marked`; the segment keeps all of it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a decoded example."""

    text: str
    counted: bool
    """Whether the loss counts it, or it is the class."""


def segments(
    example: Example, tokenizer: PreTrainedTokenizerBase, label_names: Sequence[str] | None = None
) -> tuple[Segment, ...]:
    """The decoded example, special tokens included, cut where the loss begins or ends to count.

    Of a classified text all of it, and then the name of its class.
    """
    if example.label is not None and label_names is not None:
        text = _decode(example.input_ids, tokenizer)
        return Segment(text, False), Segment(label_names[example.label], True)
    found: list[Segment] = []
    start, before = 0, ""
    for counted, run in groupby(example.counts()):
        stop = start + len(list(run))
        here = _decode(example.input_ids[:stop], tokenizer)
        # Some tokenizers drop a leading space when they decode; the rest of the whole keeps it.
        if here.startswith(before):
            text = here[len(before) :]
        else:
            text = _decode(example.input_ids[start:stop], tokenizer)
        found.append(Segment(text, counted))
        start, before = stop, here
    return tuple(found)


def marked(segment: Segment) -> str:
    """The segment on one line; what is counted stands between « and »."""
    text = spelled_out(segment.text)
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return f"«{text}»" if segment.counted else text


def spelled_out(text: str) -> str:
    """Text safe to show: data is not to be trusted with a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _decode(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(
        tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    )
