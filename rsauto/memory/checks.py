"""What may be asked of a plan, checked before anything is read or traced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeGuard

from rsauto.errors import InputError
from rsauto.memory.kinds import Targets

LARGEST = 2**20
"""Of ranks, lengths and batches."""

MOST_TOKENS = 2**27
"""At once."""


def is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST


def checked_ranks(ranks: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(ranks, Iterable) or not ranks or not all(map(is_whole, ranks)):
        raise InputError(
            f"ranks: {ranks!r}. Give a list of whole numbers from 1 to {LARGEST}, such as "
            "[8, 64, 256]."
        )
    return tuple(sorted(set(ranks)))


def require_positive(**numbers: object) -> None:
    problems = [
        f"{name}: {number!r} is not a whole number from 1 to {LARGEST}."
        for name, number in numbers.items()
        if not is_whole(number)
    ]
    if problems:
        raise InputError(problems)


def checked_targets(targets: Targets) -> Targets:
    if isinstance(targets, str):
        return targets
    names = tuple(targets)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InputError(
            f"target_modules: {targets!r}. Give all-linear, attention, or names of layers such as "
            "q_proj."
        )
    return names


def require_micro_batch(size: object, batch_size: int) -> None:
    if size != "auto" and (not is_whole(size) or batch_size % size):
        raise InputError(
            f"micro_batch_size: {size!r} does not divide batch_size {batch_size}. Give a divisor "
            "of it, or auto."
        )


def require_init_ratio(ratio: object) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 1 <= ratio <= 16:
        raise InputError(
            f"init_ratio: {ratio!r} is not a number from 1 to 16. Give AdaLoRA's initial rank over "
            "its target, such as 1.5."
        )


def require_device_size(num_sequences: int, max_length: int, eval_length: object) -> None:
    """Beyond this no device reaches, and sizes in bytes would soon not fit a number."""
    longest = max_length
    if eval_length is not None:
        if eval_length != 0 and not is_whole(eval_length):
            raise InputError(
                f"eval_length: {eval_length!r} is not a whole number of tokens from 1 to "
                f"{LARGEST}, nor 0 for no evaluation."
            )
        longest = max(max_length, eval_length)
    if num_sequences * longest > MOST_TOKENS:
        raise InputError(
            f"max_length: {num_sequences} sequences of {longest} tokens at once are more than "
            f"{MOST_TOKENS}, and than any device holds. Give a smaller micro_batch_size or "
            "max_length."
        )
