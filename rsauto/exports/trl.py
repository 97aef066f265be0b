"""A trial as TRL's settings, a YAML file for `trl sft --config`.

The fields are those of ScriptArguments, SFTConfig and ModelConfig of TRL 1.16. Rows that have
input_ids and labels are taken as they are (trl/trainer/sft_trainer.py).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rsauto.exports.recipe import Abilities, Recipe
from rsauto.exports.rows import write_json_lines
from rsauto.exports.settings import (
    Written,
    adapter_note,
    trainer_arguments,
    trainer_notes,
    yaml_file,
)

ABILITIES = Abilities(name="trl")


def write_trl(recipe: Recipe, folder: Path) -> Written:
    """Writes trl.yaml and the rows."""
    write_json_lines(recipe.chosen.data, folder)
    # On a quantised base TRL casts the factors to bfloat16, elsewhere PEFT holds them in float32.
    trains_in = "bfloat16" if recipe.record.quant_bits else "float32"
    notes = trainer_notes(recipe) + adapter_note(recipe, trains_in)
    values = {**_model(recipe), **_data(recipe), **_training(recipe)}
    return yaml_file(recipe, folder, "trl.yaml", "trl sft --config trl.yaml", values, notes)


def _model(recipe: Recipe) -> dict[str, Any]:
    bits = recipe.record.quant_bits
    return {
        "model_name_or_path": recipe.model,
        "model_revision": recipe.commit,
        "dtype": recipe.dtype,
        "attn_implementation": recipe.chosen.source.attn_implementation,
        "load_in_8bit": bits == 8,
        "load_in_4bit": bits == 4,
        "bnb_4bit_quant_type": "nf4" if bits == 4 else None,
        "use_bnb_nested_quant": True if bits == 4 else None,
        "use_peft": True,
        "lora_r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
        "lora_target_modules": _targets(recipe.target_modules),
        "use_rslora": recipe.use_rslora,
    }


def _targets(names: tuple[str, ...]) -> list[str]:
    """A single name becomes a string in TRL, which PEFT takes for a pattern of whole names."""
    if len(names) == 1:
        return [rf"(.*\.)?{re.escape(names[0])}"]
    return list(names)


def _data(recipe: Recipe) -> dict[str, Any]:
    return {
        "dataset_name": "data",
        "dataset_train_split": "train",
        "dataset_test_split": "validation",
        "max_length": recipe.record.max_length,
        "packing": False,
    }


def _training(recipe: Recipe) -> dict[str, Any]:
    return {
        **trainer_arguments(recipe),
        # Without automatic mixed precision, as in the study.
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": recipe.chosen.config.model.gradient_checkpointing,
    }
