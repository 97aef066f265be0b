"""Rows for training and validation, from wherever they are. The test split is never read here.

Validation rows come from, in this order: `validation_file`; `validation_split`; a split called
validation, valid, val or dev; a tenth of the training rows (at most `validation_rows`), chosen with
`split_seed` and taken out of training; of labelled text as many of each class as its share.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rsauto.config import DataConfig
from rsauto.data.files import EXTENSIONS, Table, extension, missing, read_file, stem, table_of
from rsauto.data.formats import AnyFormat, resolve_format
from rsauto.data.hub import load_hub
from rsauto.data.labels import LabelFormat, class_names
from rsauto.data.order import shuffled, stratified
from rsauto.data.rows import Row
from rsauto.errors import InputError, listed, nearest

HELD_BACK_ONE_IN = 10
"""At most this share of training rows is held back where there is no validation split."""

_VALIDATION_WORDS = frozenset({"validation", "valid", "val", "dev"})
_TEST_WORDS = frozenset({"test", "tests", "testing"})
_SHARD = re.compile(r"-\d+-of-\d+$")

Loaders = dict[str, Callable[[], Table]]
"""Split name -> reads it; only the splits that are used are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """The rows of a study, as text."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    format: AnyFormat
    train_source: str
    validation_source: str
    unused_columns: tuple[str, ...]
    """Columns of the training rows that the format does not read."""
    test_name: str | None
    """The test split that was seen and left alone."""
    label_names: tuple[str, ...] | None = None
    """Names of the classes by their index; None for language modelling."""


def load_rows(config: DataConfig) -> Splits:
    """Read what `config` names: 'embedded', a file, a folder of split files, or a hub dataset.

    A folder's splits are its files by name: train.jsonl, dev.csv, train-00000-of-00002.parquet.

    Raises InputError when something is missing, unreadable, ambiguous or only a test split.
    """
    _refuse_contradictions(config)
    return chosen_splits(split_loaders(config), config)


def chosen_splits(loaders: Loaders, config: DataConfig) -> Splits:
    """The rows of what `split_loaders` found. Raises InputError as `load_rows` does."""
    test_name = next((name for name in loaders if is_test(name)), None)
    train_name = _train_name(loaders, config)
    validation_name = _validation_name(loaders, config)
    if validation_name == train_name:
        raise InputError(f"data: {train_name!r} cannot be both train_split and validation_split.")
    train = loaders[train_name]()
    if config.validation_file is not None:
        path = Path(config.validation_file).expanduser()
        validation: Table | None = read_file(path, "data.validation_file")
    else:
        validation = None if validation_name is None else loaders[validation_name]()
    return _choose(train, validation, config, test_name)


def splits_from_objects(train: Any, validation: Any | None, config: DataConfig) -> Splits:
    """The same from Python: each a `datasets.Dataset` or a sequence of mappings.

    Raises InputError as `load_rows` does, and when an object is of another kind.
    """
    return _choose(
        _table_from_object(train, "train"),
        None if validation is None else _table_from_object(validation, "validation"),
        config,
        None,
    )


def is_test(name: str) -> bool:
    """Whether a split or file name says test: its first or last word does."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word]
    return bool(words) and not _TEST_WORDS.isdisjoint((words[0], words[-1]))


def _refuse_contradictions(config: DataConfig) -> None:
    problems = []
    if config.validation_file is not None:
        validation = Path(config.validation_file).expanduser()
        if extension(validation) and (
            is_test(stem(validation)) or validation.parent.name.lower() in _TEST_WORDS
        ):
            problems.append(_test_refused("data.validation_file", config.validation_file))
        if validation.resolve() == Path(config.name).expanduser().resolve():
            problems.append(f"data.validation_file: {config.validation_file!r} is data.name too.")
    local = config.name == "embedded" or Path(config.name).expanduser().exists()
    for field in ("subset", "revision"):
        if local and getattr(config, field) is not None:
            problems.append(
                f"data.{field}: {getattr(config, field)!r} has no effect, because {config.name!r} "
                f"is not on the hub. Remove it."
            )
    if problems:
        raise InputError(problems)


def _test_refused(field: str, name: str) -> str:
    return (
        f"{field}: {name!r} is a test split by its name, and rsauto neither trains nor chooses on "
        f"one. Name training data, or rename it if it is none."
    )


def split_loaders(config: DataConfig) -> Loaders:
    if config.name == "embedded":
        return {name: partial(_embedded, name) for name in ("train", "validation", "test")}
    path = Path(config.name).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.exists():
        if extension(path) and is_test(stem(path)):
            raise InputError(_test_refused("data.name", config.name))
        return {"train": partial(read_file, path)}
    if _means_a_path(config.name, path):
        raise InputError(missing("data.name", path))
    tables = load_hub(config.name, config.subset, config.revision)
    return {name: partial(_same, table) for name, table in tables.items()}


def _same(table: Table) -> Table:
    return table


def _embedded(split: Any) -> Table:
    from rsauto.embedded.task import load_split

    return table_of(load_split(split), f"embedded task, {split}")


def _means_a_path(name: str, path: Path) -> bool:
    """Whether a name that does not exist was meant as a path, and not as a hub id."""
    if extension(path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        return True
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return "/" in name and bool(nearest(path.name, siblings))


def _folder(folder: Path) -> Loaders:
    """Data files directly in `folder`, by split name; shards of one split belong together."""
    paths: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and extension(path) and not path.name.startswith("."):
            paths.setdefault(_SHARD.sub("", stem(path)), []).append(path)
    if not paths:
        raise InputError(
            f"data.name: the folder {str(folder)!r} has no data file. rsauto reads "
            f"{', '.join(EXTENSIONS)} with names such as train.jsonl and validation.jsonl."
        )
    for name, files in paths.items():
        if len(files) > 1 and any(stem(path) == name for path in files):
            names = " and ".join(path.name for path in files)
            raise InputError(f"data.name: {names} in {str(folder)!r} are the same split. Keep one.")
    return {name: partial(_read_shards, files) for name, files in paths.items()}


def _read_shards(files: Sequence[Path]) -> Table:
    tables = [read_file(path) for path in files]
    if len(tables) == 1:
        return tables[0]
    rows = [row for table in tables for row in table.rows]
    joined = table_of(rows, f"{tables[0].source} and {len(tables) - 1} more")
    return dataclasses.replace(joined, features=tables[0].features)


def _train_name(loaders: Loaders, config: DataConfig) -> str:
    """The training split: by name or, for 'train', the only one whose name begins with it."""
    wanted = config.train_split
    usable = [name for name in loaders if not is_test(name)]
    if wanted in usable:
        return wanted
    alike = [name for name in usable if _first_word(name) == "train"]
    if wanted == "train" and len(alike) == 1:
        return alike[0]
    if not usable:
        raise InputError(_test_refused("data.name", f"{config.name}: {', '.join(loaders)}"))
    raise InputError(_no_split("data.train_split", wanted, usable, config.name))


def _validation_name(loaders: Loaders, config: DataConfig) -> str | None:
    if config.validation_file is not None:
        return None
    usable = [name for name in loaders if not is_test(name)]
    wanted = config.validation_split
    if wanted is not None:
        if wanted not in usable:
            raise InputError(_no_split("data.validation_split", wanted, usable, config.name))
        return wanted
    found = [name for name in usable if _first_word(name) in _VALIDATION_WORDS]
    if len(found) > 1:
        raise InputError(
            f"data.validation_split: {config.name} has more than one validation split: "
            f"{', '.join(found)}. Name the one to use."
        )
    return found[0] if found else None


def _first_word(name: str) -> str:
    return re.split(r"[^a-z]+", name.lower(), maxsplit=1)[0]


def _no_split(field: str, wanted: str, usable: Sequence[str], name: str) -> str:
    sliced = " Slices are not supported; max_train_rows takes fewer rows." if "[" in wanted else ""
    return (
        f"{field}: {name} has no split {wanted!r}.{nearest(wanted, usable)} "
        f"There are {', '.join(usable)}.{sliced}"
    )


def _table_from_object(value: Any, name: str) -> Table:
    split = str(getattr(value, "split", None) or "")
    if is_test(split):
        raise InputError(_test_refused(name, split))
    if hasattr(value, "select_columns") and hasattr(value, "to_list"):
        table = Table(source=f"{name} rows", columns=tuple(value.column_names), rows=value)
    elif isinstance(value, Sequence) and all(isinstance(row, Mapping) for row in value):
        table = table_of(value, f"{name} rows")
    else:
        raise InputError(
            f"{name}: a {type(value).__name__} was given, but a datasets.Dataset (one split) or "
            f'a list of dicts is needed. Of a pandas table, to_dict("records") makes one.'
        )
    return table


def _choose(
    train: Table, validation: Table | None, config: DataConfig, test_name: str | None
) -> Splits:
    """Sample both splits and turn them into text."""
    for table in (train, validation):
        if table is not None and not len(table):
            raise InputError(f"{table.source}: there are no rows.")
    form = resolve_format(config, train)
    if validation is None:
        return _hold_back(train, form, config, test_name)
    absent = [column for column in form.columns if column not in validation.columns]
    if absent:
        raise InputError(
            f"{validation.source}: has no column {listed(absent)}, which {form} "
            f"needs. The columns are {listed(validation.columns)}."
        )
    _require_same_names(form, validation)
    order = shuffled(len(validation), random.Random(config.split_seed))
    train_order = shuffled(len(train), random.Random(config.split_seed))
    validation_rows = rows_at(validation, order[: config.validation_rows], form)
    train_rows = rows_at(train, train_order[: config.max_train_rows], form)
    return Splits(
        train=train_rows,
        validation=validation_rows,
        format=form,
        train_source=_source(train, len(train_rows)),
        validation_source=_source(validation, len(validation_rows)),
        unused_columns=_unused(train, form),
        test_name=test_name,
        label_names=_label_names(train_rows, validation_rows, form, train.source),
    )


def _require_same_names(form: AnyFormat, validation: Table) -> None:
    """Raises InputError where both tables name the classes, and otherwise."""
    if not isinstance(form, LabelFormat):
        return
    names = validation.class_names(form.label)
    if names not in (None, form.names):
        raise InputError(
            f"data.label: the classes of column {form.label!r} are named {_shown(names)} in "
            f"validation, but {_shown(form.names)} in training. Give both the same names in the "
            f"same order."
        )


def _shown(names: Sequence[str] | None) -> str:
    return ", ".join(map(repr, names)) if names else "not at all"


def _label_names(
    train: Sequence[Row], validation: Sequence[Row], form: AnyFormat, source: str
) -> tuple[str, ...] | None:
    return class_names(train, validation, form, source) if isinstance(form, LabelFormat) else None


def _hold_back(train: Table, form: AnyFormat, config: DataConfig, test_name: str | None) -> Splits:
    """Make a validation split out of training rows; no training row is equal to one of it."""
    size = min(config.validation_rows, len(train) // HELD_BACK_ONE_IN)
    if size < 1:
        raise InputError(
            f"{train.source}: {len(train)} rows are too few to hold a tenth back for validation. "
            f"Give data.validation_file or data.validation_split."
        )
    order = shuffled(len(train), random.Random(config.split_seed))
    if isinstance(form, LabelFormat):
        labels = train.take(range(len(train)), [form.label])
        order = stratified(order, [str(record.get(form.label)) for record in labels])
    stop = None if config.max_train_rows is None else size + config.max_train_rows
    held = rows_at(train, order[:size], form)
    others = rows_at(train, order[size:stop], form)
    known = {row.content for row in held}
    kept = tuple(row for row in others if row.content not in known)
    if not kept:
        raise InputError(
            f"{train.source}: the rows repeat each other, and none is left to train on after "
            f"holding {size} back. Give data.validation_file or data.validation_split."
        )
    equal = len(others) - len(kept)
    without = f" ({equal} equal to held back rows left out)" if equal else ""
    return Splits(
        train=kept,
        validation=held,
        format=form,
        train_source=_source(train, len(kept)) + without,
        validation_source=(
            f"{size} rows held back from {train.source} with split_seed {config.split_seed}"
        ),
        unused_columns=_unused(train, form),
        test_name=test_name,
        label_names=_label_names(kept, held, form, train.source),
    )


def rows_at(table: Table, indices: Sequence[int], form: AnyFormat) -> tuple[Row, ...]:
    """The rows at `indices` as text, in the table's order."""
    chosen = sorted(indices)
    numbered = zip((i + 1 for i in chosen), table.take(chosen, form.columns), strict=True)
    return form.render(numbered, table.source)


def _unused(table: Table, form: AnyFormat) -> tuple[str, ...]:
    return tuple(column for column in table.columns if column not in form.columns)


def _source(table: Table, num_used: int) -> str:
    if num_used == len(table):
        return f"{table.source}, all {num_used} rows"
    return f"{table.source}, {num_used} of {len(table)} rows"
