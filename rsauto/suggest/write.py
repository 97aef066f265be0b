"""The commented study file, and the way to it: look, decide, check, write."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rsauto.atomic import write_text
from rsauto.errors import BudgetError, InputError
from rsauto.search.setup import Setup, set_up
from rsauto.study_file import validate
from rsauto.suggest.decide import Setting, Suggestion, suggest
from rsauto.suggest.look import Wishes, look
from rsauto.units import bytes_text

LINE_LENGTH = 100


def write_study(wishes: Wishes, path: Path, *, force: bool = False) -> Iterator[str]:
    """Writes a study file that starts as it is; yields lines for the user as they come.

    Raises InputError, nothing written, when `path` exists without `force`, or the model or the data
    cannot be used; BudgetError, the file written, when no rank fits the memory budget.
    """
    _require_writable(path, force)
    suggestion = suggest(look(wishes))
    for word, sentence in suggestion.seen:
        yield f"{word:<12} {_printable(sentence)}"
    text = study_text(suggestion, path)
    try:
        setup = set_up(validate(yaml.safe_load(text), source=str(path)))
    except BudgetError as error:
        _write(path, text)
        raise BudgetError(f"{error}\n{path} is written all the same, to be edited.") from None
    _write(path, text)
    yield f"{'memory':<12} {_largest_rank(setup)}"
    for warning in setup.preflight.warnings:
        yield f"warning: {_printable(warning)}"
    yield f"{'written':<12} {path}"
    yield f"{'next':<12} rsauto study {shlex.quote(str(path))}"


def study_text(suggestion: Suggestion, path: Path) -> str:
    """The study file as YAML, every key with a comment above it."""
    seen = [f"{word}: {sentence}" for word, sentence in suggestion.seen]
    head = [f"Written by rsauto init. To run it: rsauto study {shlex.quote(str(path))}", *seen]
    lines = [line for sentence in head for line in _comment(sentence, "")]
    section = ""
    for setting in suggestion.settings:
        own, _, name = setting.key.rpartition(".")
        if own != section or not own:
            lines += ["", *([f"{own}:"] if own else [])]
            section = own
        indent = "  " if own else ""
        lines += [*_comment(setting.comment, indent), indent + _line(name, setting)]
    return "\n".join(lines) + "\n"


def _line(name: str, setting: Setting) -> str:
    return f"{'' if setting.is_active else '# '}{name}: {_flow(setting.value)}"


def _flow(value: Any) -> str:
    """A value as YAML on one line; text is quoted where it could be read as something else."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float) and float(f"{value:.1e}") == value:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent):+d}"
    if isinstance(value, str) and not (value.isascii() and value.isidentifier()):
        return _yaml(value, default_style='"', allow_unicode=True)
    return _yaml(value)


def _yaml(value: Any, **style: Any) -> str:
    return str(yaml.safe_dump(value, width=10**6, **style)).removesuffix("...\n").strip()


def _comment(sentence: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(
        _printable(sentence),
        LINE_LENGTH,
        initial_indent=start,
        subsequent_indent=start,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _printable(text: str) -> str:
    """Names come from files and command lines: no line break or control code of theirs is kept."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _largest_rank(setup: Setup) -> str:
    prediction = setup.predict(setup.space.middle(setup.space.ranks[-1]))
    assert prediction is not None, "ranks that do not fit are not in the space"
    return (
        f"rank {prediction.rank} is the largest of the search that fits "
        f"{bytes_text(setup.memory_budget_bytes)}: it needs "
        f"{bytes_text(setup.planner.needed_bytes(prediction))} with micro-batches of "
        f"{prediction.micro_batch_size}"
    )


def _require_writable(path: Path, force: bool) -> None:
    if not path.parent.is_dir():
        raise InputError(f"--out: there is no folder {str(path.parent)!r} to write {path.name} to.")
    if path.is_dir():
        raise InputError(f"--out: {str(path)!r} is a folder. Give the name of a file.")
    if path.exists() and not force:
        raise InputError(
            f"--out: {str(path)!r} exists and is left alone. Give another name, or --force to "
            "replace it."
        )


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(f"--out: {str(path)!r} cannot be written: {error.strerror}.") from None
