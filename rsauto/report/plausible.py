"""What the values of a record can be at all: a table, a logarithm or a file takes no others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rsauto.choices import LARGEST_INT

_AT_LEAST_ONE = frozenset({"rank", "alpha", "batch_size", "micro_batch_size", "max_length",
                           "init_rank", "target_rank", "pack_size"})  # fmt: skip
_MAY_BE_NEGATIVE = frozenset({"eval_loss", "scaling_exponent", "gamma_r", "init_scale"})
_LARGEST = 1e100
"""Of numbers but perplexity, which is an exponential: squared and summed they are still finite."""


def implausible(record: Any, place: str = "") -> Iterator[str]:
    """What no trial can have written, each with its place, of a record as nested plain values."""
    for name, value in record.items():
        yield from _wrong(value, f"{place}{name}", str(name), is_field=not place)


def _wrong(value: Any, place: str, name: str, *, is_field: bool) -> Iterator[str]:
    if isinstance(value, dict):
        yield from _wrong_text(" ".join(map(str, value)), place)
        yield from implausible(value, f"{place}.")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _wrong(item, f"{place}.{index}", name, is_field=False)
    elif isinstance(value, str):
        yield from _wrong_text(value, place)
    elif isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > LARGEST_INT:
            yield f"{place} has more than 18 digits"
        elif is_field:
            yield from _too_small(value, name)
    elif isinstance(value, float):
        if math.isfinite(value) and abs(value) > _LARGEST and name != "perplexity":
            yield f"{place} is {value:g}, too large to be calculated with"
        elif is_field:
            yield from _too_small(value, name)


def _wrong_text(text: str, place: str) -> Iterator[str]:
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        yield f"{place} has characters that are no text: {text[:60]!a}"


def _too_small(value: float, name: str) -> Iterator[str]:
    if name == "learning_rate" and not (value > 0 and math.isfinite(value)):
        yield f"learning_rate is {value}: must be a number above 0"
    elif name in _AT_LEAST_ONE and value < 1:
        yield f"{name} is {value}: must be at least 1"
    elif value < 0 and name not in _MAY_BE_NEGATIVE:
        yield f"{name} is {value}: must not be negative"
