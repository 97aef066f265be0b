"""What a study file is made of: sections, sizes, and the forms in which a choice is written."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

_UNITS = {
    "": 1, "B": 1,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip


def parse_bytes(value: Any) -> Any:
    """Bytes from '24GiB', '500 MB' or a plain number; 'auto' passes through.

    GiB, MiB, KiB are powers of 1024; GB, MB, KB powers of 1000. Raises ValueError otherwise.
    """
    if value == "auto":
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError("give a size such as 24GiB, 512MiB or a number of bytes, or auto")
    num_bytes = float(match[1]) * _UNITS[match[2].upper()]
    if num_bytes < 1:
        raise ValueError("must be more than zero bytes")
    if num_bytes > 2**60:
        raise ValueError("must be at most 2^60 bytes")
    return int(num_bytes)


LARGEST_INT = 2**63 - 1
"""That tables, databases and tensors can hold."""


class Part(BaseModel):
    """A section of the study file: unknown keys are errors, values cannot be changed later."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _can_be_held(cls, value: Any) -> Any:
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int) and abs(item) > LARGEST_INT:
                raise ValueError("must be a number of at most 18 digits")
            if isinstance(item, str) and "\0" in item:
                raise ValueError("must be text without a NUL character")
        return value


class PowerRange(Part):
    """Powers of two from low to high, both included, searched as an integer log2."""

    low: int = Field(ge=1)
    high: int = Field(ge=1)

    @model_validator(mode="after")
    def _powers(self) -> Self:
        for name in ("low", "high"):
            value = getattr(self, name)
            if value & (value - 1):
                raise ValueError(f"{name} must be a power of two, or give a list instead")
        if self.low > self.high:
            raise ValueError("low must not be above high")
        return self

    def values(self) -> tuple[int, ...]:
        return tuple(2**k for k in range(self.low.bit_length() - 1, self.high.bit_length()))


class RateRange(Part):
    """Learning rates from low to high at `reference_rank`, searched on a log scale."""

    low: float = Field(gt=0)
    high: float = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError("low must not be above high")
        return self


def as_tuple(value: Any) -> Any:
    """A single number or word stands for a list of one."""
    return (value,) if isinstance(value, (int, float, str)) else value


def _kind(value: Any) -> str:
    """Which form of a choice was meant, so that only its own errors are shown."""
    return "range" if isinstance(value, (dict, Part)) else "list"


Ints = Annotated[tuple[Annotated[int, Field(ge=1, le=2**20)], ...], Field(min_length=1)]
Rates = Annotated[tuple[Annotated[float, Field(gt=0, le=1e6)], ...], Field(min_length=1)]
Powers = Annotated[tuple[Annotated[float, Field(ge=-4, le=4)], ...], Field(min_length=1)]
Targets = Literal["all-linear", "attention"] | tuple[str, ...]
IntChoice = Annotated[
    Annotated[PowerRange, Tag("range")] | Annotated[Ints, BeforeValidator(as_tuple), Tag("list")],
    Discriminator(_kind),
]
RateChoice = Annotated[
    Annotated[RateRange, Tag("range")] | Annotated[Rates, BeforeValidator(as_tuple), Tag("list")],
    Discriminator(_kind),
]
