"""Study files: YAML in, a checked `StudyConfig` out, and back again.

Every error of a file is reported at once, each with its line, its key, its value and what is
allowed.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rsauto.choices import LARGEST_INT
from rsauto.config import StudyConfig
from rsauto.errors import InputError, nearest

STUDY_FILE = Path(__file__).parent / "embedded" / "study.yaml"
"""The study that runs when none is named."""

MOST_BYTES = 2**17
"""Of a study file. Longer ones are no study files, and take YAML minutes to read."""

MOST_VALUES = 20_000
"""Of a study file, each alias counted with all that it stands for."""

Path_ = tuple[str | int, ...]
"""Where a value stands: keys and positions in lists."""

Places = dict[Path_, str]
"""Where a value was given, such as 'study.yaml:12' or '--set search.trials=3'."""

_WORDS = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text, in quotes where it looks like something else",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": (
        "must be letters, digits, dots, dashes and underscores, the first a letter or digit"
    ),
    "tuple_type": "must be a list",
    "too_short": "must not be empty",
    "model_type": "must be a mapping of keys to values",
    "dict_type": "must be a mapping of keys to values",
    "missing": "is missing",
}
"""pydantic's kinds of errors in the words of a study file."""


def load(
    path: Path | None = None,
    *,
    preset: str | None = None,
    sets: Sequence[str] = (),
    options: Mapping[str, object] = MappingProxyType({}),
) -> StudyConfig:
    """The study of a file, or the embedded one when ``path`` is None.

    ``preset`` applies a named set of changes from the file, or several one after the other, joined
    by commas; then come ``sets``, 'section.key=value' strings, and last ``options``, values of
    settings that have an option of their own on the command line, None where it was not given. A
    study without a name is called after its file. Raises InputError with every problem found.
    """
    path = STUDY_FILE if path is None else path
    raw, places = _read(path)
    raw.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:80] or "study")
    for name in [] if preset is None else map(str.strip, preset.split(",")):
        _merge(raw, _preset(raw, name), places, f"{path}: preset {name}")
    for assignment in sets:
        _merge(raw, _parse_set(assignment), places, f"--set {assignment}")
    for key, value in options.items():
        if value is not None:
            flag = key.rpartition(".")[-1].replace("_", "-")
            _merge(raw, _parse_set(f"{key}={value}"), places, f"--{flag} {value}")
    return validate(raw, source=str(path), places=places)


def validate(
    raw: Mapping[str, Any], *, source: str = "config", places: Places | None = None
) -> StudyConfig:
    """A StudyConfig from plain values. Raises InputError with every problem found."""
    try:
        return StudyConfig.model_validate(raw)
    except ValidationError as error:
        raise InputError(_problems(error, raw, source, places or {})) from None


def dump(config: StudyConfig) -> str:
    """The study as YAML that `load` reads back to an equal one."""
    plain = config.model_dump(mode="json")
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) != plain:  # PyYAML loses rare line breaks, U+0085, unless escaped
        text = yaml.safe_dump(plain, sort_keys=False)
    return text


def _read(path: Path) -> tuple[dict[str, Any], Places]:
    try:
        text = _text(path)
    except FileNotFoundError:
        there = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise InputError(f"{path}: no such study file.{nearest(path.name, there)}") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, not a study file.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not a text file in UTF-8.") from None
    except InputError:
        raise
    except ValueError as error:  # such as a NUL in the path
        raise InputError(f"{str(path)!r}: cannot be read: {error}.") from None
    places: Places = {}
    repeated: list[str] = []
    try:
        # First: what a few aliases of aliases stand for could not be built.
        _find_places(yaml.compose(text, Loader=yaml.SafeLoader), (), str(path), places, repeated)
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or str(error)
        raise InputError(f"{where}: not valid YAML: {reason}.") from None
    except InputError:
        raise
    except ValueError as error:  # such as the date 2024-13-45
        raise InputError(f"{path}: not valid YAML: {error}.") from None
    except RecursionError:
        raise InputError(f"{path}: not valid YAML: it contains itself, or is too deep.") from None
    if raw is None:
        return {}, {}
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a study file is a mapping of keys to values, see the README.")
    if repeated:
        raise InputError(repeated)
    return raw, places


def _text(path: Path) -> str:
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise InputError(f"{path}: is longer than {MOST_BYTES} bytes, so it is no study file.")
    return data.decode("utf-8")


def _find_places(
    node: yaml.Node | None, path: Path_, file: str, places: Places, repeated: list[str]
) -> None:
    """Line of every key, counted from 1; a key given twice would silently lose its first value."""
    if len(places) + len(repeated) > MOST_VALUES:
        raise InputError(f"{file}: has more than {MOST_VALUES} values, so it is no study file.")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value if isinstance(key, yaml.ScalarNode) else "?")
            line = f"{file}:{key.start_mark.line + 1}"
            if here in places:
                repeated.append(f"{line}: {_dotted(here)}: given twice.")
            places[here] = line
            _find_places(value, here, file, places, repeated)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            places[(*path, index)] = f"{file}:{value.start_mark.line + 1}"
            _find_places(value, (*path, index), file, places, repeated)


def _preset(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    presets = raw.get("presets")
    presets = presets if isinstance(presets, dict) else {}
    if name not in presets:
        there = ", ".join(map(str, presets)) or "none"
        raise InputError(
            f"--preset {name}: the study has no such preset.{nearest(name, map(str, presets))} "
            f"It has: {there}."
        )
    chosen = presets[name]
    if not isinstance(chosen, dict):
        raise InputError(f"presets.{name}: must be a mapping, a partial study file.")
    return chosen


def _parse_set(assignment: str) -> dict[str, Any]:
    key, equals, text = assignment.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise InputError(f"--set {assignment}: must look like section.key=value.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    nested: Any = value
    for part in reversed(parts):
        nested = {part: nested}
    return dict(nested)


def _merge(
    into: dict[str, Any],
    changes: Mapping[str, Any],
    places: Places,
    origin: str,
    path: Path_ = (),
) -> None:
    """Applies changes in place: mappings are merged, anything else replaces what was there."""
    for key, value in changes.items():
        here = (*path, str(key))
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value, places, origin, here)
            continue
        for known in [p for p in places if p[: len(here)] == here]:
            del places[known]
        places[here] = origin
        into[key] = copy.deepcopy(value)


def _problems(
    error: ValidationError, raw: Mapping[str, Any], source: str, places: Places
) -> list[str]:
    """One line a faulty key, in the order of the file; what a union allows is joined with 'or'."""
    found: dict[Path_, list[tuple[str, str]]] = defaultdict(list)
    values: dict[Path_, Any] = {}
    for item in error.errors(include_url=False):
        path = _path_in_file(item["loc"], raw)
        found[path].append((item["type"], _reason(item["type"], item["msg"], path)))
        values.setdefault(path, item["input"])
    listed = [
        (_place(path, reasons, source, places), path, reasons)
        for path, reasons in _most_telling(found).items()
    ]
    order = {place: position for position, place in enumerate(places.values())}
    listed.sort(key=lambda entry: order.get(entry[0], len(order)))
    lines = [
        f"{place}: {_dotted(path)}: {_join([text for _, text in reasons])}"
        f"{_got(reasons, values[path])}"
        for place, path, reasons in listed
    ]
    return [line if line.endswith("?") else line + "." for line in lines]


def _most_telling(found: dict[Path_, list[tuple[str, str]]]) -> dict[Path_, list[tuple[str, str]]]:
    """Without what only follows from another error, as the empty rest of a list of bad entries."""
    kept: dict[Path_, list[tuple[str, str]]] = {}
    for path, reasons in found.items():
        deeper = any(len(p) > len(path) and p[: len(path)] == path for p in found)
        if deeper:
            reasons = [r for r in reasons if r[0] not in ("literal_error", "too_short")]
        elif len(reasons) > 1:
            reasons = [r for r in reasons if r[0] != "too_short"]
        if reasons:
            kept[path] = list(dict.fromkeys(reasons))
    return kept


def _path_in_file(loc: Path_, raw: Any) -> Path_:
    """pydantic's location without the names of union members it puts in between."""
    path: list[str | int] = []
    for position, step in enumerate(loc):
        if isinstance(raw, Mapping) and step in raw:
            raw = raw[step]
            path.append(str(step))
        elif isinstance(raw, (list, tuple)) and isinstance(step, int) and step < len(raw):
            raw = raw[step]
            path.append(step)
        elif position == len(loc) - 1 and step in _known_keys(path):
            path.append(step)
    return tuple(path)


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
    if kind in ("extra_forbidden", "invalid_key"):
        known = _known_keys(path[:-1])
        if not path:  # a key such as 1, null or a date
            return f"keys must be text. Allowed here: {', '.join(known)}"
        hint = nearest(str(path[-1]), known)
        return f"unknown key.{hint or ' Allowed here: ' + ', '.join(known)}"
    if kind in _WORDS:
        return _WORDS[kind]
    text = message.removeprefix("Value error, ").rstrip(".")
    text = text.replace("Input should be", "must be")
    return text.replace("greater than or equal to", "at least")


def _join(reasons: Sequence[str]) -> str:
    """'must be a whole number or 'auto'' from the members of a union."""
    first, *others = reasons
    return " or ".join([first, *(other.removeprefix("must be ") for other in others)])


def _got(reasons: Sequence[tuple[str, str]], value: Any) -> str:
    if reasons[0][0] in ("extra_forbidden", "invalid_key", "missing"):
        return ""
    if isinstance(value, (dict, list, tuple, BaseModel)):
        return ""
    if value is None:
        return " (got nothing)"
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        return ""  # Python refuses to write very long ones
    text = repr(value) if isinstance(value, str) else str(value)
    return f" (got {text if len(text) <= 200 else text[:197] + '...'})"


def _place(path: Path_, reasons: Sequence[tuple[str, str]], source: str, places: Places) -> str:
    """Where the faulty value was given; of a section that does not fit together, its first key."""
    if reasons[0][0] == "value_error":
        named = [(*path, word) for word in re.findall(r"\w+", reasons[0][1])]
        path = next((p for p in named if p in places), path)
    for length in range(len(path), 0, -1):
        if path[:length] in places:
            return places[path[:length]]
    return source


def _dotted(path: Path_) -> str:
    return ".".join(str(step) for step in path) or "study"
