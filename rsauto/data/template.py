"""From columns to text: templates, and the checks of every row.

A template is text with `{column}` placeholders; `{{` and `}}` stand for braces. A placeholder is a
column name and nothing else: no attribute, index, conversion or format, so a template can reach
nothing but the row.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rsauto.data.rows import Numbered, Problems, Row, text_problem
from rsauto.errors import InputError, listed, nearest


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
    def has_prompts(self) -> bool:
        return self.prompt is not None

    @property
    def templates(self) -> tuple[Template, ...]:
        return tuple(part for part in (self.prompt, self.completion) if part is not None)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it reads, each once."""
        of_prompt = self.prompt.columns if self.prompt is not None else ()
        return tuple(dict.fromkeys((*of_prompt, *self.completion.columns)))

    def __str__(self) -> str:
        if self.prompt is None:
            return f"text {self.completion.source!r}"
        return f"prompt {self.prompt.source!r}, completion {self.completion.source!r}"

    def render(self, numbered: Numbered, source: str) -> tuple[Row, ...]:
        """Rows as text. Numbers become text as Python writes them (1, 0.5, True).

        A row whose completion (or text) is empty or only white space teaches nothing, and a null
        is nothing to train on; neither is dropped silently. Empty prompts are allowed.

        Raises InputError, one problem for each kind, with how many rows have it and the first.
        """
        rows: list[Row] = []
        problems = Problems(source)
        empty = "an empty text" if self.prompt is None else "an empty completion"
        for number, record in problems.counting(numbered):
            values = text_values(record, self.columns, number, problems)
            if values is None:
                continue
            prompt = "" if self.prompt is None else self.prompt.fill(values)
            row = Row(number, prompt, self.completion.fill(values))
            if not row.completion.strip():
                problems.add(empty, number)
            problems.add_if_long(row)
            rows.append(row)
        problems.raise_if_any()
        return tuple(rows)


def parse_template(field: str, source: str, columns: Collection[str]) -> Template:
    """Check a template against the columns there are; a bare column name stands for `{name}`.

    Raises InputError naming `field`, the template, what is wrong and the columns.
    """
    there_are = f"The columns are {listed(columns)}."
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
    there_are = f"The columns are {listed(columns)}."
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


def text_values(
    record: Mapping[str, Any], columns: Collection[str], number: int, problems: Problems
) -> dict[str, str] | None:
    """The columns as text, or None after adding why one is none to `problems`."""
    found = [text_problem(column, record.get(column)) for column in columns]
    for problem in filter(None, found):
        problems.add(problem, number)
    return None if any(found) else {column: str(record[column]) for column in columns}
