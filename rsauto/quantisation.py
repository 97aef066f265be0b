"""Base models whose linear layers bitsandbytes keeps in 8 bit (LLM.int8) or 4 bit (nf4).

bitsandbytes is optional: planning needs none of it, loading does. 4 bit is what QLoRA trains on
(arXiv:2305.14314): nf4 in blocks of 64, the blocks' scales quantised once more.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from rsauto.errors import InputError

Bits = Literal[4, 8]

OLDEST_BITSANDBYTES = "0.48"
"""The first that trains 8 bit layers on a CPU, and whose models may be moved between devices."""

# It tells of every product on a CPU that inputs are cast to float16.
logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)


def require_bitsandbytes(quant_bits: Bits) -> None:
    """Raises InputError where bitsandbytes is missing or too old to train on."""
    install = "pip install 'rsauto[quant]'"
    try:
        installed = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        raise InputError(f"model.quant_bits: {quant_bits} needs bitsandbytes: {install}") from None
    if Version(installed) < Version(OLDEST_BITSANDBYTES):
        raise InputError(
            f"model.quant_bits: {quant_bits} needs bitsandbytes {OLDEST_BITSANDBYTES} or newer, "
            f"but {installed} is installed: {install}"
        )


def saved_bits(model_config: PretrainedConfig) -> Bits | None:
    """Bits of a model that was saved or loaded quantised; None where it was not.

    Raises InputError for other methods than bitsandbytes.
    """
    saved = saved_settings(model_config)
    if saved is None:
        return None
    method = str(saved.get("quant_method", "unknown")).rpartition(".")[2].lower()
    if method not in ("bitsandbytes", "bits_and_bytes"):
        raise InputError(
            f"model.name: its weights are quantised with {method}, but only bitsandbytes can be "
            "trained on. Give the model it was made from, and model.quant_bits: 4 or 8."
        )
    if saved.get("load_in_8bit"):
        return 8
    return 4 if saved.get("load_in_4bit") else None


def saved_settings(model_config: PretrainedConfig) -> dict[str, Any] | None:
    """The quantisation that is written in a model's configuration, as plain values."""
    saved = getattr(model_config, "quantization_config", None)
    if saved is None or isinstance(saved, dict):
        return saved
    settings: dict[str, Any] = saved.to_dict()
    return settings


def require_loadable(name: str, quant_bits: Bits | None, model_config: PretrainedConfig) -> None:
    """Raises InputError when a model is saved in other bits than asked for, or without
    bitsandbytes."""
    saved = saved_bits(model_config)
    if saved is not None and saved != quant_bits:
        asked = "not set" if quant_bits is None else str(quant_bits)
        raise InputError(
            f"model.quant_bits: {asked}, but {name!r} is saved in {saved} bit. "
            f"Set model.quant_bits: {saved}, or give the model it was made from."
        )
    if quant_bits is not None:
        require_bitsandbytes(quant_bits)


def loading_settings(
    quant_bits: Bits, dtype: torch.dtype, skip_modules: Sequence[str]
) -> BitsAndBytesConfig:
    """For `from_pretrained`; ``skip_modules`` stay in ``dtype``, in which 4 bit layers compute."""
    return BitsAndBytesConfig(
        load_in_8bit=quant_bits == 8,
        load_in_4bit=quant_bits == 4,
        llm_int8_skip_modules=list(skip_modules),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def unquantised_modules(
    model: PreTrainedModel, heads: Sequence[str] = (), saved: Sequence[str] | None = None
) -> list[str]:
    """What transformers leaves in full precision: ``saved`` where it was told, else its default.

    The default is the output head and what is tied to it; ``heads`` (module names) are added.
    transformers forgets its default as soon as other modules are named, so all are given.
    """
    told = [*heads] if saved is None else [*saved]
    kept: list[str] = HfQuantizer.get_modules_to_not_convert(
        model, told, add_default_skips=saved is None
    )
    return sorted(kept)


def is_kept(name: str, unquantised: Sequence[str]) -> bool:
    """Whether transformers leaves the module ``name`` in full precision."""
    return not should_convert_module(name, list(unquantised))


def keep_trainable(model: nn.Module) -> None:
    """Holds 4 bit layers in the layout that can be trained. Changes the model in place.

    On CPUs with AVX512-BF16 the first evaluation would pack their weights for a kernel without
    a backward pass, and training after it would go on without gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
            module.state_dict()  # puts weights that are packed already back


def hides_inputs(model: nn.Module) -> bool:
    """Whether layers keep their inputs where non-reentrant checkpointing cannot free them.

    8 bit layers do, as plain attributes. Reentrant checkpointing records nothing in the first
    forward pass, so there they have none to keep.
    """
    return any(type(module).__name__ == "Linear8bitLt" for module in model.modules())
