"""The loss every trial is trained and compared on, in one place.

Shapes: logits (batch, length, vocabulary), labels (batch, length) with IGNORED where a token does
not count. Position t predicts the token at t + 1.
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


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over counted tokens of -log p(token), in nats, computed in float32. A scalar."""
    targets = next_token_targets(labels)
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def count_targets(labels: Tensor) -> int:
    """Number of tokens that count in `summed_cross_entropy`."""
    return int((next_token_targets(labels) != IGNORED).sum())


def completion_hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(hits, counted), both boolean (batch, length): argmax right, and position counts."""
    targets = next_token_targets(labels)
    counted = targets != IGNORED
    return (logits.argmax(-1) == targets) & counted, counted


def token_mean(loss_sum: Tensor, num_targets: int | Tensor) -> Tensor:
    """Mean loss per counted token; the whole global batch shares one denominator."""
    return loss_sum / torch.as_tensor(num_targets, device=loss_sum.device)
