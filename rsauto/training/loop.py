"""The training loop: one trial on one adapted model, read from top to bottom.

It is a generator that yields after every optimizer step and knows nobody who watches it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rsauto.adapters.lora import trainable_parameters
from rsauto.data import Batch, TokenisedData, batch_plan, collate, micro_batches, padded_tokens
from rsauto.memory.measure import PeakMeter
from rsauto.records import EvalPoint, StepPoint, TrialSpec
from rsauto.training.evaluate import Evaluation, evaluate, watching
from rsauto.training.loss import IGNORED, count_targets, summed_cross_entropy, token_mean
from rsauto.training.schedule import evaluation_steps, rate_multiplier, warmup_steps
from rsauto.training.spread import ALONE, Spread


class Diverged(ArithmeticError):
    """A loss or a gradient was no longer a finite number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """The steps of a run that lie behind it when it is continued."""

    steps: int = 0
    losses: tuple[float, ...] = ()
    """Of the steps since the last evaluation."""
    norms: tuple[float, ...] = ()


NOTHING_DONE = Done()


def train(
    model: nn.Module,
    optimizer: Optimizer,
    data: TokenisedData,
    spec: TrialSpec,
    *,
    device: torch.device,
    meter: PeakMeter | None = None,
    untouched_general_loss: float | None = None,
    allocate: Callable[[int], None] | None = None,
    spread: Spread = ALONE,
    done: Done = NOTHING_DONE,
) -> Iterator[StepPoint]:
    """Trains the adapter of ``model`` as ``spec`` says, yielding once per optimizer step.

    ``allocate`` is called with the step after every optimizer step, while its gradients are there:
    AdaLoRA places its rank.

    The data order depends on ``spec.seed`` alone, so trials of one seed see the same batches.
    ``untouched_general_loss`` is the base model's loss on ``data.general``, from which forgetting
    is measured. Where the trial is ``spread``, this is one of the processes that train it; all
    yield the same, but for the seconds. Steps that are ``done`` are left out: model and optimizer
    must be as they were after them.
    Raises Diverged at the first loss or gradient that is not finite.
    """
    assert spec.micro_batch_size is not None, "the planner chooses it before training"
    parameters = list(trainable_parameters(model).values())
    order = batch_plan(len(data.train), spec.batch_size, spec.steps, spec.seed)
    steps = [cut(indices, data, spec.micro_batch_size, spread) for indices in order]
    evaluate_after = evaluation_steps(spec.steps, spec.num_evals)
    watched = watched_steps(steps, data, evaluate_after)
    losses, norms = list(done.losses), list(done.norms)
    num_tokens = sum(num_tokens_of(indices, data) for indices in order[: done.steps])

    def update(step: int) -> float:
        """Everything from the summed gradients to the next step; returns their mean norm."""
        norm, total_norm = gradient_norms(parameters)
        require_finite(step, total_norm, "gradient norm")
        if spec.max_grad_norm is not None:
            clip_gradients(parameters, total_norm, spec.max_grad_norm)
        optimizer.step()
        if allocate is not None:
            allocate(step)
        optimizer.zero_grad(set_to_none=True)
        return norm

    model.train()
    numbered = enumerate(zip(order, steps, strict=True), start=1)
    for step, (indices, parts) in islice(numbered, done.steps, None):
        begin = time.perf_counter()
        set_learning_rate(optimizer, spec, step - 1)
        with watching(meter, step in watched):
            loss = accumulate_gradients(model, parts, data, device, spread)
            require_finite(step, loss)
            spread.sum_gradients(parameters)
            norm = spread.together(partial(update, step))[0]
        seconds = time.perf_counter() - begin
        losses.append(loss)
        norms.append(norm)
        num_tokens += num_tokens_of(indices, data)

        evaluation = None
        if step in evaluate_after:
            first = step == evaluate_after[0]
            found = evaluate_all(
                model,
                data,
                batch_size=spec.micro_batch_size,
                device=device,
                meter=meter if first else None,
                untouched_general_loss=untouched_general_loss,
                spread=spread,
            )
            require_finite_losses(step, found)
            evaluation = eval_point(step, found, losses, norms)
            losses, norms = [], []
        yield StepPoint(
            step=step,
            train_loss=loss,
            grad_norm=norm,
            learning_rate=optimizer.param_groups[0]["lr"],
            tokens=num_tokens,
            seconds=seconds,
            evaluation=evaluation,
        )


def num_tokens_of(indices: Sequence[int], data: TokenisedData) -> int:
    """Tokens of some training examples."""
    return sum(len(data.train[i].input_ids) for i in indices)


def cut(
    indices: Sequence[int], data: TokenisedData, size: int, spread: Spread = ALONE
) -> Sequence[Sequence[int]]:
    """This process's share of a global batch in micro-batches of ``size``.

    Rows of like length come together, longest first: less padding is computed, all processes get
    as much to do, and the gradient is the same however the batch is cut.
    """
    if len(indices) > size or spread.size > 1:
        indices = sorted(indices, key=lambda index: -len(data.train[index].input_ids))
    return micro_batches(spread.share(indices), size)


def accumulate_gradients(
    model: nn.Module,
    parts: Sequence[Sequence[int]],
    data: TokenisedData,
    device: torch.device,
    spread: Spread = ALONE,
) -> float:
    """Backward over one global batch; returns its mean loss per counted token (or sequence).

    ``parts`` are this process's micro-batches, as indices of training examples.

    All micro-batches of all processes share one denominator, so the sum of their gradients does not
    depend on how the batch is cut, whatever the lengths.
    """
    batches = [collate([data.train[i] for i in part], data.pad_token_id) for part in parts]
    num_own = sum(count_targets(batch.labels) for batch in batches)
    counts = spread.together(lambda: (num_own, len(batches)))
    num_targets = sum(count for count, _ in counts)
    if spread.shards_base:
        # Every pass gathers weights from all processes, so all make as many.
        batches += [_blank(batches[-1])] * (max(num for _, num in counts) - len(batches))

    def passes() -> float:
        return sum(_backward(model, batch.to(device), num_targets) for batch in batches)

    return sum(spread.together(passes, in_step=True))


def _backward(model: nn.Module, batch: Batch, num_targets: int) -> float:
    """Adds the gradients of a micro-batch; its share of the mean loss."""
    logits = model(**batch.inputs()).logits
    loss = token_mean(summed_cross_entropy(logits, batch.labels), num_targets)
    del logits  # the graph keeps what backward needs; a second reference would keep the rest
    loss.backward()
    return float(loss.detach())


def _blank(batch: Batch) -> Batch:
    """A batch of which nothing counts: its loss and its gradients are zero."""
    return replace(batch, labels=torch.full_like(batch.labels, IGNORED))


def gradient_norms(parameters: Sequence[nn.Parameter]) -> tuple[float, float]:
    """(mean Frobenius norm over tensors, global L2 norm) of the gradients.

    The mean is what the rsLoRA paper's figure 3 shows; the global norm is what clipping uses.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms: Tensor = torch.stack(torch._foreach_norm(grads))
    return float(norms.mean()), float(torch.linalg.vector_norm(norms))


def clip_gradients(parameters: Sequence[nn.Parameter], norm: float, max_norm: float) -> None:
    """Scales all gradients so that their global L2 norm is at most ``max_norm`` (torch's rule)."""
    scale = max_norm / (norm + 1e-6)
    if scale < 1.0:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], scale)


def require_finite(step: int, value: float, name: str = "loss") -> None:
    """Raises Diverged for NaN and infinities."""
    if not math.isfinite(value):
        raise Diverged(f"step {step}: {name} {value}")


def require_finite_losses(step: int, found: Evaluation) -> None:
    """Raises Diverged where an evaluation has a loss that is no finite number."""
    require_finite(step, found.eval_loss, "validation loss")
    if "general_loss" in found.metrics:
        require_finite(step, found.metrics["general_loss"], "loss on the general text")


def set_learning_rate(optimizer: Optimizer, spec: TrialSpec, step: int) -> None:
    """Sets every group to its peak rate times the schedule's multiplier for ``step`` (from 0)."""
    num_warmup = warmup_steps(spec.steps, spec.warmup_share)
    multiplier = rate_multiplier(spec.schedule, step, spec.steps, num_warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


def watched_steps(
    steps: Sequence[Sequence[Sequence[int]]], data: TokenisedData, evaluate_after: Sequence[int]
) -> set[int]:
    """Steps (from 1) to measure: the heaviest before each evaluation, where none was before.

    A trial can only be pruned at an evaluation, so these are the steps that decide its peak. The
    first step is left out where there is another: its forward pass has no optimizer states yet.
    """
    sizes = [max(padded_tokens([data.train[i] for i in part]) for part in parts) for parts in steps]
    watched: set[int] = set()
    heaviest, begin = 0, min(2, len(steps))
    for end in evaluate_after:
        if begin > end:
            continue
        step = max(range(begin, end + 1), key=lambda number: sizes[number - 1])
        if sizes[step - 1] > heaviest:
            watched.add(step)
            heaviest = sizes[step - 1]
        begin = end + 1
    return watched


def eval_point(
    step: int, found: Evaluation, losses: Sequence[float], norms: Sequence[float]
) -> EvalPoint:
    """An evaluation, with the means of the steps since the one before."""
    return EvalPoint(
        step=step,
        train_loss=sum(losses) / len(losses),
        eval_loss=found.eval_loss,
        grad_norm=sum(norms) / len(norms),
        metrics=found.metrics,
    )


def evaluate_all(
    model: nn.Module,
    data: TokenisedData,
    *,
    batch_size: int,
    device: torch.device,
    meter: PeakMeter | None = None,
    untouched_general_loss: float | None = None,
    spread: Spread = ALONE,
) -> Evaluation:
    """The validation rows and, where there is one, the general text: its loss, and its rise."""
    where: dict[str, Any] = {
        "batch_size": batch_size, "device": device, "meter": meter, "spread": spread
    }  # fmt: skip
    pad = data.pad_token_id
    found = evaluate(model, data.validation, pad_token_id=pad, **where)
    if not data.general:
        return found
    general_loss = evaluate(model, data.general, pad_token_id=pad, **where).eval_loss
    return with_general_loss(found, general_loss, untouched_general_loss)


def with_general_loss(found: Evaluation, loss: float, untouched: float | None) -> Evaluation:
    """An evaluation with the loss on the general text, and its rise over the untouched model's."""
    metrics = {**found.metrics, "general_loss": loss}
    if untouched is not None:
        metrics["forgetting"] = loss - untouched
    return replace(found, metrics=metrics)
