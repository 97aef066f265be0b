"""A trial as LLaMA-Factory's settings, a YAML file.

The fields are those of llamafactory.hparams of LLaMA-Factory 0.9.5. Rows are given as a tokenized
dataset on disk (tokenized_path), of which it makes nothing else (llamafactory/data/loader.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rsauto.exports.recipe import Abilities, Recipe
from rsauto.exports.rows import write_arrow
from rsauto.exports.settings import (
    Written,
    adapter_note,
    trainer_arguments,
    trainer_notes,
    yaml_file,
)

ABILITIES = Abilities(name="llamafactory", lora_plus=True, lora_plus_decay=True)

_ATTENTION = {"sdpa": "sdpa", "flash_attention_2": "fa2", "eager": "disabled"}


def write_llamafactory(recipe: Recipe, folder: Path) -> Written:
    """Writes llamafactory.yaml and the rows."""
    write_arrow(recipe.chosen.data, folder)
    notes = trainer_notes(recipe) + adapter_note(recipe, "float32")
    if recipe.dtype != "float32":
        # Its base model has half precision only together with mixed precision.
        notes.append(f"it computes with automatic mixed precision, {recipe.dtype}.")
    values = {**_model(recipe), **_adapter(recipe), **_data(recipe), **trainer_arguments(recipe)}
    command = "llamafactory-cli train llamafactory.yaml"
    return yaml_file(recipe, folder, "llamafactory.yaml", command, values, notes)


def _model(recipe: Recipe) -> dict[str, Any]:
    bits = recipe.record.quant_bits
    checkpointing = recipe.chosen.config.model.gradient_checkpointing
    return {
        "model_name_or_path": recipe.model,
        "model_revision": recipe.commit,
        "flash_attn": _ATTENTION.get(recipe.chosen.source.attn_implementation, "auto"),
        "quantization_bit": bits,
        "quantization_method": "bnb" if bits else None,
        "quantization_type": "nf4" if bits == 4 else None,
        "double_quantization": True if bits == 4 else None,
        "disable_gradient_checkpointing": not checkpointing,
        "bf16": recipe.dtype == "bfloat16",
        "fp16": recipe.dtype == "float16",
    }


def _adapter(recipe: Recipe) -> dict[str, Any]:
    record = recipe.record
    return {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
        "lora_target": ",".join(recipe.target_modules),
        "use_rslora": recipe.use_rslora,
        "loraplus_lr_ratio": record.lr_ratio if record.lr_ratio != 1.0 else None,
    }


def _data(recipe: Recipe) -> dict[str, Any]:
    return {
        "tokenized_path": "data",
        # It asks for the names of both, and reads neither.
        "dataset": "rsauto",
        "eval_dataset": "rsauto",
        "template": "empty",
        "cutoff_len": recipe.record.max_length,
    }
