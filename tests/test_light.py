"""`rsauto report` where only the light set of packages is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rsauto

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "optuna", "transformers", "peft", "datasets", "accelerate")


def light_set() -> list[str]:
    """The packages that the documentation names for machines that only read reports."""
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    command = page.split("<!-- the light set -->")[1].split("```")[1]
    return command.split("pip install")[-1].split()


def with_dependencies(names: list[str]) -> Iterator[Distribution]:
    """The installed distributions of these names, and of all that they need."""
    seen: set[str] = set()
    pending = list(names)
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        found = distribution(name)
        yield found
        wanted = map(Requirement, found.requires or ())
        pending += [
            one.name for one in wanted if not one.marker or one.marker.evaluate({"extra": ""})
        ]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the light set, what it needs, and rsauto itself: nothing else."""
    folder = tmp_path_factory.mktemp("light")
    for found in with_dependencies(light_set()):
        tops = {path.parts[0] for path in found.files or () if ".." not in path.parts}
        for top in tops - {"__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))))
    (folder / "rsauto").symlink_to(Path(rsauto.__file__).parent)
    return folder


def run(packages: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """rsauto in a Python that has no site-packages but these."""
    begin = f"import sys; sys.path.append({str(packages)!r}); from rsauto.cli import run; run()"
    command = [sys.executable, "-I", "-S", "-c", begin, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_what_is_heavy_is_not_there(packages: Path) -> None:
    there = {path.name for path in packages.iterdir()}
    assert not there & set(HEAVY)
    assert {"pandas", "plotly", "pydantic"} <= there
    done = run(packages, "study")
    assert done.returncode == 2
    assert re.search(r"needs (torch|optuna|transformers), which is not installed", done.stderr)
    assert "Traceback" not in done.stderr


def test_report_status_and_compare_need_no_more(packages: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    ignored = shutil.ignore_patterns("best", "recommended", "report.*", "figures", "journal.log")
    shutil.copytree(ROOT / "reports" / "gsm8k-embedded", study, ignore=ignored)
    done = run(packages, "report", study)
    assert done.returncode == 0, done.stderr
    assert "Take rank 64" in done.stdout
    written = (study / "report.html").read_text(encoding="utf-8")
    assert "Take rank 64" in written and len(written) > 1e6
    assert list((study / "figures").glob("*.svg")) and (study / "tradeoff.parquet").exists()
    for words in (["status", study], ["compare", study, study, "--out", tmp_path / "both"]):
        done = run(packages, *words)
        assert done.returncode == 0, done.stderr
