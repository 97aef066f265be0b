"""Labelled text: the classes there are, and one text or a pair as the tokenizer joins them.

A class is known by its name: the number as text where labels are whole numbers, 'false' and 'true'
where they are booleans. Numbers stand in the order of the numbers, names in alphabetical order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsauto.data.encoding import Example, encode_batches
from rsauto.data.rows import Numbered, Problems, Row, is_null
from rsauto.data.template import Template, text_values
from rsauto.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CLASSES = 1000
"""More than this, and the column is an identifier or a text rather than a class."""

LONGEST_LABEL = 1000
"""Characters of a class's name."""

_WHOLE = re.compile(r"([+-]?(?:0|[1-9][0-9]*))(?:\.0*)?")
_INDEX = re.compile(r"0|[1-9][0-9]*")
_FRACTION = re.compile(r"[+-]?[0-9]*\.[0-9]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelFormat:
    """How a row becomes a text, or two, and a class."""

    text: Template
    text_pair: Template | None
    label: str
    """Column of the class."""
    names: tuple[str, ...] | None = None
    """Of the classes 0, 1, ..., where the data tells them."""

    @property
    def has_prompts(self) -> bool:
        return False

    @property
    def templates(self) -> tuple[Template, ...]:
        return (self.text,) if self.text_pair is None else (self.text, self.text_pair)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it reads, each once."""
        return tuple(dict.fromkeys((*self._text_columns, self.label)))

    @property
    def _text_columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(c for template in self.templates for c in template.columns))

    def __str__(self) -> str:
        pair = "" if self.text_pair is None else f", text_pair {self.text_pair.source!r}"
        return f"text {self.text.source!r}{pair}, label {self.label!r}"

    def render(self, numbered: Numbered, source: str) -> tuple[Row, ...]:
        """Rows with their texts and the names of their classes.

        Raises InputError, one problem for each kind, with how many rows have it and the first.
        """
        records = list(numbered)
        if all(_as_text(record.get(self.label)) == "-1" for _, record in records):
            raise InputError(
                f"{source}: every label in column {self.label!r} is -1, so these rows have no "
                f"labels. Name rows that have: data.validation_file or data.validation_split "
                f"for validation, data.train_split for training."
            )
        problems = Problems(source)
        rows = [self._row(number, record, problems) for number, record in
                problems.counting(records)]  # fmt: skip
        problems.raise_if_any()
        return tuple(row for row in rows if row is not None)

    def _row(self, number: int, record: Mapping[str, Any], problems: Problems) -> Row | None:
        values = text_values(record, self._text_columns, number, problems)
        name, problem = _class(record.get(self.label), self.names)
        if problem is not None:
            advice = "Correct them, or name another column as data.label."
            problems.add(f"{problem} in column {self.label!r}", number, advice)
        if values is None or name is None:
            return None
        text = self.text.fill(values)
        pair = "" if self.text_pair is None else self.text_pair.fill(values)
        if not (text + pair).strip():
            problems.add("an empty text", number)
        row = Row(number, text, pair, label=name)
        problems.add_if_long(row)
        return row


def _as_text(label: Any) -> str:
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _class(label: Any, names: Sequence[str] | None) -> tuple[str | None, str | None]:
    """The name of a row's class, or why there is none, as the object of 'rows have ...'."""
    if is_null(label):
        return None, "no label (null)"
    if isinstance(label, bool):
        return str(label).lower(), None
    if not isinstance(label, (int, float, str)):
        return None, f"a label that is neither number nor name ({type(label).__name__})"
    text = _as_text(label)
    if len(text) > LONGEST_LABEL:
        return None, f"a label of more than {LONGEST_LABEL} characters"
    if names is not None and text in names and isinstance(label, str):
        return text, None
    if not text.strip():
        return None, "an empty label"
    whole = _WHOLE.fullmatch(text)
    if whole is None:
        if isinstance(label, float) or _FRACTION.fullmatch(text):
            return None, "a label that is no whole number (regression is not supported)"
        return text, None
    number = int(whole[1])
    if number < 0:
        return None, "a negative label"
    if names is None:
        return str(number), None
    if number >= len(names):
        return None, f"a label beyond the {len(names)} classes that the data names"
    return names[number], None


def class_names(
    train: Sequence[Row], validation: Sequence[Row], form: LabelFormat, source: str
) -> tuple[str, ...]:
    """Names of the classes by their index.

    Raises InputError when training has fewer than two classes, when there are more than
    MOST_CLASSES, or when validation has one that training lacks.
    """
    seen = {row.label for row in train if row.label is not None}
    if len(seen) < 2:
        raise InputError(
            f"data.label: every training row ({source}) has the label {min(seen)!r} in column "
            f"{form.label!r}, but a classifier needs at least two classes. Name another column, "
            f"or add rows of the others."
        )
    if all(_INDEX.fullmatch(name) for name in seen) and form.names is None:
        count = max(map(int, seen)) + 1
        names = tuple(map(str, range(min(count, MOST_CLASSES + 1))))
    else:
        count = len(form.names or seen)
        names = form.names or tuple(sorted(seen))
    if count > MOST_CLASSES and form.names is None:
        raise InputError(
            f"data.label: column {form.label!r} makes {count} classes of the training rows, and "
            f"at most {MOST_CLASSES} are supported. Is it really a class, and no identifier, "
            f"text or measurement? If its numbers have gaps, write names instead."
        )
    _require_seen(validation, seen, form)
    return names


def _require_seen(validation: Sequence[Row], seen: Collection[str], form: LabelFormat) -> None:
    unseen = [row for row in validation if row.label not in seen]
    if unseen:
        listed = ", ".join(sorted({repr(row.label) for row in unseen})[:10])
        raise InputError(
            f"data.label: {len(unseen)} of {len(validation)} validation rows, first row "
            f"{unseen[0].number}, have a label in column {form.label!r} that no training row has: "
            f"{listed}. Add such rows to training, raise data.max_train_rows if it is set, or "
            f"remove them."
        )


def labelled_examples(
    rows: Sequence[Row],
    form: LabelFormat,
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
) -> list[Example]:
    """Every row with the special tokens that the tokenizer puts around one text or a pair.

    With `max_length` the texts are cut, the longer one of a pair first, the special tokens never.
    Raises InputError when they leave no room for text.
    """
    options: dict[str, Any] = {}
    if max_length is not None:
        _require_room(max_length, tokenizer.num_special_tokens_to_add(form.text_pair is not None))
        options = {"truncation": True, "max_length": max_length}
    texts = [row.prompt for row in rows]
    pairs = None if form.text_pair is None else [row.completion for row in rows]
    index = {name: number for number, name in enumerate(names)}
    encoded = (
        one
        for batch in encode_batches(texts, tokenizer, pairs, **options)
        for one in zip(batch["input_ids"], _types(batch), strict=True)
    )
    return [
        Example(tuple(ids), label=index[str(row.label)], token_type_ids=types)
        for row, (ids, types) in zip(rows, encoded, strict=True)
    ]


def cut_labelled(
    whole: Sequence[Example],
    rows: Sequence[Row],
    form: LabelFormat,
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[Example]:
    """The same examples, those longer than `max_length` cut between their special tokens."""
    long = [i for i, example in enumerate(whole) if len(example.input_ids) > max_length]
    cut = list(whole)
    shorter = labelled_examples([rows[i] for i in long], form, names, tokenizer, max_length)
    for i, example in zip(long, shorter, strict=True):
        cut[i] = example
    return cut


def _require_room(max_length: int, num_special: int) -> None:
    # A tokenizer that has no room for its special tokens does not cut at all.
    if num_special >= max_length:
        raise InputError(
            f"data.max_length: {max_length} leaves no room for text, because the tokenizer adds "
            f"{num_special} special tokens. Give more than {num_special}."
        )


def _types(batch: Mapping[str, Any]) -> list[tuple[int, ...] | None]:
    if "token_type_ids" not in batch:
        return [None] * len(batch["input_ids"])
    return [tuple(types) for types in batch["token_type_ids"]]
