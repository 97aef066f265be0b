"""The head of a sequence classifier: which modules it is, and a fresh start for every trial.

A head is trained whole beside the adapter (PEFT's `modules_to_save`) and saved with it. It is
everything behind the backbone (`classifier`, `score`, DistilBERT's `pre_classifier`) and the
backbone's pooler, which many checkpoints lack: left frozen and random it would throw away what the
encoder learns.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
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
    """
    for head in head_module_names(model):
        for name, module in model.get_submodule(head).named_modules(prefix=head):
            own = dict(module.named_parameters(prefix=name, recurse=False))
            if not own or not own.keys() <= set(fresh_parameters):
                continue
            for parameter in own.values():
                # The mark by which transformers leaves loaded tensors alone.
                parameter.__dict__.pop("_is_hf_initialized", None)
            with torch.no_grad():
                model._init_weights(module)


def _has_parameters(module: nn.Module | None) -> bool:
    return module is not None and any(True for _ in module.parameters())
