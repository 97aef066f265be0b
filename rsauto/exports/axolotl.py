"""A trial as axolotl's settings, a YAML file.

The fields are those of axolotl.utils.schemas of axolotl 0.19 (AxolotlInputConfig). Rows that have
input_ids, attention_mask and labels are taken as they are, without a prompt strategy
(axolotl/utils/data/wrappers.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rsauto.exports.recipe import Abilities, Recipe
from rsauto.exports.rows import write_json_lines
from rsauto.exports.settings import Written, adapter_note, trainer_notes, yaml_file

# With LoRA+ it calls PEFT's create_loraplus_optimizer without a weight decay.
ABILITIES = Abilities(name="axolotl", lora_plus=True, rank_pattern=True)

_OPTIMIZERS = {"adamw": "adamw_torch_fused", "sgd": "sgd", "adafactor": "adafactor"}


def write_axolotl(recipe: Recipe, folder: Path) -> Written:
    """Writes axolotl.yaml and the rows."""
    write_json_lines(recipe.chosen.data, folder)
    # Adapters are held in float32 unless PEFT is told to leave them in the base model's dtype.
    in_base_dtype = recipe.record.adapter_dtype == "bfloat16" and recipe.dtype == "bfloat16"
    notes = trainer_notes(recipe) + adapter_note(recipe, "bfloat16" if in_base_dtype else "float32")
    values = {
        **_model(recipe),
        **_adapter(recipe, in_base_dtype),
        **_data(recipe),
        **_training(recipe),
    }
    return yaml_file(recipe, folder, "axolotl.yaml", "axolotl train axolotl.yaml", values, notes)


def _model(recipe: Recipe) -> dict[str, Any]:
    bits = recipe.record.quant_bits
    return {
        "base_model": recipe.model,
        "revision_of_model": recipe.commit,
        "attn_implementation": recipe.chosen.source.attn_implementation,
        "load_in_8bit": bits == 8,
        "load_in_4bit": bits == 4,
        # Without automatic mixed precision, as in the study.
        "bf16": False,
        "fp16": False,
        "bfloat16": recipe.dtype == "bfloat16",
        "float16": recipe.dtype == "float16",
        "tf32": False,
    }


def _adapter(recipe: Recipe, in_base_dtype: bool) -> dict[str, Any]:
    record = recipe.record
    return {
        "adapter": "qlora" if record.quant_bits == 4 else "lora",
        "lora_r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
        "peft_use_rslora": recipe.use_rslora,
        "lora_target_modules": list(recipe.target_modules),
        "lora_rank_pattern": recipe.rank_pattern or None,
        "lora_fan_in_fan_out": recipe.fan_in_fan_out or None,
        "peft_autocast_adapter_dtype": False if in_base_dtype else None,
        "loraplus_lr_ratio": record.lr_ratio if record.lr_ratio != 1.0 else None,
        # Kernels that change the order of sums.
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
    }


def _data(recipe: Recipe) -> dict[str, Any]:
    def rows(split: str) -> list[dict[str, str]]:
        return [{"path": f"data/{split}.jsonl", "ds_type": "json", "split": "train"}]

    return {
        "datasets": rows("train"),
        "test_datasets": rows("validation"),
        "dataset_prepared_path": "prepared",
        "sequence_len": recipe.record.max_length,
        "sample_packing": False,
        "eval_sample_packing": False,
        "pad_to_sequence_len": False,
    }


def _training(recipe: Recipe) -> dict[str, Any]:
    record = recipe.record
    return {
        "micro_batch_size": recipe.micro_batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        "max_steps": recipe.steps,
        "learning_rate": record.learning_rate,
        "optimizer": _OPTIMIZERS[record.optimizer],
        "lr_scheduler": recipe.scheduler,
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": record.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "gradient_checkpointing": recipe.chosen.config.model.gradient_checkpointing,
        "seed": record.seed,
        "eval_steps": recipe.eval_steps,
        "save_steps": recipe.eval_steps,
        "logging_steps": 1,
        "output_dir": "outputs",
    }
