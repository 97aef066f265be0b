"""The head of a sequence classifier: which modules it is, and a fresh start for every trial.

A head is trained whole beside the adapter (PEFT's `modules_to_save`) and saved with it. It is
everything behind the backbone (`classifier`, `score`, DistilBERT's `pre_classifier`) and the
backbone's pooler, which many checkpoints lack: left frozen and random it would throw away what the
encoder learns.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel


def is_classifier(model: nn.Module) -> bool:
    """Whether the model is one of transformers' sequence classifiers."""
    return type(model).__name__.endswith("ForSequenceClassification")


def head_module_names(model: nn.Module) -> list[str]:
    """Full names of the modules of a classifier's head, in model order; none for other models."""
    if not is_classifier(model):
        return []
    prefix = str(getattr(model, "base_model_prefix", ""))
    backbone = getattr(model, prefix, None)
    pooler = getattr(backbone, "pooler", None)
    inside = [f"{prefix}.pooler"] if _has_parameters(pooler) else []
    others = [name for name, _ in model.named_children() if name != prefix]
    return inside + [name for name in others if _has_parameters(model.get_submodule(name))]


def initialise_head(model: PreTrainedModel, fresh_parameters: Collection[str]) -> None:
    """Draws the head's parameters that the checkpoint did not have anew, in place.

    As transformers draws them for this architecture, from torch's global generator: seed it first.
    Some heads are initialised by the module around them, so those are asked too, the inner first.
    """
    if not fresh_parameters:
        return
    fresh = frozenset(fresh_parameters)
    for name, parameter in model.named_parameters():
        # The mark by which transformers leaves loaded tensors alone.
        parameter.__dict__["_is_hf_initialized"] = name not in fresh
    with torch.no_grad():
        for name in _inner_first(model, fresh_parameters):
            model._init_weights(model.get_submodule(name))


def _inner_first(model: nn.Module, parameters: Collection[str]) -> list[str]:
    """Names of all modules around some parameters, the model's own "" last."""
    around = {
        name.rsplit(".", depth)[0] if depth <= name.count(".") else ""
        for name in parameters
        for depth in range(1, name.count(".") + 2)
    }
    order = [name for name, _ in model.named_modules() if name in around]
    return order[::-1]


def hold_heads_in_float32(adapted: PeftModel) -> None:
    """Trains the copies of a head that PEFT made in float32, on a base of any precision.

    In half precision small updates are rounded away and AdamW's second moment underflows.
    """
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                copy.float()
                copy.register_forward_pre_hook(in_float32, with_kwargs=True)


def in_float32(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook before a module that computes in float32, whatever it is given."""

    def cast(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.float() if is_float else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def _has_parameters(module: nn.Module | None) -> bool:
    return module is not None and any(True for _ in module.parameters())
