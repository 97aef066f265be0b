"""The test split, which nothing was ever chosen on: read once, when an adapter is finished.

A split is one by its name, see `is_test`; of several the first is taken. One that cannot be used,
such as those of GLUE, whose labels are kept back, is left out, with the reason.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rsauto.config import DataConfig
from rsauto.data.encoding import Example
from rsauto.data.load import Splits, chosen_splits, is_test, rows_at, split_loaders
from rsauto.data.rows import Row
from rsauto.data.tokens import tokenise_rows
from rsauto.errors import InputError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rsauto.data.files import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Rows to evaluate a finished adapter on, or why there are none."""

    examples: tuple[Example, ...] = ()
    source: str = ""
    """Where they are from, or why there are none, as a line for people."""


def held_out(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, has_token_types: bool
) -> HeldOut:
    """The test rows of a study's data, tokenised as its other rows are.

    Raises InputError where the study's own rows can no longer be read.
    """
    loaders = split_loaders(config)
    name = next((name for name in loaders if is_test(name)), None)
    if name is None:
        return HeldOut(source="none in the data, so the validation rows are all there is")
    splits = chosen_splits(loaders, config)
    try:
        table = loaders[name]()
        rows = _rows(table, splits)
        examples, fit = tokenise_rows(rows, name, splits, config, tokenizer)
    except InputError as error:
        return HeldOut(source=f"{name!r} cannot be used: {error.problems[0]}")
    if not has_token_types:
        examples = tuple(dataclasses.replace(one, token_type_ids=None) for one in examples)
    dropped = f", {fit.num_dropped} of them too long to keep a counted token" * bool(
        fit.num_dropped
    )
    return HeldOut(examples=examples, source=f"{table.source}, {len(rows)} rows{dropped}")


def _rows(table: Table, splits: Splits) -> tuple[Row, ...]:
    """Every row as text. Raises InputError where they are not like the training rows."""
    absent = [column for column in splits.format.columns if column not in table.columns]
    if absent:
        raise InputError(f"{table.source}: has no column {listed(absent)}.")
    rows = rows_at(table, range(len(table)), splits.format)
    if not rows:
        raise InputError(f"{table.source}: there are no rows.")
    known = splits.label_names
    unknown = sorted({str(row.label) for row in rows} - set(known)) if known is not None else []
    if unknown:
        raise InputError(
            f"{table.source}: has classes that were not trained: {', '.join(unknown[:10])}."
        )
    return rows
