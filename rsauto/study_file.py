"""Study files: YAML in, a checked `StudyConfig` out, and back again.

Every error of a file is reported at once, each with its line, its key, its value and what is
allowed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rsauto.config import StudyConfig
from rsauto.errors import InputError, nearest

STUDY_FILE = Path(__file__).parent / "embedded" / "study.yaml"
"""The study that runs when none is named."""

Path_ = tuple[str | int, ...]


def load(
    path: Path | None = None, *, preset: str | None = None, sets: Sequence[str] = ()
) -> StudyConfig:
    """The study of a file, or the embedded one when ``path`` is None.

    ``preset`` applies a named set of changes from the file, ``sets`` are 'section.key=value'
    strings applied last. Raises InputError with every problem found.
    """
    path = STUDY_FILE if path is None else path
    raw, lines = _read(path)
    raw.setdefault("name", path.stem)
    if preset is not None:
        _merge(raw, _preset(raw, preset))
    for assignment in sets:
        _merge(raw, _parse_set(assignment))
    return validate(raw, source=str(path), lines=lines)


def validate(
    raw: Mapping[str, Any], *, source: str = "config", lines: Mapping[Path_, int] | None = None
) -> StudyConfig:
    """A StudyConfig from plain values. Raises InputError with every problem found."""
    try:
        return StudyConfig.model_validate(raw)
    except ValidationError as error:
        raise InputError(_problems(error, raw, source, lines or {})) from None


def dump(config: StudyConfig) -> str:
    """The study as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: Path) -> tuple[dict[str, Any], dict[Path_, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        there = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise InputError(f"{path}: no such study file.{nearest(path.name, there)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a study file: {error}.") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or str(error)
        raise InputError(f"{where}: not valid YAML: {reason}.") from None
    if raw is None:
        return {}, {}
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a study file is a mapping of keys to values, see the README.")
    lines: dict[Path_, int] = {}
    repeated: list[str] = []
    _number_lines(node, (), lines, repeated)
    if repeated:
        raise InputError([f"{path}:{line}" for line in repeated])
    return raw, lines


def _number_lines(
    node: yaml.Node | None, path: Path_, lines: dict[Path_, int], repeated: list[str]
) -> None:
    """Line of every key, counted from 1; a key given twice would silently lose its first value."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in lines:
                repeated.append(f"{key.start_mark.line + 1}: {_dotted(here)}: given twice.")
            lines[here] = key.start_mark.line + 1
            _number_lines(value, here, lines, repeated)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, index)] = value.start_mark.line + 1
            _number_lines(value, (*path, index), lines, repeated)


def _preset(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    presets = raw.get("presets")
    presets = presets if isinstance(presets, dict) else {}
    if name not in presets:
        there = ", ".join(presets) or "none"
        raise InputError(f"--preset {name}: the study has no such preset; it has: {there}.")
    chosen = presets[name]
    if not isinstance(chosen, dict):
        raise InputError(f"presets.{name}: must be a mapping, a partial study file.")
    return chosen


def _parse_set(assignment: str) -> dict[str, Any]:
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {assignment}: must look like section.key=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    nested: Any = value
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return dict(nested)


def _merge(into: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            if set(value) & {"low", "high"} or not value:
                into[key] = dict(value)
            else:
                _merge(into[key], value)
        else:
            into[key] = value


def _problems(
    error: ValidationError, raw: Mapping[str, Any], source: str, lines: Mapping[Path_, int]
) -> list[str]:
    """One line a faulty key; the alternatives of a union are joined with 'or'."""
    reasons: dict[Path_, list[str]] = defaultdict(list)
    for item in error.errors(include_url=False):
        path = _path_in_file(item["loc"], raw)
        reason = _reason(item["type"], item["msg"], path)
        if item["type"] not in {"extra_forbidden", "missing"} and not isinstance(
            item["input"], (dict, list, tuple, BaseModel)
        ):
            reason = f"{reason} (got {item['input']!r})"
        if reason not in reasons[path]:
            reasons[path].append(reason)
    return [
        f"{_where(path, source, lines)}: {_dotted(path)}: {_join(found)}."
        for path, found in sorted(reasons.items(), key=lambda entry: lines.get(entry[0], 0))
    ]


def _path_in_file(loc: Path_, raw: Any) -> Path_:
    """pydantic's location without the names of union members it puts in between."""
    path: list[str | int] = []
    for position, step in enumerate(loc):
        inside = isinstance(raw, Mapping) and step in raw
        if inside or (isinstance(raw, (list, tuple)) and isinstance(step, int)):
            raw = raw[step]  # type: ignore[index]
            path.append(step)
        elif isinstance(step, str) and position == len(loc) - 1 and _is_field(step, path):
            path.append(step)
    return tuple(path)


def _is_field(step: str, path: Sequence[str | int]) -> bool:
    return step in _known_keys(path)


def _known_keys(path: Sequence[str | int]) -> list[str]:
    """Keys allowed in the section at ``path``."""
    model: type[BaseModel] = StudyConfig
    for step in path:
        annotation = model.model_fields[step].annotation if step in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ["low", "high"]
        model = annotation
    return list(model.model_fields)


def _reason(kind: str, message: str, path: Path_) -> str:
    if kind == "extra_forbidden":
        known = _known_keys(path[:-1])
        hint = nearest(str(path[-1]), known)
        return f"unknown key.{hint} Allowed here: {', '.join(known)}"
    if kind == "missing":
        return "is missing"
    text = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return text.replace("Input should be", "must be").rstrip(".")


def _join(reasons: Sequence[str]) -> str:
    """'must be an integer, or must be 'auto' (got 3.5)' from the members of a union."""
    ends = {reason.rpartition(" (got ")[2] for reason in reasons}
    if len(reasons) > 1 and len(ends) == 1:
        heads = [reason.rpartition(" (got ")[0] for reason in reasons]
        return f"{', or '.join(heads)} (got {ends.pop()}"
    return "; ".join(reasons)


def _where(path: Path_, source: str, lines: Mapping[Path_, int]) -> str:
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return f"{source}:{lines[path[:length]]}"
    return source


def _dotted(path: Path_) -> str:
    return ".".join(str(step) for step in path) or "study"
