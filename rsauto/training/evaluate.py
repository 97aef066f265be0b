"""How good a model is on the validation rows: loss, perplexity, exact match."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from rsauto.data import Example, collate, evaluation_batches
from rsauto.memory.measure import PeakMeter
from rsauto.training.loss import completion_hits, summed_cross_entropy

METRICS = ("perplexity", "token_accuracy", "exact_match")
"""What every evaluation reports beside eval_loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    eval_loss: float
    """Mean over all counted tokens of the split, in nats."""
    metrics: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    meter: PeakMeter | None = None,
) -> Evaluation:
    """Loss and metrics over ``examples``.

    exact_match is the share of rows whose every counted token is the most likely one given the
    true tokens before it. That is exactly when greedy decoding reproduces the completion, its
    end included: the first wrong token would change both.
    """
    was_training = model.training
    model.eval()
    loss_sum, num_hits, num_targets, num_exact = 0.0, 0, 0, 0
    for index, batch_examples in enumerate(evaluation_batches(examples, batch_size)):
        # The longest rows come first, so the first batch is the one that needs most memory.
        with watching(meter, index == 0):
            batch = collate(batch_examples, pad_token_id).to(device)
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            loss_sum += float(summed_cross_entropy(logits, batch.labels))
            hits, counted = completion_hits(logits, batch.labels)
        num_hits += int(hits.sum())
        num_targets += int(counted.sum())
        num_exact += int((hits == counted).all(dim=1).sum())
        del logits, hits, counted
    model.train(was_training)
    return _summary(loss_sum / num_targets, num_hits / num_targets, num_exact / len(examples))


def watching(meter: PeakMeter | None, heavy: bool) -> AbstractContextManager[None]:
    """The meter's window around a heavy step, or none."""
    return nullcontext() if meter is None else meter.watch(heavy)


def _summary(eval_loss: float, token_accuracy: float, exact_match: float) -> Evaluation:
    perplexity = math.exp(eval_loss) if eval_loss < 700 else math.inf
    return Evaluation(
        eval_loss=eval_loss,
        metrics={
            "perplexity": perplexity,
            "token_accuracy": token_accuracy,
            "exact_match": exact_match,
        },
    )
