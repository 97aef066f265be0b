"""What the settings files of all trainers have in common: the words on top, and what differs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from rsauto.exports.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Written:
    """A settings file, and what to know of it."""

    file: str
    command: str
    """That runs it, in its folder."""
    notes: tuple[str, ...]
    """In what the trainer does otherwise than rsauto did; empty where it does the same."""


def yaml_file(
    recipe: Recipe, folder: Path, name: str, command: str,
    values: Mapping[str, Any], notes: Sequence[str],
) -> Written:  # fmt: skip
    """Writes a YAML file with a comment on top; keys without a value are left out."""
    kept = {key: value for key, value in values.items() if value is not None}
    body = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=100)
    (folder / name).write_text(comment(recipe, command, notes) + body, encoding="utf-8")
    return Written(file=name, command=command, notes=tuple(notes))


def comment(recipe: Recipe, command: str, notes: Sequence[str]) -> str:
    """What the file is of, how to run it, and what differs, as comment lines."""
    config, record = recipe.chosen.config, recipe.record
    paragraphs = [
        f"Written by rsauto: study {config.name}, trial {record.number} ({record.method}, rank "
        f"{record.rank}, alpha {record.alpha}, gamma_r {record.gamma_r:.6g}).",
        f"Run it in this folder, on one device: {command}",
        "The rows in data/ are the study's, as token ids. For other rows, write the dataset "
        "section anew.",
        *(f"Differs from the study: {note}" for note in notes),
    ]
    # A line break of YAML or Python would end the comment, and there are rarer ones than \n.
    plain = [" ".join(text.split()) for text in paragraphs]
    lines = [line for text in plain for line in textwrap.wrap(text, 95)]
    return "".join(f"# {line}\n" for line in lines)


def trainer_notes(recipe: Recipe) -> list[str]:
    """What transformers' Trainer, on which the others are built, does otherwise."""
    notes = ["the trainer shuffles rows in an order of its own, so batches are others."]
    num_rows, size = len(recipe.chosen.data.train), recipe.record.batch_size
    if num_rows % size and recipe.steps > num_rows // size:
        notes.append(
            f"{num_rows} rows are no whole number of batches of {size}: the last batch of every "
            f"epoch has {num_rows % size}, which rsauto fills up from the next epoch."
        )
    if recipe.warmup_steps:
        notes.append(
            "over warm-up the rate is one step behind: it begins at 0, and not at "
            f"1/{recipe.warmup_steps} of the peak."
        )
    dropout = _base_dropout(recipe)
    if dropout:
        named = ", ".join(f"{name} {value:g}" for name, value in dropout.items())
        notes.append(f"the base model's own dropout ({named}) is on; rsauto turns it off.")
    return notes


def _base_dropout(recipe: Recipe) -> dict[str, float]:
    config = AutoConfig.from_pretrained(
        recipe.model, revision=recipe.commit, trust_remote_code=False
    )
    return {k: v for k, v in vars(config).items() if "drop" in k and isinstance(v, float) and v > 0}


def adapter_note(recipe: Recipe, trains_in: str) -> list[str]:
    """Where a trainer holds the factors in another precision than the study did."""
    if recipe.record.adapter_dtype == trains_in:
        return []
    return [f"the factors are trained in {trains_in}, not in {recipe.record.adapter_dtype}."]


def trainer_arguments(recipe: Recipe) -> dict[str, Any]:
    """How long, how fast and in which batches, in the words of transformers' Trainer."""
    record = recipe.record
    return {
        "per_device_train_batch_size": recipe.micro_batch_size,
        "per_device_eval_batch_size": recipe.micro_batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        "max_steps": recipe.steps,
        "learning_rate": record.learning_rate,
        "optim": recipe.optimizer,
        "lr_scheduler_type": recipe.scheduler,
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": record.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "seed": record.seed,
        "eval_strategy": "steps",
        "eval_steps": recipe.eval_steps,
        "save_steps": recipe.eval_steps,
        "logging_steps": 1,
        "report_to": "none",
        "output_dir": "outputs",
    }
