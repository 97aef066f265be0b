"""`Trainer.hyperparameter_search` with Optuna at its best, for `benchmarks/search.py`.

Rank goes in through `model_init`, the only way there is; the base is loaded once all the same.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import optuna
import torch
from peft import PeftModel
from search_baselines import (
    Ground,
    Progress,
    adamw,
    schedule,
    stock_adapter,
    suggest_rank,
    suggest_rate,
)
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from rsauto.adapters.lora import remove_adapter
from rsauto.data import Example, batch_plan, collate
from rsauto.training.schedule import warmup_steps


class EnoughTrained(Exception):
    """Trainer's search has no other way to be told to stop."""


class SearchTrainer(Trainer):
    """Trainer that counts tokens and trains a configuration to the loss it has everywhere.

    Order of the data, schedule and the head's rate are everybody's. With another order the noise
    of it could put the target out of reach.
    """

    ground: Ground
    num_tokens = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        training, num_rows = self.ground.training, len(self.ground.bench.data.train)
        plan = batch_plan(num_rows, training.batch_size, self.ground.steps, self.args.seed)
        return list(itertools.chain.from_iterable(plan))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            training = self.ground.training
            self.optimizer = adamw(model or self.model, self.args.learning_rate, training)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = schedule(optimizer or self.optimizer, self.ground)
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        self.num_tokens += int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, *rest, **named)


class Watch(TrainerCallback):
    """Puts adapters on for Trainer's search, and keeps the books of what it trains."""

    def __init__(self, ground: Ground, seed: int, progress: Progress, tokens: int, seconds: float):
        self.ground, self.seed, self.progress = ground, seed, progress
        self.limits = tokens, seconds
        self.trainer: SearchTrainer | None = None
        self.adapted: PeftModel | None = None
        self.number, self.rank = -1, ground.ranks[0]

    def model_init(self, trial: Any) -> PeftModel:
        """The base with a new adapter of the rank that the trial suggests."""
        self.take_off()
        if trial is not None:
            self.begin_trial(trial)
        self.adapted = stock_adapter(self.ground.bench, self.rank, self.seed)
        return self.adapted

    def begin_trial(self, trial: optuna.Trial) -> None:
        """Raises EnoughTrained instead where the search is over."""
        assert self.trainer is not None
        tokens, seconds = self.limits
        spent = time.perf_counter() - self.progress.begin
        if self.progress.reached or self.progress.tokens >= tokens or spent >= seconds:
            raise EnoughTrained
        self.number, self.rank = trial.number, suggest_rank(trial, self.ground)
        self.trainer.num_tokens = 0

    def take_off(self) -> None:
        if self.adapted is not None:
            remove_adapter(self.adapted)
            self.adapted = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        assert self.trainer is not None
        self.progress.trained(self.number, self.trainer.num_tokens)
        if state.global_step == self.ground.steps:
            loss = named["metrics"]["eval_loss"]
            self.progress.finished(self.rank, args.learning_rate, loss)


def arguments_of(ground: Ground, seed: int, folder: str) -> TrainingArguments:
    """As fast as Trainer is on this machine: nothing logged, drawn, saved or loaded by others."""
    training = ground.training
    return TrainingArguments(
        output_dir=folder,
        max_steps=ground.steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=ground.evaluation_rows,
        optim="adamw_torch_fused",
        lr_scheduler_type=training.schedule,
        warmup_steps=warmup_steps(ground.steps, training.warmup_share),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm or 0.0,
        eval_strategy="steps",
        eval_steps=ground.steps // training.num_evals,
        prediction_loss_only=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=ground.bench.device.type == "cpu",
        seed=seed,
    )


def trainer_search(
    ground: Ground, seed: int, target: float, tokens: int, seconds: float, folder: str
) -> dict[str, Any]:
    """`Trainer.hyperparameter_search`, until the target, that many tokens or that much time."""
    transformers_logging.set_verbosity_error()
    data = ground.bench.data

    def batch_of(rows: Sequence[Example]) -> dict[str, Any]:
        batch = collate(rows, data.pad_token_id)
        return {**batch.inputs(), "labels": batch.labels}

    watch = Watch(ground, seed, Progress(target), tokens, seconds)
    SearchTrainer.ground = ground
    trainer = watch.trainer = SearchTrainer(
        args=arguments_of(ground, seed, folder),
        model_init=watch.model_init,
        train_dataset=list(data.train),
        # Longest first, so that a batch has rows of like length, as everybody's.
        eval_dataset=sorted(data.validation, key=lambda row: -len(row.input_ids)),
        data_collator=batch_of,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    watch.progress = Progress(target)
    try:
        trainer.hyperparameter_search(
            hp_space=lambda trial: {"learning_rate": suggest_rate(trial, ground)},
            compute_objective=lambda metrics: metrics["eval_loss"],
            direction="minimize",
            backend="optuna",
            n_trials=10**6,
            sampler=optuna.samplers.TPESampler(seed=seed),
            pruner=optuna.pruners.MedianPruner(),
            catch=(),
        )
    except EnoughTrained:
        pass
    finally:
        watch.take_off()
    return watch.progress.figures()
