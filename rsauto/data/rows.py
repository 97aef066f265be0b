"""A row as it will be tokenised, and what was wrong with the rows that will not be."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rsauto.errors import InputError

Numbered = Iterable[tuple[int, Mapping[str, Any]]]
"""Records with their places in their source, counted from 1."""

Item = TypeVar("Item")

LONGEST_TEXT = 4_000_000
"""Characters of a row. A tokenizer takes several hundred bytes of memory for each, and reads all
of them before anything can be cut at max_length."""

MOST_KINDS = 5
"""Kinds of problems told at once; a chat template may have a message for every row."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example as text.

    A chat is text too: its messages as JSON, so that rows of every kind are compared alike.
    """

    number: int
    """Its place in its source, counted from 1."""
    prompt: str
    """Empty where there is none; the text, when it is classified."""
    completion: str
    """The whole text where there is no prompt; the second text, if any, when it is classified."""
    tools: str = ""
    """Functions that a chat may call, as JSON; empty without any."""
    label: str | None = None
    """Name of the class; None for language modelling."""

    @property
    def content(self) -> tuple[str, str, str]:
        """What makes two rows the same row; a label does not make them two."""
        return self.prompt, self.completion, self.tools

    @property
    def num_characters(self) -> int:
        return sum(map(len, self.content))


@dataclass(slots=True)
class Problems:
    """Kinds of problems, each with the rows that have it."""

    source: str
    total: int = 0
    """Rows looked at."""
    found: dict[str, list[int]] = field(default_factory=dict)
    advice: dict[str, str] = field(default_factory=dict)

    def counting(self, rows: Iterable[Item]) -> Iterator[Item]:
        """The same rows, counted as they pass."""
        for row in rows:
            self.total += 1
            yield row

    def add(self, kind: str, number: int, advice: str = "Fill them in or remove them.") -> None:
        """`kind` is the object of 'rows have ...'."""
        self.found.setdefault(kind, []).append(number)
        self.advice[kind] = advice

    def add_if_long(self, row: Row) -> None:
        """Of a row that a tokenizer should not be given."""
        if row.num_characters > LONGEST_TEXT:
            kind = f"more than {LONGEST_TEXT} characters"
            self.add(kind, row.number, "Split such rows, or remove them.")

    def raise_if_any(self) -> None:
        """Raises InputError, one problem for each kind: how many rows have it, the first row."""
        told = [
            f"{self.source}: {len(where)} of {self.total} rows have {kind}, "
            f"first row {min(where)}. {self.advice[kind]}"
            for kind, where in list(self.found.items())[:MOST_KINDS]
        ]
        if len(self.found) > MOST_KINDS:
            told.append(f"{self.source}: {len(self.found) - MOST_KINDS} more kinds of problems.")
        if told:
            raise InputError(told)


def is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_problem(column: str, value: Any) -> str | None:
    """Why a value is no text, as the object of 'rows have ...'; None if it is."""
    if is_null(value):
        return f"no value (null) in column {column!r}"
    if isinstance(value, str):
        return None if is_unicode(value) else broken_unicode(column)
    if isinstance(value, numbers.Number):
        return None
    kind = type(value).__name__
    if isinstance(value, (list, tuple, Mapping)):
        kind += "; chats are given as messages, or by bare column names as prompt and completion"
    return f"a value that is neither text nor number ({kind}) in column {column!r}"


def is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def broken_unicode(column: str) -> str:
    return f"broken Unicode (half a surrogate pair) in column {column!r}"
