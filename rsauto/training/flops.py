"""Floating-point operations of LoRA training, in closed form."""

from __future__ import annotations

from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from rsauto.adalora.layer import SvdLayer


def training_flops(adapted: PeftModel, num_tokens: int) -> float:
    """Multiply-adds counted as two, for forward and backward over ``num_tokens`` tokens.

    4 N_frozen + 6 N_trainable per token, with N the weights of linear layers: 2 for the forward
    pass, 2 for the gradient of the activations, and 2 more for the gradient of the weights where
    they are trained (Kaplan et al. 2020, arXiv:2001.08361, section 2.1, without the weight
    gradients of frozen layers). The attention product itself, which does not depend on rank, and
    the recomputation of gradient checkpointing are left out.
    """
    frozen, trainable = linear_weights(adapted)
    return float(num_tokens) * (4.0 * frozen + 6.0 * trainable)


def linear_weights(model: nn.Module) -> tuple[int, int]:
    """(frozen, trainable) numbers of weights in linear layers; a tied output head counts.

    AdaLoRA's P and Q count as two linear layers; lambda scales a vector and is left out.
    """
    frozen = trainable = 0
    for module in model.modules():
        if isinstance(module, SvdLayer):
            trainable += sum(p.numel() for p in (*module.lora_A.values(), *module.lora_B.values()))
        elif isinstance(module, (nn.Linear, Conv1D)):
            if module.weight.requires_grad:
                trainable += _num_weights(module)
            else:
                frozen += _num_weights(module)
    return frozen, trainable


def _num_weights(layer: nn.Linear | Conv1D) -> int:
    """By the layer's shape: weights in 4 bit are stored two in one number."""
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    return layer.weight.numel()
