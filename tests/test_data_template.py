"""Templates read columns and nothing else; formats are found or refused; rows are checked."""

from __future__ import annotations

import string
from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsauto.config import DataConfig
from rsauto.data import splits_from_objects
from rsauto.data.files import table_of
from rsauto.data.formats import AnyFormat, resolve_format
from rsauto.data.template import parse_template
from rsauto.errors import InputError


def format_of(columns: Collection[str], **settings: Any) -> AnyFormat:
    table = table_of([dict.fromkeys(columns, "a")], "rows")
    return resolve_format(DataConfig(**settings), table)


def fill(source: str, values: dict[str, str]) -> str:
    return parse_template("data.prompt", source, values).fill(values)


def test_placeholders_escapes_and_bare_columns() -> None:
    values = {"q": "2+2?", "a b": "{q}"}
    assert fill("Q: {q}\n{a b}", values) == "Q: 2+2?\n{q}"
    assert fill('{{"q": "{q}"}}', values) == '{"q": "2+2?"}'
    assert fill("q", values) == "2+2?"
    assert parse_template("data.prompt", "q", values).source == "{q}"
    assert fill("{meta.title}", {"meta.title": "x"}) == "x"


@pytest.mark.parametrize(
    "source",
    "{row.__class__} {q.__class__} {q[0]} {q.__init__.__globals__} "
    "{0} {} {q!r} {q:10} {q:{q}} {__class__}".split(),
)
def test_placeholders_reach_nothing_but_columns(source: str) -> None:
    with pytest.raises(InputError, match=r"data\.prompt: .*'q'"):
        fill(source, {"q": "x"})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{qestion}", r"names the column 'qestion', .* Did you mean 'question'\? The columns are"),
        ("qestion", r"no \{column\} placeholder and is no column\. Did you mean 'question'\?"),
        ("{question", r"is no template: .*Write \{\{ and \}\} for braces"),
        ("question}", "is no template"),
        ("{question.x}", "only plain column names are allowed, no attributes and no indices"),
        ("{question[x]}", "only plain column names are allowed, no attributes and no indices"),
        ("", "has no .*placeholder"),
    ],
)
def test_wrong_templates_say_what_is_wrong(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fill(source, {"question": "x", "answer": "y"})


@given(st.lists(st.sampled_from(["{{", "}}", "{a}", "{b}", " ", "x", "\n"]), min_size=1))
def test_filling_agrees_with_str_format(parts: list[str]) -> None:
    source = "".join(parts)
    values = {"a": "1}", "b": "{a}"}
    if not {"{a}", "{b}"} & set(parts):
        with pytest.raises(InputError):
            fill(source, values)
    else:
        assert fill(source, values) == source.format(**values)


@given(st.text(alphabet=string.printable, max_size=30))
def test_any_template_is_filled_or_refused(source: str) -> None:
    try:
        filled = fill(source, {"a": "value"})
    except InputError:
        return
    assert "value" in filled


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["id", "prompt", "completion"], "prompt '{prompt}', completion '{completion}'"),
        (["text", "label"], "text '{text}'"),
        (["question", "answer"], "prompt '{question}\\n', completion '{answer}'"),
        (["messages", "prompt"], "chat, messages 'messages'"),
        (["id", "conversations", "tools"], "chat, messages 'conversations', tools 'tools'"),
    ],
)
def test_known_columns_need_no_template(columns: list[str], expected: str) -> None:
    assert str(format_of(columns)) == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["text", "question", "answer"], "can be read as text .* or prompt .*question.*Add to"),
        (["prompt", "answer", "x"], "none of .* is among them.*\n  prompt: .{prompt}\\\\n.\n"),
        (["messages", "text"], r'text .* or chat.*Add to.*  text: ".text."\nor\n  messages: mes'),
        (["id", "chat"], "'chat' looks like chats.*\n  messages: chat"),
        (["only"], r'train on all of it, text: "\{only\}"'),
    ],
)
def test_unclear_columns_are_refused_with_lines_to_add(columns: list[str], message: str) -> None:
    with pytest.raises(InputError, match=f"(?s)rows: the columns are '.*{message}"):
        format_of(columns)


def test_both_templates_are_checked_at_once() -> None:
    with pytest.raises(InputError) as caught:
        format_of(["question", "answer"], prompt="{qq}", completion="{aa}")
    assert [problem[:16] for problem in caught.value.problems] == [
        "data.prompt: '{q",
        "data.completion:",
    ]


def test_numbers_become_text_and_empty_prompts_are_allowed() -> None:
    form = format_of("abc", prompt="{a}{b}", completion="{c}")
    (row, other) = form.render(
        [(1, {"a": 1, "b": 0.5, "c": True}), (2, {"a": "", "b": "", "c": "007"})], "rows"
    )
    assert (row.prompt, row.completion) == ("10.5", "True")
    assert (other.number, other.prompt, other.completion) == (2, "", "007")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "no value .null. in column 'answer'"),
        (float("nan"), "no value .null. in column 'answer'"),
        ("", "an empty completion"),
        (" \n", "an empty completion"),
        (["a"], r"neither text nor number \(list; chats are given as messages"),
        ({"text": "a"}, r"neither text nor number \(dict; chats are given"),
        ("a\ud800", "broken Unicode"),
    ],
)
def test_unusable_values_are_counted_and_the_first_is_named(value: Any, message: str) -> None:
    rows = [{"question": f"q{i}", "answer": "a"} for i in range(20)]
    for index in (7, 11):
        rows[index] = {"question": "q", "answer": value}
    validation = [{"question": "v", "answer": "a"}]
    with pytest.raises(InputError, match=rf"train rows: 2 of 20 rows have .*{message}.*row 8\."):
        splits_from_objects(rows, validation, DataConfig())


def test_a_column_missing_from_one_row_is_a_null() -> None:
    rows = [{"text": "a"}, {"other": "b"}]
    with pytest.raises(InputError, match=r"1 of 2 rows have no value .* 'text', first row 2"):
        splits_from_objects(rows, [{"text": "c"}], DataConfig())


def test_every_kind_of_problem_is_reported() -> None:
    rows = [{"prompt": None, "completion": "a"}, {"prompt": "p", "completion": ""}]
    with pytest.raises(InputError) as caught:
        splits_from_objects(rows, rows, DataConfig())
    assert len(caught.value.problems) == 2
