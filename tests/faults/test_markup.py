"""A script in every field of a study that will hold one: pages and cards show it as text."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from test_report_records import ENVIRONMENT, study_records, write_study

from rsauto.card import Subject, model_card
from rsauto.config import StudyConfig
from rsauto.errors import InputError
from rsauto.records import EvalPoint, TrialRecord
from rsauto.report.markdown import code, inline
from rsauto.report.page import write_report
from rsauto.report.table import load_study
from rsauto.report.verdict import judge

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = "</script></style><script>window.stolen=1</script><img src=x onerror=window.stolen=1>"
BREAKS = f"a|b`c``` [x](javascript:1) {SCRIPT}\n\n# {SCRIPT}\n\n```\n{SCRIPT}"
"""The same with whatever ends a table, a code span, a fence and a paragraph of Markdown."""

FIELDS = {*TrialRecord.__dataclass_fields__, *EvalPoint.__dataclass_fields__, *ENVIRONMENT,
          *StudyConfig.model_fields}  # fmt: skip
"""Keys that are ours: a value under another one would only be missed."""

Set = Callable[[Any], None]


def leaves(value: Any) -> Iterator[tuple[Any, Set]]:
    """Every value inside, each with what puts another one in its place."""
    found = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(found):
        if isinstance(inner, dict | list):
            yield from leaves(inner)
        yield inner, lambda other, key=key: value.__setitem__(key, other)
    if isinstance(value, dict) and not FIELDS & value.keys():
        for key, inner in list(value.items()):
            yield key, lambda other, key=key, inner=inner: _rename(value, key, other, inner)


def _rename(values: dict[str, Any], key: str, other: str, inner: Any) -> None:
    if other == key:  # it is put back
        del values[_planted(values)]
    else:
        del values[key]
    values[other] = inner


def _planted(values: dict[str, Any]) -> str:
    return next(key for key in values if "stolen" in key)


def plant(folder: Path, text: str) -> int:
    """Puts the text wherever a reader accepts it; how many places those are."""
    num_planted = 0
    for name in ("study.yaml", "environment.json", "trials.jsonl"):
        path = folder / name
        written = path.read_text(encoding="utf-8")
        if name == "trials.jsonl":
            values = [json.loads(line) for line in written.splitlines()]
        else:
            values = [yaml.safe_load(written)]  # JSON is YAML
        for old, put in leaves(values):
            if isinstance(old, dict | list):
                continue
            put(text)
            path.write_text(dumped(name, values), encoding="utf-8")
            try:
                study = load_study(folder)
                judge(study.config, study.records, study.environment)
                num_planted += 1
            except InputError:
                put(old)
        path.write_text(dumped(name, values), encoding="utf-8")
    load_study(folder)
    return num_planted


def dumped(name: str, values: list[Any]) -> str:
    if name == "study.yaml":
        return yaml.safe_dump(values[0])
    if name == "environment.json":
        return json.dumps(values[0])
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of such a study."""
    found = study_records()
    folder = write_study(tmp_path_factory.mktemp("study"), [found[0], found[8], *found[-2:]])
    assert plant(folder, BREAKS) > 60
    assert load_study(folder).records[0].eval_loss is not None
    write_report(folder)
    return folder


class Tags(HTMLParser):
    """Names of the elements there are, and where links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.links |= {value or "" for name, value in attrs if name in ("href", "src")}
        assert not [name for name, _ in attrs if name.startswith("on")]


def tags_of(markdown: str) -> Tags:
    """Rendered with HTML allowed, and links of any kind: whatever is there comes through."""
    renderer = MarkdownIt("commonmark", {"html": True}).enable("table")
    renderer.validateLink = lambda url: True  # type: ignore[method-assign]
    found = Tags()
    found.feed(renderer.render(markdown))
    return found


def test_the_page_shows_scripts_as_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    browser = importlib.import_module("browser")
    program = browser.find_chromium()
    if program is None:
        pytest.skip("no chromium on this machine")
    with browser.opened(program) as page:
        page.resize(1280, 12000)
        page.open(folder / "report.html", "document.documentElement.dataset.ready")
        for row in range(3):  # what hovers and details show is made when they are opened
            page.run(f"document.querySelectorAll('#trials tbody tr')[{row}]?.click()")
        page.run("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert page.run("window.stolen === undefined")
        assert page.run("document.querySelectorAll('img, iframe, object, embed').length") == 0
        assert page.run("document.body.textContent.includes('window.stolen=1')")
        assert page.complaints() == []


def test_the_markdown_report_shows_scripts_as_text(folder: Path) -> None:
    found = tags_of((folder / "report.md").read_text(encoding="utf-8"))
    assert not found.names & {"script", "style", "iframe", "object"}
    assert not [link for link in found.links if not link.startswith("figures/")]


def test_a_card_shows_scripts_as_text(folder: Path) -> None:
    study = load_study(folder)
    for record in study.records:
        subject = Subject(
            config=study.config, base_name=BREAKS, record=record,
            label_names=("yes", BREAKS), fingerprints={"data": BREAKS}, packages={BREAKS: BREAKS},
        )  # fmt: skip
        text = model_card(subject)
        assert "stolen" in text
        body = text.split("\n---\n", 1)[1]
        found = tags_of(body)
        assert not found.names & {"script", "img", "style"} and not found.links
        metadata = yaml.safe_load(text.split("\n---\n", 1)[0].removeprefix("---"))
        assert metadata["library_name"] == "peft"


@pytest.mark.parametrize("text", [BREAKS, "`", "``` `` `", "", "a_b _c_ *d*", "&lt;", "\\|"])
def test_text_and_code_of_a_cell_come_out_as_they_went_in(text: str) -> None:
    for write in (inline, lambda text: code(text).replace("|", "\\|")):
        rendered = MarkdownIt().enable("table").render(f"| x |\n|---|\n| {write(text)} |")
        found = Words()
        found.feed(rendered.split("<td>")[1].split("</td>")[0])
        assert found.text.strip() == " ".join(text.split())


class Words(HTMLParser):
    """What of some HTML is text."""

    text = ""

    def handle_data(self, data: str) -> None:
        self.text += data
