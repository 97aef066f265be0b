"""Who may import whom, and how large a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import rsauto

PACKAGE = Path(rsauto.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(module: str, *, lazy: bool = True) -> set[str]:
    """Modules that ``module`` imports; with ``lazy`` also inside functions. Not for type checking.

    ``from rsauto.data import x`` is rsauto.data, and rsauto.data.x where that is a module.
    """
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(MODULES[module].read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not lazy:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
        pending += ast.iter_child_nodes(node)
    return found


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "rsauto"}


@cache
def loaded_by(module: str) -> frozenset[str]:
    """Everything that importing ``module`` imports, over all of rsauto's own modules."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            pending += imports(name, lazy=False)
            pending += [name.rpartition(".")[0]] if "." in name else []
    return frozenset(seen)


def inside(package: str) -> list[str]:
    return [m for m in MODULES if m == f"rsauto.{package}" or m.startswith(f"rsauto.{package}.")]


def top(names: frozenset[str] | set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("module", ["scaling", "records", "errors"])
def test_the_ground_floor_imports_nothing_but_the_standard_library(module: str) -> None:
    names = imports(f"rsauto.{module}")
    assert not ours(names)
    assert top(names) <= sys.stdlib_module_names


@pytest.mark.parametrize("package", ["adapters", "training"])
def test_adapters_and_training_know_no_optuna_and_no_search(package: str) -> None:
    for module in inside(package):
        loaded = loaded_by(module)
        assert "optuna" not in top(loaded), module
        above = ("rsauto.search", "rsauto.report", "rsauto.cli", "rsauto.console", "rsauto.api")
        assert not [name for name in loaded if name.startswith(above)], module


def test_reports_are_made_without_torch_optuna_or_what_trains() -> None:
    for module in inside("report"):
        names = {name for m in {module} | ours(set(loaded_by(module))) & MODULES.keys()
                 for name in imports(m)}  # fmt: skip
        assert not top(names) & {"torch", "optuna", "transformers", "peft", "accelerate"}, module
        forbidden = ("rsauto.search", "rsauto.training", "rsauto.adapters", "rsauto.memory")
        assert not [name for name in names if name.startswith(forbidden)], module


def test_nobody_imports_the_command_line() -> None:
    importers = [module for module in MODULES if "rsauto.cli" in imports(module)]
    assert set(importers) <= {"rsauto.__main__"}


def test_the_lower_floors_do_not_import_the_search() -> None:
    for package in ("data", "memory", "embedded", "config", "study_file", "base"):
        for module in inside(package):
            assert not [n for n in loaded_by(module) if n.startswith("rsauto.search")], module


def test_no_file_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "helpers", "helper", "common", "manager", "core", "misc"}
    assert not [path for path in FILES if empty & set(path.stem.split("_"))]
    assert not [path for path in FILES if empty & set(path.relative_to(PACKAGE).parts[:-1])]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_says_on_top_what_it_is_for(path: Path) -> None:
    if path.name != "__main__.py":
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import rsauto", "torch optuna transformers peft pandas pydantic typer"),
        ("import rsauto.cli", "torch optuna transformers peft pandas plotly"),
        ("import rsauto.report.page", "torch optuna transformers peft"),
    ],
)
def test_importing_stays_light(statement: str, heavy: str) -> None:
    code = f"{statement}; import sys; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
