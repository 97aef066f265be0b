"""Every command of the tutorial, run as it stands there; only study and training are shorter."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from processes import rsauto
from tiny_study import environment

TUTORIAL = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text(encoding="utf-8")
SHORTER = {
    "study": [
        "--trials",
        "4",
        "--set",
        "training.steps=8",
        "--set",
        "search.seeds=1",
        "--set",
        "data.validation_rows=16",
    ],
    "train": ["--epochs", "0.05"],
}
"""What is added to a command; the last of two equal options counts."""


def blocks(language: str) -> list[str]:
    found = re.findall(r"```(\w*)\n(.*?)```", TUTORIAL, flags=re.DOTALL)
    return [text for name, text in found if name == language]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tutorial")


def test_its_commands_run_one_after_the_other(place: Path) -> None:
    lines = [shlex.split(line) for line in "".join(blocks("sh")).splitlines()]
    calls = [words[1:] for words in lines if words[0] == "rsauto"]
    assert [words[0] for words in calls] == ["study", "plan", "status", "train", "export", "export"]
    for words in calls:
        done = rsauto(*words, *SHORTER.get(words[0], []), cwd=place)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
    assert "parity" in done.stdout + done.stderr


def test_its_model_answers(place: Path) -> None:
    """From the weights that its commands have written, which were trained for less."""
    (code,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=environment(), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = next(text for text in blocks("") if "nefi" in text)
    question = shown.partition("=")[0]
    assert done.stdout.startswith(question) and len(done.stdout) > len(question) + 2
