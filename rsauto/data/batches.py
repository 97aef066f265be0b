"""From examples to tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rsauto.data.encoding import Example
from rsauto.training.loss import IGNORED


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A micro-batch of b sequences, padded on the right to the longest, t tokens. All int64."""

    input_ids: Tensor
    """(b, t)"""
    attention_mask: Tensor
    """(b, t), 1 for tokens and 0 for padding."""
    labels: Tensor
    """(b, t), the input ids, IGNORED for prompts and padding; the loss shifts them, not this. Or,
    for classification, (b,), the classes."""
    token_type_ids: Tensor | None = None
    """(b, t), 0 for the first text and padding, 1 for the second; None where it is not told."""

    def to(self, device: torch.device | str) -> Batch:
        types = self.token_type_ids
        return Batch(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
            token_type_ids=None if types is None else types.to(device),
        )

    def rows(self, indices: Tensor) -> Batch:
        """Some of the sequences, in another order or several times."""
        types = self.token_type_ids
        return Batch(
            input_ids=self.input_ids[indices],
            attention_mask=self.attention_mask[indices],
            labels=self.labels[indices],
            token_type_ids=None if types is None else types[indices],
        )

    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        named = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.token_type_ids is not None:
            named["token_type_ids"] = self.token_type_ids
        return named


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Tensors of a micro-batch, on the CPU. Raises ValueError without examples."""
    if not examples:
        raise ValueError("collate needs at least one example")
    length = max(len(example.input_ids) for example in examples)

    def padded(rows: Iterable[Sequence[int]], filling: int) -> Tensor:
        """(b, t), made at once: a tensor of each row would cost more than the copying."""
        return torch.tensor([[*row, *[filling] * (length - len(row))] for row in rows])

    if examples[0].label is not None:
        labels = torch.tensor([example.label for example in examples])
    else:
        labels = padded(map(_labels, examples), IGNORED)
    types = [example.token_type_ids for example in examples]
    return Batch(
        input_ids=padded((example.input_ids for example in examples), pad_token_id),
        attention_mask=padded(([1] * len(example.input_ids) for example in examples), 0),
        labels=labels,
        token_type_ids=None if types[0] is None else padded((t or () for t in types), 0),
    )


def _labels(example: Example) -> list[int]:
    """The tokens that the loss of language modelling counts, IGNORED in the place of others."""
    if example.mask is not None:
        flags: Sequence[object] = example.mask
        return [i if c else IGNORED for i, c in zip(example.input_ids, flags, strict=True)]
    num_prompt = min(example.num_prompt_tokens, len(example.input_ids))
    return [IGNORED] * num_prompt + list(example.input_ids[num_prompt:])


def padded_tokens(examples: Sequence[Example]) -> int:
    """Tokens of the micro-batch with its padding, b t: what its activations are proportional to."""
    return len(examples) * max((len(example.input_ids) for example in examples), default=0)


def evaluation_batches(examples: Sequence[Example], batch_size: int) -> list[tuple[Example, ...]]:
    """All examples once, longest first, `batch_size` at a time.

    Neighbours of like length need little padding, and the first batch is the heaviest: what fits
    there fits everywhere.

    Raises ValueError when batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but got {batch_size=}")
    # sorted is stable, so equal lengths keep their order and the batches are the same everywhere.
    longest_first = sorted(examples, key=lambda example: -len(example.input_ids))
    return [
        tuple(longest_first[start : start + batch_size])
        for start in range(0, len(longest_first), batch_size)
    ]
