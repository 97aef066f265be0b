"""The loss every trial is trained and compared on, in one place.

Shapes: logits (batch, length, vocabulary), labels (batch, length) with IGNORED where a token does
not count; position t predicts the token at t + 1. For sequence classification: logits (batch,
classes), labels (batch,), and every sequence counts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""Label of tokens that do not count: prompts and padding."""


def next_token_targets(labels: Tensor) -> Tensor:
    """Labels moved one to the left, (batch, length); the last position predicts nothing.

    Moving the labels, not the logits, avoids a copy of the largest tensor of the step.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def targets_of(labels: Tensor) -> Tensor:
    """What the logits are compared to, in the shape of the labels."""
    return labels if labels.ndim == 1 else next_token_targets(labels)


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over counted targets of -log p(target), in nats, computed in float32. A scalar."""
    return F.cross_entropy(
        logits.float().flatten(0, -2),
        targets_of(labels).flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


def cross_entropy_of_trials(logits: Tensor, labels: Tensor, num_trials: int) -> Tensor:
    """`summed_cross_entropy` of every trial, (K,), whose rows lie side by side in the batch."""
    each = F.cross_entropy(
        logits.float().flatten(0, -2),
        targets_of(labels).flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    return each.view(num_trials, -1).sum(dim=1)


def count_targets(labels: Tensor) -> int:
    """Number of tokens, or sequences, that count in `summed_cross_entropy`."""
    return int((targets_of(labels) != IGNORED).sum())


def count_targets_of_trials(labels: Tensor, num_trials: int) -> list[int]:
    """`count_targets` of every trial, whose rows lie side by side in the batch."""
    counts: list[int] = (targets_of(labels) != IGNORED).view(num_trials, -1).sum(dim=1).tolist()
    return counts


def hits_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(hits, counted), both boolean in the shape of the labels: argmax right, and target counts."""
    targets = targets_of(labels)
    counted = targets != IGNORED
    return (logits.argmax(-1) == targets) & counted, counted


def token_mean(loss_sum: Tensor, num_targets: int | Tensor) -> Tensor:
    """Mean loss per counted target; the whole global batch shares one denominator."""
    return loss_sum / torch.as_tensor(num_targets, device=loss_sum.device)
