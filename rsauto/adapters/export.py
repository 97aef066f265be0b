"""Every adapter leaves as plain LoRA with scale 1, which every server reads alike.

Servers disagree on `use_rslora` and on rank patterns; alpha = r with gamma_r folded into B leaves
them nothing to disagree on, and keeps the logits.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor

from rsauto.adapters.head import head_module_names
from rsauto.adapters.lora import ADAPTER_NAME, lora_layers, short_target_names
from rsauto.atomic import write_bytes


def save_adapter(adapted: PeftModel, folder: Path, *, base_name: str, card: str) -> int:
    """Writes ``folder`` as a PEFT LoRA adapter of scale 1, all or nothing.

    Returns the size of its weights in bytes. ``card`` becomes README.md.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        weights = partial / "adapter_model.safetensors"
        # Serialised first and written by us: a full disk is then an OSError like any other.
        write_bytes(weights, save(scale_one_tensors(adapted), metadata={"format": "pt"}))
        _plain_config(adapted, base_name).save_pretrained(str(partial))
        (partial / "README.md").write_text(card, encoding="utf-8")
        num_bytes = weights.stat().st_size
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return num_bytes


def _put_in_place(new: Path, folder: Path) -> None:
    """Renames ``new`` to ``folder``; what was there goes only when that has worked."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def scale_one_tensors(adapted: PeftModel) -> dict[str, Tensor]:
    """Adapter tensors in PEFT's naming with gamma_r B in place of B: Delta W = B A.

    In float32, also where they were trained in bfloat16, which would round gamma_r B.
    """
    scales = {layer.scaling[ADAPTER_NAME] for layer in lora_layers(adapted)}
    assert len(scales) == 1, f"one factor for every module is assumed, got {sorted(scales)}"
    factor = scales.pop()
    return {
        name: (tensor.float() * (factor if "lora_B" in name else 1.0)).detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(adapted, adapter_name=ADAPTER_NAME).items()
    }


def _plain_config(adapted: PeftModel, base_name: str) -> LoraConfig:
    trained = adapted.peft_config[ADAPTER_NAME]
    assert isinstance(trained, LoraConfig)
    plain = LoraConfig(
        r=trained.r,
        lora_alpha=trained.r,
        use_rslora=False,
        fan_in_fan_out=trained.fan_in_fan_out,
        lora_dropout=0.0,
        bias="none",
        task_type=trained.task_type,
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    heads = head_module_names(adapted.get_base_model())
    plain.modules_to_save = heads or None
    # Given to the constructor it would become a set, and be written in another order every time.
    plain.target_modules = short_target_names(adapted)
    return plain
