"""Reading data files, with the file and line of whatever is wrong with them.

JSON and CSV are read with the standard library because the `datasets` builders change values:
strings such as "2020-01-01" become datetimes, 1 becomes 1.0 beside 2.5, and in CSV "NA" becomes
null and "007" becomes 7. Parquet carries its types and is read by `datasets`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rsauto.errors import InputError, listed, nearest, shortened

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")

MEMORY_PER_BYTE = 4
"""Memory that a byte of text takes while it becomes rows: itself, decoded, split, as values."""

BLOCK_BYTES = 2**24
"""Of a file, read at once."""

ROWS_PER_LOOK = 2**16
"""Rows after which the free memory is looked at again: of short ones a byte takes far more."""

LEAST_BYTES = 2**28
"""Memory that is left free."""

MOST_COLUMNS = 10_000
"""More are no columns, but data in a form that is read wrongly."""

LONGEST_COLUMN = 200
"""Characters of a column's name; of a longer one the same holds."""

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows as they were read, before any template."""

    source: str
    """Where they came from, for people."""
    columns: tuple[str, ...]
    rows: Any
    """A list of mappings or a `datasets.Dataset`, which stays on disk."""
    features: Any = None
    """What `datasets` knows of the columns of a list that it has read."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> list[Record]:
        """The rows at `indices`; of a `datasets.Dataset` only `columns` are read."""
        if hasattr(self.rows, "select_columns"):
            chosen = self.rows.select_columns(list(columns)).select(list(indices))
            return list(chosen.to_list())
        return [self.rows[index] for index in indices]

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Names of the classes 0, 1, ... in a column of `datasets.ClassLabel`; None in others."""
        features = getattr(self.rows, "features", self.features) or {}
        names = getattr(features.get(column), "names", None)
        return None if names is None else tuple(map(str, names))


def table_of(rows: Sequence[Record], source: str) -> Table:
    """A table of plain mappings; a column that only some rows have counts as a column.

    Raises InputError above MOST_COLUMNS and LONGEST_COLUMN.
    """
    columns = dict.fromkeys(str(key) for row in rows for key in row)
    _require_columns(columns, source)
    return Table(source=source, columns=tuple(columns), rows=rows)


def _require_columns(columns: Collection[str], source: str) -> None:
    if len(columns) > MOST_COLUMNS:
        raise InputError(
            f"{source}: the rows have {len(columns)} columns together; at most {MOST_COLUMNS} are "
            f"read. Give every row the same few keys."
        )
    longest = max(columns, key=len, default="")
    if len(longest) > LONGEST_COLUMN:
        raise InputError(
            f"{source}: a column's name has {len(longest)} characters ({shortened(longest)!r}); at "
            f"most {LONGEST_COLUMN} are read. Rename it, or look whether the file is what it "
            f"should be."
        )


def extension(path: Path) -> str | None:
    """The data extension of a path, such as '.jsonl' or '.csv.gz', or None."""
    name = path.name.lower()
    return max((e for e in EXTENSIONS if name.endswith(e)), key=len, default=None)


def stem(path: Path) -> str:
    """The file name without its data extension."""
    return path.name[: len(path.name) - len(extension(path) or "")]


def missing(field: str, path: Path) -> str:
    """The message for a path that does not exist, with the nearest name in its folder."""
    folder = path.parent
    if not folder.is_dir():
        return f"{field}: {str(path)!r} does not exist, nor does the folder {str(folder)!r}."
    there = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    shown = ", ".join(there[:10]) + (", ..." if len(there) > 10 else "")
    return (
        f"{field}: {str(path)!r} does not exist.{nearest(path.name, there)} "
        f"In that folder: {shown or 'nothing'}."
    )


def read_file(path: Path, field: str = "data.name") -> Table:
    """Read one file.

    Raises InputError when the file is missing, has an unknown extension, cannot be read or
    decoded, is malformed (with the line) or has no rows.
    """
    if not path.exists():
        raise InputError(missing(field, path))
    kind = extension(path)
    if kind is None:
        raise InputError(
            f"{field}: {str(path)!r} is no data file that rsauto reads. It reads "
            f"{', '.join(EXTENSIONS)}. Plain text can be written as JSON lines, "
            f'one {{"text": "..."}} per line.'
        )
    if kind == ".parquet":
        table = _read_parquet(path)
    else:
        readers = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv}
        try:
            text = _decode(_read_bytes(path), path)
            if not text.strip():
                raise InputError(f"{path}: the file is empty.")
            table = table_of(readers[kind.removesuffix(".gz")](text, path), str(path))
        except MemoryError:
            raise _too_large(path) from None
    if not len(table):
        raise InputError(f"{path}: the file has no rows.")
    return table


def _read_bytes(path: Path) -> bytes:
    most = psutil.virtual_memory().available // MEMORY_PER_BYTE
    data = bytearray()
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            # In blocks: a few packed bytes can unfold to any size.
            while len(data) <= most and (block := stream.read(BLOCK_BYTES)):
                data += block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: the gzip data is damaged ({error}).") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if len(data) > most:
        raise _too_large(path)
    return bytes(data)


def _too_large(path: Path) -> InputError:
    return InputError(
        f"{path}: its rows do not fit into the memory that is free here. Write fewer of them to a "
        f"file of their own."
    )


def _require_memory(path: Path, num_rows: int) -> None:
    """Raises InputError where so many short rows have used up the machine's memory."""
    if num_rows % ROWS_PER_LOOK == 0 and psutil.virtual_memory().available < LEAST_BYTES:
        raise _too_large(path)


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        guess = "It looks like UTF-16." if wide else "It may be Latin-1 or Windows-1252."
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: not valid UTF-8. {guess} Save it as UTF-8."
        ) from error


def _parse(text: str, path: Path, first_line: int) -> Any:
    """One JSON value; `first_line` is the line of the file that `text` starts on."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(
            f"{path}, line {line}: not valid JSON: {error.msg} (column {error.colno})."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {first_line}: not usable as JSON: {error}.") from error


def _read_json_lines(text: str, path: Path) -> list[Record]:
    rows: list[Record] = []
    # Not splitlines: it also breaks at characters that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        value = _parse(line, path, number)
        if not isinstance(value, dict):
            raise InputError(
                f"{path}, line {number}: a row must be an object such as "
                f'{{"prompt": "...", "completion": "..."}}, but this is a {type(value).__name__}.'
            )
        rows.append(value)
        _require_memory(path, len(rows))
    return rows


def _read_json(text: str, path: Path) -> list[Record]:
    """A list of objects, an object that holds one such list, or JSON lines under another name."""
    try:
        value = _parse(text, path, 1)
    except InputError as error:
        first = text.lstrip().split("\n", 1)[0]
        if _is_object(first):
            return _read_json_lines(text, path)
        raise error
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        if len(lists) != 1:
            raise InputError(
                f"{path}: holds one object with the keys {listed(value)}, but "
                f"a list of rows is needed, one file per split. pandas writes it with "
                f'to_json(orient="records").'
            )
        value = lists[0]
    if not isinstance(value, list):
        raise InputError(
            f"{path}: holds one {type(value).__name__}, but a list of rows is needed, such as "
            f'[{{"prompt": "...", "completion": "..."}}].'
        )
    bad = next((i for i, row in enumerate(value, 1) if not isinstance(row, dict)), None)
    if bad is not None:
        raise InputError(f"{path}: row {bad} is a {type(value[bad - 1]).__name__}, not an object.")
    return list(value)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_csv(text: str, path: Path) -> list[Record]:
    """Comma-separated with a header; every value stays text, an empty field is empty text."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Record] = []
    try:
        header = next(line for line in reader if line)
        _check_header(header, path)
        for values in filter(None, reader):
            if len(values) != len(header):
                raise InputError(
                    f"{path}, line {reader.line_num}: {len(values)} fields, but the header has "
                    f"{len(header)}. Put fields that contain commas in double quotes."
                )
            rows.append(dict(zip(header, values, strict=True)))
            _require_memory(path, len(rows))
    except csv.Error as error:
        raise InputError(
            f"{path}, line {reader.line_num}: not valid CSV: {error}. Long or multi-line text "
            f"is safer as JSON lines."
        ) from error
    return rows


def _check_header(header: list[str], path: Path) -> None:
    twice = sorted(name for name, times in Counter(header).items() if times > 1)
    if twice:
        raise InputError(f"{path}: the header names {listed(twice)} twice.")
    separator = next((s for s in "\t;|" if s in header[0]), None)
    if len(header) == 1 and separator is not None:
        raise InputError(
            f"{path}: fields seem to be separated by {separator!r}. Separate them by commas."
        )


def _read_parquet(path: Path) -> Table:
    from datasets import load_dataset  # type: ignore[import-untyped, unused-ignore]

    try:
        # Streaming reads the file itself; otherwise a copy is kept, and found again by its mtime.
        stream = load_dataset(
            "parquet", data_files={"train": [str(path)]}, split="train", streaming=True
        )
        rows: Iterable[Record] = list(stream)
        columns = tuple(stream.column_names or ())
    except Exception as error:
        # pyarrow, fsspec and datasets each raise their own kinds for a file that is not Parquet.
        raise InputError(f"{path}: cannot be read as Parquet: {error}.") from error
    _require_columns(columns, str(path))
    return Table(source=str(path), columns=columns, rows=rows, features=stream.features)
