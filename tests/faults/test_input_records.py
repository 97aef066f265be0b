"""Study folders that were damaged, invented, or written by another version of rsauto."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report_records import study_records, write_study

from rsauto.errors import InputError
from rsauto.report.compare import comparison
from rsauto.report.drawing import drawing
from rsauto.report.figures import panels
from rsauto.report.markdown import markdown
from rsauto.report.page import csv_bytes, page, parquet_bytes
from rsauto.report.ranks import rank_table
from rsauto.report.table import load_study
from rsauto.report.verdict import judge
from rsauto.status import status_lines

TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["\ud800", "\0", "\x1b[31m", "$\\frac{", "<b>", "=1+1", "\u202e", "x" * 9999]),
)
NUMBERS = st.one_of(
    st.integers(), st.floats(),
    st.sampled_from([0, -1, 2**62, 2**63, -(2**70), 10**400, 1e308, -1e308, 5e-324]),
)  # fmt: skip
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
WIDE = [chr(ord(letter) + 0xFEE0) for letter in "=+-@"]
"""The same letters as wide as a Japanese one, which a spreadsheet takes for them."""
FIELDS = sorted(study_records()[0].to_json())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of eight trials, all of its kinds."""
    found = study_records()
    return write_study(tmp_path_factory.mktemp("study"), [*found[:2], *found[8:11], *found[-3:]])


@pytest.fixture(scope="module")
def lines(folder: Path) -> list[dict[str, Any]]:
    written = (folder / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in written]


@pytest.fixture(autouse=True)
def _whole_again(folder: Path, lines: list[dict[str, Any]]) -> Iterator[None]:
    environment = (folder / "environment.json").read_bytes()
    yield
    write_lines(folder, lines)
    (folder / "environment.json").write_bytes(environment)


def write_lines(folder: Path, values: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(value) + "\n" for value in values)
    (folder / "trials.jsonl").write_text(text, encoding="utf-8")


def told(folder: Path, *, drawn: bool = False) -> str | None:
    """Everything that is made of a study's files; the page, or None where they are refused."""
    try:
        study = load_study(folder)
        verdict = judge(study.config, study.records, study.environment)
        status_lines(study)
    except InputError as error:
        assert str(folder) in str(error) and len(str(error)) < 20_000
        return None
    shown, ranks = panels(study.records, verdict), rank_table(study.records, verdict)
    csv_bytes(study.trials)
    parquet_bytes(study.trials)
    markdown(study, verdict, ranks, shown).encode("utf-8")
    for panel in shown if drawn else ():
        drawing(panel)
    text = page(study, verdict, ranks, shown)
    text.encode("utf-8")
    return text


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(FIELDS), JUNK)
def test_any_value_of_a_record_is_refused_in_words_or_read(
    folder: Path, lines: list[dict[str, Any]], field: str, value: Any
) -> None:
    write_lines(folder, [{**lines[3], field: value}])
    try:
        load_study(folder)
    except InputError as error:
        assert "trials.jsonl line 1" in str(error)


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(FIELDS), JUNK)
def test_any_value_of_a_record_is_refused_in_words_or_shown(
    folder: Path, lines: list[dict[str, Any]], field: str, value: Any
) -> None:
    write_lines(folder, [*lines[:3], {**lines[3], field: value}, *lines[4:]])
    told(folder)


WORST = [
    ("rank", 0), ("rank", 2**63), ("number", 10**400), ("learning_rate", 0.0), ("alpha", -1),
    ("learning_rate", float("nan")), ("eval_loss", 1e308), ("error", "\ud800"),
    ("target_modules", ["\0"]), ("rank_pattern", {"\ud800": 1}), ("curve", [5]),
    ("metrics", {"a": 1e300}), ("allocation", {"tinit": 2**64, "tfinal": 0}),
    ("activation_moments", {"a": ["\0"]}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WORST)
def test_what_no_trial_can_have_written_is_refused_with_its_name(
    folder: Path, lines: list[dict[str, Any]], field: str, value: Any
) -> None:
    write_lines(folder, [*lines[:3], {**lines[3], field: value}, *lines[4:]])
    with pytest.raises(InputError) as caught:
        load_study(folder)
    assert "trials.jsonl line 4" in str(caught.value) and field in str(caught.value)


@pytest.mark.parametrize("line", ["[" * 200_000, '{"a":' * 200_000, "1" * 5000, "\0", "{", "[]"])
@pytest.mark.parametrize("file", ["trials.jsonl", "environment.json"])
def test_broken_lines_are_refused_with_their_file(folder: Path, file: str, line: str) -> None:
    (folder / file).write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=file):
        load_study(folder)


@pytest.mark.parametrize("file", ["trials.jsonl", "environment.json", "study.yaml"])
def test_a_file_in_another_encoding_is_refused(folder: Path, file: str) -> None:
    before = (folder / file).read_bytes()
    (folder / file).write_bytes(before.decode().encode("utf-16"))
    try:
        with pytest.raises(InputError, match=file):
            load_study(folder)
    finally:
        (folder / file).write_bytes(before)


@settings(deadline=None, max_examples=5)
@given(st.dictionaries(
    st.sampled_from(["fingerprints", "packages", "baseline", "ended", "device", "x",
                     "memory_budget_bytes", "versions"]),
    JUNK, max_size=4,
))  # fmt: skip
def test_any_environment_is_refused_in_words_or_shown(folder: Path, values: dict[str, Any]) -> None:
    (folder / "environment.json").write_text(json.dumps(values), encoding="utf-8")
    told(folder)


def test_texts_that_are_formulas_and_markup_are_drawn(
    folder: Path, lines: list[dict[str, Any]]
) -> None:
    odd = "$\\frac{<b>\x1b[31m\x0b\u202e&amp;]]>"
    changed = {"target_modules": [odd], "worker": odd, "optimizer": odd, "scaling_rule": odd,
               "rank_pattern": {odd: 3, odd + ".1": 4}, "metrics": {odd: 1.0}}  # fmt: skip
    write_lines(folder, [{**line, **changed} for line in lines])
    assert told(folder, drawn=True) is not None


def test_a_newer_version_has_more_fields_and_an_older_one_fewer(
    folder: Path, lines: list[dict[str, Any]]
) -> None:
    later = [{**line, "version": 9, "later": {"a": [1]}} for line in lines]
    for line in later:
        for point in line["curve"]:
            point["later"] = 1
        if line["allocation"]:
            line["allocation"]["later"] = "x"
    write_lines(folder, later)
    assert told(folder) is not None
    needed = {"number", "outcome", "role", "method", "rank", "alpha", "scaling_rule", "gamma_r",
              "target_modules", "learning_rate", "lr_ratio", "optimizer", "schedule", "batch_size",
              "max_length", "seed"}  # fmt: skip
    write_lines(folder, [{k: v for k, v in line.items() if k in needed} for line in lines])
    assert told(folder) is not None
    write_lines(folder, [{k: v for k, v in line.items() if k != "rank"} for line in lines])
    with pytest.raises(InputError, match=r"line 1 is not a trial record.*rank"):
        load_study(folder)


def test_settings_of_a_newer_version_are_named(folder: Path) -> None:
    path = folder / "study.yaml"
    before = path.read_text(encoding="utf-8")
    path.write_text(before + "later: 1\n", encoding="utf-8")
    try:
        with pytest.raises(InputError, match="later: unknown key"):
            load_study(folder)
    finally:
        path.write_text(before, encoding="utf-8")


@settings(deadline=None, max_examples=15)
@given(st.text(min_size=1, max_size=6).filter(lambda text: "\0" not in text))
def test_no_cell_of_a_table_is_a_formula(
    folder: Path, lines: list[dict[str, Any]], text: str
) -> None:
    starts = ("", "=", "+", "-", "@", "\t", "\r", "\n", *WIDE)
    values = []
    for number, cell in enumerate(start + text for start in starts):
        changed = {"error": cell, "worker": cell, "target_modules": [cell], "metrics": {cell: 1.0}}
        values.append({**lines[0], **changed, "number": number})
    write_lines(folder, values)
    rows = csv.reader(io.StringIO(csv_bytes(load_study(folder).trials).decode(), newline=""))
    for row in rows:
        assert not [c for c in row if c[:1] in {*"=+@\t\r\n", *WIDE}], row
        assert not [c for c in row if c[:1] == "-" and not c[1:2].isdecimal()], row


def test_a_comparison_takes_the_same_care(folder: Path, lines: list[dict[str, Any]]) -> None:
    write_lines(folder, [{**lines[0], "rank": 0}])
    with pytest.raises(InputError, match="rank is 0"):
        comparison([folder, folder])
