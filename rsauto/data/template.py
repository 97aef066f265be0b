"""From columns to text: templates, the formats found without one, and the checks of every row.

A template is text with `{column}` placeholders; `{{` and `}}` stand for braces. A placeholder is a
column name and nothing else: no attribute, index, conversion or format, so a template can reach
nothing but the row.
"""

from __future__ import annotations

import math
import numbers
import string
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rsauto.config import DataConfig
from rsauto.errors import InputError, nearest

CHAT_COLUMNS = frozenset({"messages", "conversations", "conversation", "chat"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """A parsed template: literals, each followed by a column or by nothing."""

    source: str
    parts: tuple[tuple[str, str | None], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it reads, each once, in order of appearance."""
        return tuple(dict.fromkeys(column for _, column in self.parts if column is not None))

    def fill(self, values: Mapping[str, str]) -> str:
        """The text for one row."""
        return "".join(
            literal if column is None else literal + values[column]
            for literal, column in self.parts
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How a row becomes text: prompt and completion, or one text (prompt is None)."""

    prompt: Template | None
    completion: Template

    @property
    def columns(self) -> tuple[str, ...]:
        of_prompt = self.prompt.columns if self.prompt is not None else ()
        return tuple(dict.fromkeys((*of_prompt, *self.completion.columns)))

    def __str__(self) -> str:
        if self.prompt is None:
            return f"text {self.completion.source!r}"
        return f"prompt {self.prompt.source!r}, completion {self.completion.source!r}"


@dataclass(frozen=True, slots=True)
class Row:
    """One example as text."""

    number: int
    """Its place in its source, counted from 1."""
    prompt: str
    """Empty in the text format."""
    completion: str


DETECTED = (
    ("{prompt}", "{completion}"),
    (None, "{text}"),
    ("{question}\n", "{answer}"),
)
"""(prompt, completion) templates tried where the study file gives none."""


def parse_template(field: str, source: str, columns: Collection[str]) -> Template:
    """Check a template against the columns there are; a bare column name stands for `{name}`.

    Raises InputError naming `field`, the template, what is wrong and the columns.
    """
    there_are = f"The columns are {_listed(columns)}."
    try:
        parsed = list(string.Formatter().parse(source))
    except ValueError as error:
        raise InputError(
            f"{field}: {source!r} is no template: {error}. Write {{{{ and }}}} for braces."
        ) from None
    parts: list[tuple[str, str | None]] = []
    for literal, column, spec, conversion in parsed:
        parts.append((literal, column))
        if column is None:
            continue
        if spec or conversion:
            raise InputError(
                f"{field}: {source!r} has a placeholder with a format or a conversion. "
                f"Only {{column}} is allowed. {there_are}"
            )
        if column not in columns:
            raise InputError(_unknown_column(field, source, column, columns))
    if all(column is None for _, column in parts):
        if source in columns:
            return Template(source=f"{{{source}}}", parts=(("", source),))
        raise InputError(
            f"{field}: {source!r} has no {{column}} placeholder and is no column."
            f"{nearest(source, columns)} {there_are}"
        )
    return Template(source=source, parts=tuple(parts))


def _unknown_column(field: str, source: str, column: str, columns: Collection[str]) -> str:
    there_are = f"The columns are {_listed(columns)}."
    if not column:
        return f"{field}: {source!r} has an empty placeholder. Name a column in it. {there_are}"
    if "." in column or "[" in column:
        return (
            f"{field}: {source!r} asks for {column!r}, but only plain column names are allowed, "
            f"no attributes and no indices. {there_are}"
        )
    return (
        f"{field}: {source!r} names the column {column!r}, which is not in the data."
        f"{nearest(column, columns)} {there_are}"
    )


def resolve_format(config: DataConfig, columns: Collection[str], source: str) -> Format:
    """The format the study file gives or, without one, the only one that fits the columns.

    Raises InputError with every problem of the templates, or naming the columns and the lines to
    add when no format or more than one fits.
    """
    if config.text is not None:
        return Format(prompt=None, completion=parse_template("data.text", config.text, columns))
    if config.prompt is not None and config.completion is not None:
        return _pair(config.prompt, config.completion, columns)
    fitting = [
        Format(
            prompt=None if prompt is None else parse_template("data.prompt", prompt, columns),
            completion=parse_template("data.completion", completion, columns),
        )
        for prompt, completion in DETECTED
        if _placeholders(prompt or "") | _placeholders(completion) <= set(columns)
    ]
    if len(fitting) == 1:
        return fitting[0]
    raise InputError(_no_format(fitting, columns, source))


def _pair(prompt: str, completion: str, columns: Collection[str]) -> Format:
    """Both templates, and the problems of both."""
    parsed: list[Template] = []
    problems: list[str] = []
    for field, source in (("data.prompt", prompt), ("data.completion", completion)):
        try:
            parsed.append(parse_template(field, source, columns))
        except InputError as error:
            problems.extend(error.problems)
    if problems:
        raise InputError(problems)
    return Format(prompt=parsed[0], completion=parsed[1])


def _placeholders(template: str) -> set[str]:
    return {column for _, column, _, _ in string.Formatter().parse(template) if column}


def _no_format(fitting: list[Format], columns: Collection[str], source: str) -> str:
    there_are = f"{source}: the columns are {_listed(columns)}"
    add = 'Add to the data part of the study file\n  prompt: "{%s}\\n"\n  completion: "{%s}"'
    if fitting:
        ways = " or ".join(str(one) for one in fitting)
        pairs = [one for one in fitting if one.prompt is not None]
        prompt, completion = pairs[0].columns
        return f"{there_are}, which can be read as {ways}. {add % (prompt, completion)}"
    names = [*columns, "column", "column"]
    chat = CHAT_COLUMNS & set(columns)
    if chat:
        return (
            f"{there_are}; {min(chat)!r} looks like chat data, which is not supported yet. Write "
            f"prompt and answer as plain text into columns of their own, such as prompt and "
            f"completion, or use other columns. "
            f"{add % ('prompt', 'completion')}"
        )
    return (
        f"{there_are}, and none of prompt and completion, text, question and answer is among them. "
        f'{add % (names[0], names[1])}\nor, to train on all of it, text: "{{{names[0]}}}"'
    )


def _listed(columns: Collection[str]) -> str:
    return ", ".join(repr(column) for column in columns) or "none"


def render(
    numbered: Iterable[tuple[int, Mapping[str, Any]]], form: Format, source: str
) -> tuple[Row, ...]:
    """Rows as text. Numbers become text as Python writes them (1, 0.5, True).

    A row whose completion (or text) is empty or only white space teaches nothing, and a null is
    nothing to train on; neither is dropped silently. Empty prompts are allowed.

    Raises InputError, one problem for each kind, with how many rows have it and which is first.
    """
    rows: list[Row] = []
    found: dict[str, list[int]] = {}
    total = 0
    empty = "an empty text" if form.prompt is None else "an empty completion"
    for number, record in numbered:
        total += 1
        problems = [_problem(column, record.get(column)) for column in form.columns]
        for problem in filter(None, problems):
            found.setdefault(problem, []).append(number)
        if any(problems):
            continue
        values = {column: str(record[column]) for column in form.columns}
        row = Row(
            number=number,
            prompt="" if form.prompt is None else form.prompt.fill(values),
            completion=form.completion.fill(values),
        )
        if not row.completion.strip():
            found.setdefault(empty, []).append(number)
        rows.append(row)
    if found:
        raise InputError(
            [
                f"{source}: {len(where)} of {total} rows have {problem}, first row {min(where)}. "
                f"Fill them in or remove them."
                for problem, where in found.items()
            ]
        )
    return tuple(rows)


def _problem(column: str, value: Any) -> str | None:
    """Why a value is no text, as the object of 'rows have ...'; None if it is."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return f"no value (null) in column {column!r}"
    if isinstance(value, str):
        if value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value):
            return None
        return f"broken Unicode (half a surrogate pair) in column {column!r}"
    if isinstance(value, numbers.Number):
        return None
    kind = type(value).__name__
    if isinstance(value, (list, tuple, Mapping)):
        kind += ", and chat or nested data is not supported yet,"
    return f"a value that is neither text nor number ({kind}) in column {column!r}"
