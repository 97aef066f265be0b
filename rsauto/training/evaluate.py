"""How good a model is on rows it was not trained on: the loss, and the metrics of its task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from rsauto.config import TaskType
from rsauto.data import Batch, Example, collate, evaluation_batches
from rsauto.memory.measure import PeakMeter
from rsauto.training.loss import hits_of, summed_cross_entropy
from rsauto.training.spread import ALONE, Spread

METRICS: dict[TaskType, tuple[str, ...]] = {
    "CAUSAL_LM": ("perplexity", "token_accuracy", "exact_match"),
    "SEQ_CLS": ("accuracy", "f1", "matthews"),
}
"""What every evaluation reports beside eval_loss."""

FORGETTING_METRICS = ("general_loss", "forgetting")
"""The loss on a text that is not trained on, and its rise over the untouched model's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    eval_loss: float
    """Mean over all counted tokens (or sequences) of the split, in nats."""
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
    spread: Spread = ALONE,
) -> Evaluation:
    """Loss and metrics over ``examples``, which are all of one task, shared out over ``spread``."""
    was_training = model.training
    model.eval()
    batches = _batches_of(examples, batch_size, spread)

    def own() -> Tally:
        tally = _tally_for(examples)
        for index, (batch_examples, counts) in enumerate(batches):
            # The longest rows come first, so the first batch is the one that needs most memory.
            with watching(meter, index == 0):
                batch = collate(batch_examples, pad_token_id).to(device)
                logits = model(**batch.inputs()).logits
                if counts:
                    tally.add(logits, batch.labels)
        return tally

    tally, *others = spread.together(own, in_step=True)
    for other in others:
        tally.merge(other)
    model.train(was_training)
    return tally.evaluation()


def _batches_of(
    examples: Sequence[Example], batch_size: int, spread: Spread
) -> list[tuple[Sequence[Example], bool]]:
    """This process's share, and whether it counts.

    Where every pass gathers weights from all processes, those that have fewer make blank ones.
    """
    longest_first = [row for rows in evaluation_batches(examples, 1) for row in rows]
    shared = evaluation_batches(spread.share(longest_first), batch_size)
    batches: list[tuple[Sequence[Example], bool]] = [(rows, True) for rows in shared]
    if spread.shards_base:
        num_passes = math.ceil(math.ceil(len(examples) / spread.size) / batch_size)
        batches += [(longest_first[-1:], False)] * (num_passes - len(batches))
    return batches


@torch.no_grad()
def evaluate_trials(
    logits_of: Callable[[Batch], Tensor],
    examples: Sequence[Example],
    *,
    num_trials: int,
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    meter: PeakMeter | None = None,
) -> list[Evaluation]:
    """`evaluate` of several trials at once, in batches that hold the same rows once for each.

    ``logits_of`` gives the logits of such a batch, the rows of each trial side by side.
    """
    tallies = [_tally_for(examples) for _ in range(num_trials)]
    for index, batch_examples in enumerate(evaluation_batches(examples, batch_size)):
        with watching(meter, index == 0):
            repeated = torch.arange(len(batch_examples)).repeat(num_trials)
            batch = collate(batch_examples, pad_token_id).rows(repeated).to(device)
            _add_to_each(tallies, logits_of(batch), batch.labels)
    return [tally.evaluation() for tally in tallies]


def _add_to_each(tallies: Sequence[Tally], logits: Tensor, labels: Tensor) -> None:
    parts = zip(logits.chunk(len(tallies)), labels.chunk(len(tallies)), strict=True)
    for tally, (own_logits, own_labels) in zip(tallies, parts, strict=True):
        tally.add(own_logits, own_labels)


def _tally_for(examples: Sequence[Example]) -> Tally:
    return TokenTally() if examples[0].label is None else ClassTally()


def watching(meter: PeakMeter | None, heavy: bool) -> AbstractContextManager[None]:
    """The meter's window around a heavy step, or none."""
    return nullcontext() if meter is None else meter.watch(heavy)


class Tally(Protocol):
    """Sums up batches; logits and labels have the shapes of `rsauto.training.loss`."""

    def add(self, logits: Tensor, labels: Tensor) -> None: ...

    def merge(self, other: Self) -> None:
        """Takes in what another process has summed up."""

    def evaluation(self) -> Evaluation: ...


class TokenTally:
    """Of a causal language model.

    exact_match is the share of rows whose every counted token is the most likely one given the
    true tokens before it. That is exactly when greedy decoding reproduces the completion, its
    end included: the first wrong token would change both.
    """

    def __init__(self) -> None:
        self._loss_sum = 0.0
        self._num_hits = self._num_targets = self._num_exact = self._num_rows = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self._loss_sum += float(summed_cross_entropy(logits, labels))
        hits, counted = hits_of(logits, labels)
        self._num_hits += int(hits.sum())
        self._num_targets += int(counted.sum())
        self._num_exact += int((hits == counted).all(dim=1).sum())
        self._num_rows += len(labels)

    def merge(self, other: Self) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def evaluation(self) -> Evaluation:
        loss = self._loss_sum / self._num_targets
        return Evaluation(
            eval_loss=loss,
            metrics={
                "perplexity": math.exp(loss) if loss < 700 else math.inf,
                "token_accuracy": self._num_hits / self._num_targets,
                "exact_match": self._num_exact / self._num_rows,
            },
        )


class ClassTally:
    """Of a sequence classifier.

    f1 is that of class 1 where there are two classes, and the mean over all classes (macro) where
    there are more; matthews is Matthews' correlation coefficient. Both as scikit-learn has them.
    """

    def __init__(self) -> None:
        self._loss_sum = 0.0
        self._num_classes = 0
        self._predicted: list[int] = []
        self._true: list[int] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self._loss_sum += float(summed_cross_entropy(logits, labels))
        self._num_classes = logits.shape[-1]
        self._predicted += logits.argmax(-1).tolist()
        self._true += labels.tolist()

    def merge(self, other: Self) -> None:
        self._loss_sum += other._loss_sum
        self._num_classes = max(self._num_classes, other._num_classes)
        self._predicted += other._predicted
        self._true += other._true

    def evaluation(self) -> Evaluation:
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        pair = (self._true, self._predicted)
        averaging = "binary" if self._num_classes == 2 else "macro"
        classes = list(range(self._num_classes))
        return Evaluation(
            eval_loss=self._loss_sum / len(self._true),
            metrics={
                "accuracy": float(accuracy_score(*pair)),
                "f1": float(f1_score(*pair, labels=classes, average=averaging, zero_division=0.0)),
                "matthews": float(matthews_corrcoef(*pair)),
            },
        )
