"""What is asked of an export, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rsauto.errors import InputError, nearest
from rsauto.report.choice import Choice

Target = Literal[
    "lora", "adalora", "merged", "axolotl", "llamafactory", "trl", "peft", "card"
]  # fmt: skip
TARGETS: tuple[Target, ...] = get_args(Target)
WEIGHTS: tuple[Target, ...] = ("lora", "adalora", "merged")
"""Targets that are made of trained weights; the others are settings, and the card."""

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One export."""

    folder: Path
    """The study's."""
    to: Target
    choice: Choice
    out: Path | None = None
    padded: bool = False
    """Every module at the largest rank, filled up with zeros."""
    dtype: Dtype | None = None
    """Of the weights in the files; None leaves them as they are."""
    force: bool = False
    """Replace an earlier export."""

    @property
    def place(self) -> Path:
        """The folder to write."""
        return self.out or self.folder / "exports" / f"{self.choice.name}-{self.to}"


def checked_request(
    folder: Path,
    to: str,
    choice: Choice,
    *,
    out: Path | None = None,
    padded: bool = False,
    dtype: str | None = None,
    force: bool = False,
) -> Request:
    """The request, every problem of it told at once. Raises InputError."""
    problems = []
    target = next((name for name in TARGETS if name == to), None)
    if target is None:
        problems.append(f"--to {to}: there is no such target.{nearest(to, TARGETS)} "
                        f"Choose one of {', '.join(TARGETS)}.")  # fmt: skip
    known_dtype = next((name for name in DTYPES if name == dtype), None)
    if dtype is not None and known_dtype is None:
        problems.append(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}, or leave it out.")
    if padded and target not in (None, "lora"):
        problems.append(f"--padded is for --to lora: {to} has no ranks to fill up. Leave it out.")
    if dtype is not None and target is not None and target not in WEIGHTS:
        problems.append(f"--dtype is of weights, and --to {to} writes none. Leave it out.")
    if problems or target is None:
        raise InputError(problems)
    return Request(
        folder=folder, to=target, choice=choice, out=out, padded=padded, dtype=known_dtype,
        force=force,
    )  # fmt: skip
