"""The base model with the adapter added to its weights, whole, with its tokenizer.

A 4 bit base is dequantised first: the model it stands for, to which the adapter was fitted. That
of 8 bits rounds activations as well, which no merged model does, so it is refused.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from rsauto.architecture import auto_class
from rsauto.base import load_weights
from rsauto.errors import InputError
from rsauto.exports.chosen import Chosen
from rsauto.exports.parity import logits_of, put_on
from rsauto.exports.weights import Saved

_OF_CLASSES = ("id2label", "label2id", "pad_token_id")


def require_mergeable(chosen: Chosen) -> None:
    """Raises InputError for a base of 8 bits."""
    if chosen.record.quant_bits == 8:
        raise InputError(
            f"--to merged: trial {chosen.record.number} was trained on a base of 8 bits, which "
            "rounds its activations as well; a merged model would not compute the same. The exact "
            "export of it is --to lora, to be loaded on the base in 8 bits."
        )


def write_merged(
    chosen: Chosen, saved: Saved, folder: Path, device: torch.device, dtype: torch.dtype | None
) -> torch.dtype:
    """Writes weights, configuration and tokenizer; returns the dtype of the weights."""
    base: Any = load_weights(chosen.source, chosen.config.model, device).model
    if chosen.config.model.quant_bits is not None:
        base = base.dequantize(dtype)
    elif dtype is not None:
        base = base.to(dtype)
    merged: Any = put_on(base, str(saved.folder)).merge_and_unload()
    merged.config = _configuration(chosen)
    written: torch.dtype = next(p for p in merged.parameters() if p.is_floating_point()).dtype
    merged = merged.to(written)  # of a head that was trained in float32
    merged.save_pretrained(folder)
    chosen.source.tokenizer.save_pretrained(folder)
    return written


def _configuration(chosen: Chosen) -> PretrainedConfig:
    """The base model's own, with the dropout and the cache that training turned off."""
    config: PretrainedConfig = AutoConfig.from_pretrained(
        chosen.location, revision=chosen.source.commit, trust_remote_code=False
    )
    if chosen.data.label_names is not None:
        for name in _OF_CLASSES:
            setattr(config, name, copy.deepcopy(getattr(chosen.source.config, name)))
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def merged_logits(chosen: Chosen, folder: Path, device: torch.device) -> Tensor:
    """Of the model as transformers loads it from the files."""
    model: PreTrainedModel = auto_class(chosen.source.task).from_pretrained(
        folder,
        dtype="auto",
        attn_implementation=chosen.source.attn_implementation,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return logits_of(model.to(device), chosen.data, device)  # type: ignore[arg-type]
