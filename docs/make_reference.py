"""Writes docs/reference.md from the code, so that it cannot say what the code does not.

python docs/make_reference.py            # a test fails where it was forgotten
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import typer
from pydantic import BaseModel

import rsauto
from rsauto.cli import app
from rsauto.config import StudyConfig
from rsauto.records import TrialRecord
from rsauto.report.compare import COLUMNS as COMPARE_COLUMNS
from rsauto.report.table import ALLOCATION_COLUMNS, COLUMNS, PEFT_NAMES

OUT = Path(__file__).with_name("reference.md")


def reference() -> str:
    """The whole page."""
    parts = [
        "# Reference",
        "Made from the code by `python docs/make_reference.py`.",
        "## Commands",
        *commands(),
        "## The study file",
        "Unknown keys are refused with the nearest right one. `--set section.key=value` changes "
        "any of them on the command line.",
        *settings(StudyConfig, ""),
        "## The table",
        "`tradeoff.csv`, `tradeoff.parquet` and `Study.trials`: one row a trial. Absent is empty. "
        "The same fields, with the curve, are a line of `trials.jsonl`.",
        columns(),
        "Names of PEFT's method_comparison, added so that both can be read alike: "
        + ", ".join(f"`{name}` is `{ours}`" for name, ours in PEFT_NAMES.items())
        + ". AdaLoRA's settings are columns too: "
        + ", ".join(f"`{name}`" for name in ALLOCATION_COLUMNS)
        + ". `train_loss` is the last point of the curve, `feasible` whether a trial fits its "
        "budget, `refit` whether it was given the ranks that AdaLoRA found; every metric is a "
        "column of its own name.",
        "`rsauto compare` writes " + ", ".join(f"`{name}`" for name in COMPARE_COLUMNS) + ".",
        "## From Python",
        *functions(),
    ]
    return "\n\n".join(parts) + "\n"


def commands() -> Iterator[str]:
    """Every command with its arguments and options."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        yield f"### rsauto {name}\n\n{_plain(command.help)}"
        rows = [_option(found) for found in command.params if found.name != "help"]
        yield table(("", ""), rows)


def _option(found: Any) -> tuple[str, str]:
    is_argument = found.param_type_name == "argument"
    words = found.name.upper() if is_argument else ", ".join(found.opts + found.secondary_opts)
    return f"`{words}`", _plain(getattr(found, "help", None))


def settings(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """A table for the settings of a section, then its parts."""
    said = attribute_docs(model)
    parts: list[tuple[str, type[BaseModel]]] = []
    rows = []
    for name, field in model.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            parts.append((f"{prefix}{name}.", field.annotation))
            continue
        default = (
            "required"
            if field.is_required()
            else f"`{_value(field.get_default(call_default_factory=True))}`"
        )
        words = " ".join(filter(None, (said.get(name, ""), _allowed(field.annotation))))
        rows.append((f"`{prefix}{name}`", default, words))
    title = f"### {prefix.rstrip('.') or 'Top level'}"
    doc = _plain(model.__doc__) if prefix else ""
    yield "\n\n".join(filter(None, (title, doc, table(("setting", "default", ""), rows))))
    for inner, part in parts:
        yield from settings(part, inner)


def columns() -> str:
    said = attribute_docs(TrialRecord)
    return table(
        ("column", "type", ""),
        [(f"`{name}`", dtype, said.get(name, "")) for name, dtype in COLUMNS.items()],
    )


def functions() -> Iterator[str]:
    """Everything in ``rsauto.__all__``: how it is called, and what it says of itself."""
    for name in sorted(rsauto.__all__, key=str.lower):
        found = getattr(rsauto, name)
        called = f"rsauto.{name}{_signature(found)}"
        doc = inspect.cleandoc(found.__doc__ or "").replace("``", "`")
        yield f"### rsauto.{name}\n\n```python\n{called}\n```\n\n```text\n{doc}\n```"


def _signature(found: Any) -> str:
    if inspect.isclass(found):
        return ""
    parameters = inspect.signature(found).parameters.values()
    words: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        has_default = parameter.default is not parameter.empty
        words.append(f"{parameter.name}={parameter.default!r}" if has_default else parameter.name)
    return f"({', '.join(words)})"


def attribute_docs(owner: type) -> dict[str, str]:
    """The strings under the fields of a class and of the classes it is made from."""
    found: dict[str, str] = {}
    for one in reversed(owner.__mro__):
        if not one.__module__.startswith("rsauto"):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for field, after in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                if isinstance(after.value, ast.Constant) and isinstance(field.target, ast.Name):
                    found[field.target.id] = _plain(str(after.value.value))
    return found


def table(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headers, tuple("---" for _ in headers), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in lines)


def _cell(text: str) -> str:
    """Text that neither ends a cell nor passes for a tag; code is shown as it is."""
    pieces = text.replace("|", "&#124;").split("`")
    return "`".join(p if n % 2 else p.replace("<", "&lt;") for n, p in enumerate(pieces))


def _allowed(annotation: Any) -> str:
    """The words that a setting may have; nothing where it is not one of a few."""
    words: list[str] = []
    pending = [annotation]
    while pending:
        one = pending.pop(0)
        if get_origin(one) is Literal:
            words += [_value(word) for word in get_args(one)]
        else:
            pending += get_args(one)
    return f"One of {', '.join(f'`{word}`' for word in words)}." if len(words) > 1 else ""


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, BaseModel):
        return "{" + ", ".join(f"{k}: {_value(v)}" for k, v in value.model_dump().items()) + "}"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").strip().replace("``", "`")


if __name__ == "__main__":
    OUT.write_text(reference(), encoding="utf-8")
