"""What `benchmarks/search.py` compares with in a plain loop: a grid, and Optuna's samplers.

All of them train stock PEFT LoRA with rsLoRA's factor and fused AdamW on one base, loaded once;
initialisation and the order of the data follow from the seed alone, so that a configuration is the
same model everywhere. Trainer's own search is in `search_trainer.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from rsauto.adapters.head import initialise_head
from rsauto.adapters.lora import remove_adapter, shared_options, target_module_names, wrap
from rsauto.config import TrainingConfig
from rsauto.data import Example, batch_plan, collate
from rsauto.training.evaluate import Evaluation, evaluate
from rsauto.training.loss import count_targets, summed_cross_entropy, token_mean
from rsauto.training.schedule import evaluation_steps, rate_multiplier, warmup_steps
from rsauto.training.trial import Bench

ALPHA = 16


@dataclass(frozen=True)
class Ground:
    """What every competitor shares: the base model, the data, the space, the length of a trial."""

    bench: Bench
    test: tuple[Example, ...]
    """Rows that nothing is chosen on."""
    training: TrainingConfig
    ranks: tuple[int, ...]
    """Powers of two, ascending."""
    learning_rates: tuple[float, ...]
    """Ascending; their range is what a continuous search may use."""
    evaluation_rows: int
    """Rows of a batch of evaluation."""
    setup_seconds: float

    @property
    def steps(self) -> int:
        assert self.training.steps is not None, "a task gives its length in steps"
        return self.training.steps

    @property
    def evaluate_after(self) -> tuple[int, ...]:
        return evaluation_steps(self.steps, self.training.num_evals)


@dataclass(frozen=True)
class Point:
    """One evaluation of one trial."""

    step: int
    tokens: int
    """Trained on so far, padding not counted."""
    loss: float
    """On the validation rows."""
    test: Evaluation | None = None


@dataclass
class Progress:
    """What a search has spent and found; the clock starts with it."""

    target: float | None = None
    begin: float = field(default_factory=time.perf_counter)
    tokens_of: dict[int, int] = field(default_factory=dict)
    """By trial, unfinished ones too."""
    seconds: float = 0.0
    """Until the last thing heard of a trial."""
    best_loss: float = math.inf
    best: dict[str, float] | None = None
    points: list[tuple[int, float, float]] = field(default_factory=list)
    """(rank, learning rate, loss) of every trial of full length."""
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    """(tokens, seconds, best loss so far), one for every improvement."""
    tokens_to_target: int | None = None
    seconds_to_target: float | None = None

    @property
    def tokens(self) -> int:
        return sum(self.tokens_of.values())

    @property
    def reached(self) -> bool:
        return self.tokens_to_target is not None

    def trained(self, number: int, tokens: int) -> None:
        """Trial ``number`` has seen that many tokens."""
        self.tokens_of[number] = tokens
        self.seconds = time.perf_counter() - self.begin

    def finished(self, rank: int, learning_rate: float, loss: float) -> None:
        """A trial of full length has this loss."""
        self.points.append((rank, learning_rate, loss))
        if not loss < self.best_loss:  # NaN is no improvement
            return
        self.best_loss = loss
        self.best = {"rank": rank, "learning_rate": learning_rate}
        self.curve.append((self.tokens, self.seconds, loss))
        if self.target is not None and loss <= self.target and not self.reached:
            self.tokens_to_target, self.seconds_to_target = self.tokens, self.seconds

    def figures(self) -> dict[str, Any]:
        """What is written down; None where there is no number."""
        return {
            "target": self.target,
            "tokens_to_target": self.tokens_to_target,
            "seconds_to_target": self.seconds_to_target,
            "tokens_total": self.tokens,
            "seconds_total": self.seconds,
            "censored": not self.reached,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "best": self.best,
            "trials": len(self.tokens_of),
            "full_length_trials": len(self.points),
            "points": [(r, rate, x if math.isfinite(x) else None) for r, rate, x in self.points],
            "curve": self.curve,
        }


def stock_adapter(bench: Bench, rank: int, seed: int) -> PeftModel:
    """PEFT's own layers on the shared base, drawn from the seed."""
    torch.manual_seed(seed)
    initialise_head(bench.model, bench.fresh_parameters)
    config = LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        use_rslora=True,
        lora_dropout=0.0,
        target_modules=target_module_names(bench.model, "all-linear"),
        **shared_options(bench.model),
    )
    return wrap(bench.model, config)


def adamw(adapted: nn.Module, learning_rate: float, training: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW; a classifier's head has its own rate, the same in every trial."""
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    head = [p for name, p in trainable.items() if ".modules_to_save." in name]
    factors = [p for name, p in trainable.items() if ".modules_to_save." not in name]
    groups = [{"params": factors, "lr": learning_rate}]
    if head:
        groups.append({"params": head, "lr": training.head_learning_rate})
    return torch.optim.AdamW(groups, weight_decay=training.weight_decay, fused=True)


def schedule(optimizer: torch.optim.Optimizer, ground: Ground) -> torch.optim.lr_scheduler.LambdaLR:
    """The same multipliers of the peak rate as rsauto's own trials."""
    training, num_warmup = ground.training, warmup_steps(ground.steps, ground.training.warmup_share)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: rate_multiplier(
            training.schedule, min(step, ground.steps - 1), ground.steps, num_warmup
        ),
    )


def points_of(
    ground: Ground, rank: int, learning_rate: float, seed: int, *, test: bool = False
) -> Generator[Point, None, None]:
    """Trains one trial in a plain loop, yielding at its evaluations; close it to prune the trial.

    Ends early where a validation loss is not finite. With ``test`` the last point has the test
    split's evaluation too.
    """
    bench, training = ground.bench, ground.training
    data, pad = bench.data, bench.data.pad_token_id
    adapted = stock_adapter(bench, rank, seed)
    try:
        parameters = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = adamw(adapted, learning_rate, training)
        rates = schedule(optimizer, ground)
        where: Any = {
            "batch_size": ground.evaluation_rows, "pad_token_id": pad, "device": bench.device
        }  # fmt: skip
        tokens = 0
        adapted.train()
        plan = batch_plan(len(data.train), training.batch_size, ground.steps, seed)
        for step, indices in enumerate(plan, start=1):
            rows = [data.train[index] for index in indices]
            batch = collate(rows, pad).to(bench.device)
            loss_sum = summed_cross_entropy(adapted(**batch.inputs()).logits, batch.labels)
            token_mean(loss_sum, count_targets(batch.labels)).backward()
            if training.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, training.max_grad_norm, foreach=True)
            optimizer.step()
            rates.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += sum(len(row.input_ids) for row in rows)
            if step not in ground.evaluate_after:
                continue
            loss = evaluate(adapted, data.validation, **where).eval_loss
            last = test and step == ground.steps
            found = evaluate(adapted, ground.test, **where) if last else None
            yield Point(step, tokens, loss, found)
            if not math.isfinite(loss):
                return
    finally:
        remove_adapter(adapted)


def final_test(ground: Ground, seed: int, best: dict[str, Any] | None) -> dict[str, Any]:
    """The chosen configuration trained once more and measured on the test split."""
    if best is None:
        return {"final_test_loss": None}
    *_, last = points_of(ground, best["rank"], best["learning_rate"], seed, test=True)
    if last.test is None:
        return {"final_test_loss": None}
    return test_figures(last.test.eval_loss, last.test.metrics)


def test_figures(loss: float, metrics: Mapping[str, float]) -> dict[str, Any]:
    """The loss on the test split, and the one metric that people quote of its task."""
    shown = {name: metrics[name] for name in ("accuracy", "exact_match") if name in metrics}
    named = {f"final_test_{name}": value for name, value in shown.items()}
    return {"final_test_loss": loss, **named}


def grid(ground: Ground, seed: int, within: float) -> dict[str, Any]:
    """Every point at full length, in an order drawn from the seed; its cost is all of it.

    The target is ``within`` (a share, 0.005) of the best loss.
    """
    points = list(itertools.product(ground.ranks, ground.learning_rates))
    random.Random(seed).shuffle(points)
    progress = Progress()
    for number, (rank, learning_rate) in enumerate(points):
        loss = math.inf
        for point in points_of(ground, rank, learning_rate, seed):
            progress.trained(number, point.tokens)
            loss = point.loss if point.step == ground.steps else math.inf
        progress.finished(rank, learning_rate, loss)
    return progress.figures() | {
        "target": (1 + within) * progress.best_loss,
        "tokens_to_target": progress.tokens,
        "seconds_to_target": progress.seconds,
        "censored": False,
    }


def suggest_rank(trial: optuna.Trial, ground: Ground) -> int:
    low, high = (int(math.log2(rank)) for rank in (ground.ranks[0], ground.ranks[-1]))
    return int(2 ** trial.suggest_int("log2_rank", low, high))


def suggest_rate(trial: optuna.Trial, ground: Ground) -> float:
    low, high = ground.learning_rates[0], ground.learning_rates[-1]
    return trial.suggest_float("learning_rate", low, high, log=True)


def sampled(
    ground: Ground, seed: int, sampler: optuna.samplers.BaseSampler, target: float, tokens: int
) -> dict[str, Any]:
    """Optuna with median pruning over the plain loop, until the target or that many tokens."""
    study = optuna.create_study(sampler=sampler, pruner=optuna.pruners.MedianPruner())
    progress = Progress(target)
    while not progress.reached and progress.tokens < tokens:
        trial = study.ask()
        rank, learning_rate = suggest_rank(trial, ground), suggest_rate(trial, ground)
        loss = _run_or_prune(ground, seed, trial, (rank, learning_rate), progress)
        if loss is None:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            progress.finished(rank, learning_rate, loss)
            study.tell(trial, loss)
    return progress.figures()


def _run_or_prune(
    ground: Ground,
    seed: int,
    trial: optuna.Trial,
    point_of_space: tuple[int, float],
    progress: Progress,
) -> float | None:
    """The loss at full length, None where the trial was pruned or diverged."""
    with contextlib.closing(points_of(ground, *point_of_space, seed)) as points:
        for point in points:
            progress.trained(trial.number, point.tokens)
            trial.report(point.loss, point.step)
            if not math.isfinite(point.loss):
                return None
            if point.step == ground.steps:
                return point.loss
            if trial.should_prune():
                return None
    return None
