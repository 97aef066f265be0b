"""What the columns of a dataset are for, told by their names and values, or guessed.

    reading = known_reading(columns) or labelled_reading(columns) or guessed_reading(columns)

A reading is a part of a study's data section: messages; prompt and completion; text; or label and
text. Names are those that datasets on the hub use most.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rsauto.data.files import Table
from rsauto.data.order import shuffled
from rsauto.errors import InputError, listed, nearest

Kind = Literal["text", "number", "chat", "other"]

LOOKED_AT_ROWS = 1000
MOST_CLASSES = 200
"""A column of more different values is no class."""

CHATS = ("messages", "conversations")
LABELS = ("label", "labels", "class", "target", "category")
PROMPTS = ("prompt", "question", "instruction", "query", "problem", "input", "source", "document",
           "article", "dialogue")  # fmt: skip
COMPLETIONS = ("completion", "answer", "response", "output", "solution", "target", "summary",
               "highlights")  # fmt: skip
TEXTS = ("text", "sentence", "content", "review", "tweet", "body", "code")
CONTEXTS = ("input", "context")
PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("text1", "text2"), ("text_a", "text_b"), ("query", "passage"),
)  # fmt: skip
"""Two texts that are classified together."""

_NAMED_SO = "the columns are named so"
_IDENTIFIERS = frozenset({"id", "idx", "index", "uuid", "url", "date", "split", "source_id"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column, from a sample of the rows."""

    name: str
    kind: Kind
    num_characters: float
    """Mean of the values that are there, written as text."""
    num_values: int
    """Different ones in the sample; 0 where they are neither text nor whole numbers."""
    has_nulls: bool
    num_rows: int
    """In the sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How rows are read: keys and values of the data section, and why."""

    settings: dict[str, str]
    reason: str
    is_guess: bool = False


def look_at(table: Table) -> tuple[Column, ...]:
    """Every column, from at most LOOKED_AT_ROWS rows."""
    chosen = sorted(shuffled(len(table), random.Random(0))[:LOOKED_AT_ROWS])
    records = table.take(chosen, table.columns)
    return tuple(_column(name, [record.get(name) for record in records]) for name in table.columns)


def known_reading(columns: Sequence[Column]) -> Reading | None:
    """Chats, prompt and completion, or question and answer; None where these are not there."""
    chats = {column.name: column for column in columns if column.kind == "chat"}
    if {"prompt", "completion"} <= chats.keys():
        return _pair("{prompt}", "completion", "both columns hold messages")
    if chats:
        name = next((name for name in CHATS if name in chats), next(iter(chats)))
        others = [repr(other) for other in chats if other != name]
        also = f" (so do {', '.join(others)}, which are not used)" if others else ""
        return Reading(
            settings={"messages": name},
            reason=f"the column {name!r} holds messages{also}",
            is_guess=bool(others) and name not in CHATS,
        )
    readable = _names(columns, "text", "number")
    if {"prompt", "completion"} <= readable:
        return _pair("{prompt}", "completion", _NAMED_SO)
    if {"question", "answer"} <= readable:
        return _pair(_with_context(columns, "question", "answer"), "answer", _NAMED_SO)
    return None


def labelled_reading(columns: Sequence[Column], label: str | None = None) -> Reading | None:
    """Text and its class, in the column `label` or one that is called and looks like a class.

    None without such a column. Raises InputError when `label` is no column, or nothing is text.
    """
    found = _label(columns, label)
    if found is None:
        return None
    texts = [column for column in _texts(columns) if column.name != found.name]
    if not texts:
        if label is None:
            return None
        raise InputError(
            f"--label: beside {label!r} no column has text to classify. The columns are "
            f"{listed([column.name for column in columns])}."
        )
    names = {column.name for column in texts}
    reason = f"{found.name!r} has {found.num_values} different values in {found.num_rows} rows"
    for first, second in PAIRS:
        if {first, second} <= names:
            pair = {"text": f"{{{first}}}", "text_pair": f"{{{second}}}"}
            return Reading(settings={"label": found.name, **pair}, reason=reason)
    named = next((name for name in TEXTS if name in names), None)
    return Reading(
        settings={"label": found.name, "text": f"{{{named or texts[0].name}}}"},
        reason=reason,
        is_guess=named is None and len(texts) > 1,
    )


def guessed_reading(columns: Sequence[Column], source: str) -> Reading:
    """Instruction and response under other names, one text, or the two longest columns.

    Raises InputError when no column has text.
    """
    readable = _names(columns, "text", "number")
    completion = next((name for name in COMPLETIONS if name in readable), None)
    prompt = next((n for n in (*PROMPTS, *TEXTS) if n in readable and n != completion), None)
    if prompt is not None and completion is not None:
        template = _with_context(columns, prompt, completion)
        return _pair(template, completion, _NAMED_SO, is_guess=prompt in TEXTS)
    texts = _texts(columns)
    named = next((name for name in TEXTS if name in [column.name for column in texts]), None)
    if not texts:
        raise InputError(
            f"{source}: no column has text to train on. The columns are "
            f"{listed([column.name for column in columns])}."
        )
    if named is not None or len(texts) == 1:
        name = named or texts[0].name
        return Reading(
            settings={"text": f"{{{name}}}"},
            reason=f"{name!r} has text",
            is_guess=named is None,
        )
    longest = {column.name for column in texts[:2]}
    first, second = (column.name for column in columns if column.name in longest)
    return _pair(f"{{{first}}}\n", second, "these two have the most text", is_guess=True)


def _with_context(columns: Sequence[Column], prompt: str, completion: str) -> str:
    """The prompt's template, with what it is about behind it where there is such a column."""
    whole = {column.name for column in columns if column.kind == "text" and not column.has_nulls}
    there = [name for name in CONTEXTS if name in whole - {prompt, completion}]
    return "".join(f"{{{name}}}\n" for name in (prompt, *there[:1]))


def _pair(prompt: str, completion: str, reason: str, is_guess: bool = False) -> Reading:
    return Reading(
        settings={"prompt": prompt, "completion": f"{{{completion}}}"},
        reason=reason,
        is_guess=is_guess,
    )


def _column(name: str, values: Sequence[Any]) -> Column:
    there = [value for value in values if value is not None]
    countable = all(
        isinstance(value, (str, int)) or (isinstance(value, float) and value.is_integer())
        for value in there
    )
    return Column(
        name=name,
        kind=_kind(there),
        num_characters=sum(len(str(value)) for value in there) / max(1, len(there)),
        num_values=len(set(there)) if countable else 0,
        has_nulls=len(there) < len(values),
        num_rows=len(values),
    )


def _kind(values: Sequence[Any]) -> Kind:
    if values and all(isinstance(value, str) for value in values):
        return "text"
    if values and all(isinstance(value, (int, float)) for value in values):
        return "number"
    return "chat" if values and all(map(_is_chat, values)) else "other"


def _is_chat(value: Any) -> bool:
    """A list of {role, content}, or of ShareGPT's {from, value}."""
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_message, value))


def _is_message(turn: Any) -> bool:
    return isinstance(turn, Mapping) and any(
        keys <= turn.keys() for keys in ({"role", "content"}, {"from", "value"})
    )


def _label(columns: Sequence[Column], label: str | None) -> Column | None:
    by_name = {column.name: column for column in columns}
    if label is not None:
        if label not in by_name:
            raise InputError(
                f"--label: {label!r} is no column.{nearest(label, by_name)} The columns are "
                f"{listed([column.name for column in columns])}."
            )
        return by_name[label]
    return next((by_name[n] for n in LABELS if n in by_name and _is_class(by_name[n])), None)


def _is_class(column: Column) -> bool:
    """Few values, each of them met several times."""
    return 2 <= column.num_values <= min(MOST_CLASSES, column.num_rows // 4)


def _texts(columns: Sequence[Column]) -> list[Column]:
    """Columns of text, the longest first, those with gaps last."""
    texts = [column for column in columns if column.kind == "text" and _is_plain(column.name)]
    telling = [column for column in texts if column.name.lower() not in _IDENTIFIERS]
    return sorted(telling or texts, key=lambda column: (column.has_nulls, -column.num_characters))


def _names(columns: Sequence[Column], *kinds: Kind) -> set[str]:
    return {column.name for column in columns if column.kind in kinds}


def _is_plain(name: str) -> bool:
    """Whether a template can name the column."""
    return bool(name) and not set(name) & set("{}[].!:")
