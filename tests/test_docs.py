"""What the documentation says is there, is there."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer
import yaml
from typer.testing import CliRunner

from rsauto import study_file
from rsauto.cli import app
from rsauto.config import StudyConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


def code_blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def page_name(path: Path) -> str:
    return path.stem


def test_both_commands_stand_on_the_first_screen() -> None:
    first, second = code_blocks("sh")[:2]
    assert "rsauto study" in first
    assert "pytest" in second
    assert README.index(second) < 3000
    for command in (first, second):
        assert "-c constraints.txt" in command


def test_the_check_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "<!-- the test command -->" in script
    marked = README.split("<!-- the test command -->\n```sh\n")[1].split("```")[0]
    assert marked == code_blocks("sh")[1]


def test_constraints_pin_every_dependency() -> None:
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    }
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = re.findall(r'^    "([a-zA-Z-]+)>=', project, flags=re.MULTILINE)
    assert len(wanted) > 10
    assert {name.lower() for name in wanted} <= pinned


def test_every_path_in_the_tree_exists() -> None:
    tree = README.split("## What is where")[1].split("```")[1]
    for line in tree.strip().splitlines():
        folder = "" if not line.startswith("  ") else "rsauto/"
        for name in re.findall(r"[\w/]+\.py|[\w]+/", line.split("   ")[0] if folder else line):
            assert (ROOT / folder / name).exists(), name


def test_the_options_of_the_readme_are_all_there_are() -> None:
    text = CliRunner().invoke(app, ["study", "--help"], env={"COLUMNS": "200"}).stdout
    named = set(re.findall(r"^\| `(--[a-z-]+)", README, flags=re.MULTILINE))
    assert named == set(re.findall(r"^\W*(--[a-z-]+)", text, flags=re.MULTILINE)) - {"--help"}


def test_every_example_of_a_study_file_is_valid() -> None:
    (whole,) = code_blocks("yaml")
    config = StudyConfig.model_validate({"name": "gsm8k", **yaml.safe_load(whole)})
    assert config.memory_budget == 24 * 2**30
    parts = [b for page in PAGES[1:] for b in code_blocks("yaml", page.read_text(encoding="utf-8"))]
    assert len(parts) >= 7
    for part in parts:
        StudyConfig.model_validate(yaml.safe_load(part))


def commands(text: str) -> list[list[str]]:
    """Every call of rsauto in the shell blocks of a page, without the program's own name."""
    found = []
    for line in "".join(code_blocks("sh", text)).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        places = [n for n, word in enumerate(words) if word.rpartition("/")[2] == "rsauto"]
        found += [words[n + 1 :] for n in places if words[n - 1 : n] != ["--no-deps"]]
    return found


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_every_command_of_the_documentation_is_one(path: Path) -> None:
    """Its options and arguments are read as the command reads them; other tests run them."""
    group: Any = typer.main.get_command(app)
    for name, *words in commands(path.read_text(encoding="utf-8")):
        assert name in group.commands, name
        group.commands[name].make_context(name, words)


def test_the_commands_are_found() -> None:
    assert sum(len(commands(path.read_text(encoding="utf-8"))) for path in PAGES) > 25


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_every_link_leads_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    for target in links:
        place, _, anchor = target.partition("#")
        page = (path.parent / place) if place else path
        assert page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def test_the_reference_is_made_from_the_code() -> None:
    script = ROOT / "docs" / "make_reference.py"
    spec = importlib.util.spec_from_file_location("make_reference", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert module.reference() == written, "run python docs/make_reference.py"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_file_is_valid_and_says_what_it_asks(path: Path) -> None:
    config = study_file.load(path)
    assert config.name == path.stem
    text = path.read_text(encoding="utf-8")
    assert "# Asks:" in text
    assert "# Hardware:" in text


def test_nothing_is_left_to_fill_in() -> None:
    for path in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        assert "@@" not in path.read_text(encoding="utf-8")


def test_the_notebook_runs_and_shows_what_it_showed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "docs")
    book = json.loads((ROOT / "docs" / "table.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    shown = 0
    for cell in book["cells"]:
        if cell["cell_type"] != "code":
            continue
        *statements, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(statements, []), "table.ipynb", "exec"), names)
        if not isinstance(last, ast.Expr):
            exec(compile(ast.Module([last], []), "table.ipynb", "exec"), names)
            continue
        found = eval(compile(ast.Expression(last.value), "table.ipynb", "eval"), names)
        for output in cell["outputs"]:
            if "text/plain" in output.get("data", {}):
                with pd.option_context("display.max_columns", 20, "display.width", 80):
                    assert repr(found) == "".join(output["data"]["text/plain"])
                shown += 1
    assert shown >= 5
