"""What the documentation says is there, is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from rsauto import study_file
from rsauto.cli import app
from rsauto.config import StudyConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


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


def test_every_option_of_the_readme_is_an_option() -> None:
    text = CliRunner().invoke(app, ["study", "--help"], env={"COLUMNS": "200"}).stdout
    named = set(re.findall(r"^\| `(--[a-z-]+)", README, flags=re.MULTILINE))
    assert len(named) == 10
    assert all(option in text for option in named)


def test_every_example_of_a_study_file_is_valid() -> None:
    whole, *parts = code_blocks("yaml")
    config = StudyConfig.model_validate({"name": "gsm8k", **yaml.safe_load(whole)})
    assert config.memory_budget == 24 * 2**30
    assert len(parts) == 7
    for part in parts:
        StudyConfig.model_validate(yaml.safe_load(part))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_file_is_valid_and_says_what_it_asks(path: Path) -> None:
    config = study_file.load(path)
    assert config.name == path.stem
    text = path.read_text(encoding="utf-8")
    assert "# Asks:" in text
    assert "# Hardware:" in text


def test_nothing_is_left_to_fill_in() -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        assert "@@" not in path.read_text(encoding="utf-8")
