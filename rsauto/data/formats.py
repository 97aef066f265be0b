"""Which format the rows have: what the study file says or, without that, what the columns show."""

from __future__ import annotations

from collections.abc import Collection

from rsauto.config import DataConfig
from rsauto.data.chat import CHAT_COLUMNS, TOOLS, ChatFormat
from rsauto.data.files import Table
from rsauto.data.labels import LabelFormat
from rsauto.data.template import Format, Template, parse_template
from rsauto.errors import InputError, listed, nearest

AnyFormat = Format | ChatFormat | LabelFormat

DETECTED = (
    ("{prompt}", "{completion}"),
    (None, "{text}"),
    ("{question}\n", "{answer}"),
)
"""(prompt, completion) templates tried where the study file gives none."""

DETECTED_TEXTS = (
    ("text",),
    ("sentence",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
"""Columns tried for a text, or a pair, to classify where the study file gives none."""

_ADD = "Add to the data part of the study file"
_UNREAD_CHATS = ("conversation", "chat", "dialog", "dialogue")
"""Names of columns that are likely to hold chats, but are not taken for them by themselves."""


def resolve_format(config: DataConfig, table: Table) -> AnyFormat:
    """The format the study file gives or, without one, the only one that fits the columns.

    Raises InputError with every problem of the templates, or naming the columns and the lines to
    add when no format or more than one fits.
    """
    if config.label is not None:
        form: AnyFormat = _label_format(config, config.label, table)
    elif config.messages is not None:
        _require_column("data.messages", config.messages, table.columns)
        form = _chat(config, None, config.messages, table)
    elif config.text is not None:
        text = parse_template("data.text", config.text, table.columns)
        form = Format(prompt=None, completion=text)
    elif config.prompt is not None and config.completion is not None:
        form = _pair(config.prompt, config.completion, table.columns)
    else:
        form = _detected(config, table)
    if isinstance(form, Format) and form.prompt is not None:
        form = _chat_pair(config, form, form.prompt, table)
    if config.chat_template is not None and not isinstance(form, ChatFormat):
        raise InputError(
            f"data.chat_template: {config.chat_template!r} has no effect, because the rows are no "
            f"chats but {form}. Remove it, or give data.messages."
        )
    return form


def _require_column(field: str, column: str, columns: Collection[str]) -> None:
    if column not in columns:
        raise InputError(
            f"{field}: {column!r} is no column.{nearest(column, columns)} "
            f"The columns are {listed(columns)}."
        )


def _chat(config: DataConfig, prompt: str | None, completion: str, table: Table) -> ChatFormat:
    return ChatFormat(
        prompt=prompt,
        completion=completion,
        has_tools=TOOLS in table.columns,
        needs_assistant=config.loss_on == "completion",
    )


def _chat_pair(config: DataConfig, form: Format, prompt: Template, table: Table) -> AnyFormat:
    """A pair of chats where two bare columns have lists in their first row, else `form`."""
    columns = form.columns
    bare = all(template.source == f"{{{column}}}" for template, column in
               zip((prompt, form.completion), columns, strict=False))  # fmt: skip
    if not bare or len(columns) != 2:
        return form
    (first,) = table.take([0], columns)
    if not any(isinstance(first.get(column), (list, tuple)) for column in columns):
        return form
    return _chat(config, columns[0], columns[1], table)


def _pair(prompt: str, completion: str, columns: Collection[str]) -> Format:
    """Both templates, and the problems of both."""
    parsed = _parsed({"data.prompt": prompt, "data.completion": completion}, columns)
    return Format(prompt=parsed[0], completion=parsed[1])


def _parsed(sources: dict[str, str], columns: Collection[str]) -> list[Template]:
    """A template for every field. Raises InputError with the problems of all of them."""
    parsed: list[Template] = []
    problems: list[str] = []
    for field, source in sources.items():
        try:
            parsed.append(parse_template(field, source, columns))
        except InputError as error:
            problems.extend(error.problems)
    if problems:
        raise InputError(problems)
    return parsed


def _label_format(config: DataConfig, label: str, table: Table) -> LabelFormat:
    _require_column("data.label", label, table.columns)
    if config.text is None:
        if config.text_pair is not None:
            raise InputError("data.text: give it too, because data.text_pair is given.")
        sources = [f"{{{column}}}" for column in _detected_texts(label, table)]
    else:
        sources = [config.text] + ([] if config.text_pair is None else [config.text_pair])
    fields = ("data.text", "data.text_pair")
    parsed = _parsed(dict(zip(fields, sources, strict=False)), table.columns)
    for field, template in zip(fields, parsed, strict=False):
        if label in template.columns:
            raise InputError(
                f"{field}: {template.source!r} reads the column {label!r}, which is the label: "
                f"the text would give the class away. Leave it out."
            )
    return LabelFormat(
        text=parsed[0],
        text_pair=parsed[1] if len(parsed) > 1 else None,
        label=label,
        names=table.class_names(label),
    )


def _detected_texts(label: str, table: Table) -> tuple[str, ...]:
    """The text, or the pair, that the columns show."""
    there = set(table.columns) - {label}
    fitting = [texts for texts in DETECTED_TEXTS if set(texts) <= there]
    widest = [texts for texts in fitting if not any(set(texts) < set(other) for other in fitting)]
    if len(widest) == 1:
        return widest[0]
    which = "more than one of them may be" if widest else "none of them is known to be"
    others = [column for column in table.columns if column != label] or ["column"]
    named = widest[0] if widest else (others[0],)
    raise InputError(
        f"{table.source}: the columns are {listed(table.columns)}, and {which} the text to "
        f'classify. {_ADD}\n  text: "{{{named[0]}}}"\nand, for pairs, text_pair as well.'
    )


def _detected(config: DataConfig, table: Table) -> AnyFormat:
    there = set(table.columns)
    fitting: list[AnyFormat] = []
    for prompt, completion in DETECTED:
        sources = {} if prompt is None else {"data.prompt": prompt}
        try:
            *before, last = _parsed(sources | {"data.completion": completion}, table.columns)
        except InputError:
            continue
        fitting.append(Format(prompt=before[0] if before else None, completion=last))
    fitting += [_chat(config, None, name, table) for name in CHAT_COLUMNS if name in there]
    if len(fitting) == 1:
        return fitting[0]
    raise InputError(_several(fitting, table) if fitting else _none(table))


def _several(fitting: list[AnyFormat], table: Table) -> str:
    ways = " or ".join(str(one) for one in fitting)
    lines = "\nor\n".join(_lines_to_add(one) for one in fitting)
    return (
        f"{table.source}: the columns are {listed(table.columns)}, which can be read as {ways}. "
        f"{_ADD}\n{lines}"
    )


def _lines_to_add(form: AnyFormat) -> str:
    if isinstance(form, ChatFormat):
        return f"  messages: {form.completion}"
    sources = [template.source.replace("\n", "\\n") for template in form.templates]
    if len(sources) == 1:
        return f'  text: "{sources[0]}"'
    return f'  prompt: "{sources[0]}"\n  completion: "{sources[1]}"'


def _none(table: Table) -> str:
    chats = [column for column in table.columns if column.lower() in _UNREAD_CHATS]
    there_are = f"{table.source}: the columns are {listed(table.columns)}"
    if chats:
        return f"{there_are}; {chats[0]!r} looks like chats. {_ADD}\n  messages: {chats[0]}"
    names = [*table.columns, "column", "column"]
    return (
        f"{there_are}, and none of prompt and completion, text, question and answer, messages is "
        f'among them. {_ADD}\n  prompt: "{{{names[0]}}}\\n"\n  completion: "{{{names[1]}}}"\n'
        f'or, to train on all of it, text: "{{{names[0]}}}"'
    )
