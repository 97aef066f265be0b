"""What a study file is made of: sections, and the forms in which a choice of values is written."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)


class Part(BaseModel):
    """A section of the study file: unknown keys are errors, values cannot be changed later."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


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
Targets = Literal["all-linear", "attention"] | tuple[str, ...]
IntChoice = Annotated[
    Annotated[PowerRange, Tag("range")] | Annotated[Ints, BeforeValidator(as_tuple), Tag("list")],
    Discriminator(_kind),
]
RateChoice = Annotated[
    Annotated[RateRange, Tag("range")] | Annotated[Rates, BeforeValidator(as_tuple), Tag("list")],
    Discriminator(_kind),
]
