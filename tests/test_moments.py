"""Activation moments against autograd, which is told nothing of factors and scaling."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import pytest
import torch
from examples import data_of
from peft import PeftModel
from test_training import rows, spec_of
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rsauto.adapters.lora import add_adapter, lora_layers
from rsauto.base import prepare
from rsauto.data import collate
from rsauto.records import ActivationMoments
from rsauto.training.loss import summed_cross_entropy
from rsauto.training.moments import activation_moments

DATA = data_of(rows(8, seed=1), rows(7, seed=2))


@pytest.fixture(scope="module")
def adapted() -> PeftModel:
    """With factors that have an effect, B included."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    prepare(model, gradient_checkpointing=False)
    found = add_adapter(model, spec_of(rule="lora", rank=4))
    for layer in lora_layers(found):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return found


def measure(adapted: PeftModel, batch_size: int) -> ActivationMoments:
    return activation_moments(
        adapted, DATA.validation, step=3, batch_size=batch_size,
        pad_token_id=DATA.pad_token_id, device=torch.device("cpu"),
    )  # fmt: skip


def by_autograd(adapted: PeftModel) -> ActivationMoments:
    """Row by row, without padding; y - W x is the adapter's part, its gradient by backward."""
    num_targets = sum(len(x.input_ids) - x.num_prompt_tokens for x in DATA.validation)
    layers = list(lora_layers(adapted))
    seen: dict[int, list[dict[str, Tensor]]] = {i: [] for i in range(len(layers))}
    for row in DATA.validation:
        batch = collate([row], DATA.pad_token_id)
        taken: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def take(layer: nn.Module, args: Any, out: Tensor, taken: Any = taken) -> None:
            taken[layer] = (args[0], out)

        hooks = [layer.register_forward_hook(take) for layer in layers]
        logits = adapted(**batch.inputs()).logits
        for hook in hooks:
            hook.remove()
        loss = summed_cross_entropy(logits, batch.labels) / num_targets
        outputs = [taken[layer][1] for layer in layers]
        for i, v in enumerate(torch.autograd.grad(loss, outputs)):
            x = taken[layers[i]][0].detach().requires_grad_()
            part = layers[i](x) - layers[i].base_layer(x)
            (into_x,) = torch.autograd.grad(part, x, v)
            seen[i].append(
                {"x": x, "y": taken[layers[i]][1], "part": part, "v": v, "into_x": into_x}
            )

    def second(i: int, name: str) -> float:
        return float(torch.cat([found[name].flatten() for found in seen[i]]).square().mean())

    every = range(len(layers))
    return ActivationMoments(
        step=3,
        output_mean=fmean(
            float(torch.cat([found["y"].flatten() for found in seen[i]]).mean()) for i in every
        ),
        output_second=fmean(second(i, "y") for i in every),
        adapter_second=fmean(second(i, "part") for i in every),
        adapter_grad_second=fmean(second(i, "into_x") for i in every),
        forward_gain=fmean(math.sqrt(second(i, "part") / second(i, "x")) for i in every),
        backward_gain=fmean(math.sqrt(second(i, "into_x") / second(i, "v")) for i in every),
    )


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_moments_are_those_of_autograd_however_the_rows_are_cut(
    adapted: PeftModel, batch_size: int
) -> None:
    found, expected = measure(adapted, batch_size), by_autograd(adapted)
    for name in ActivationMoments.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=2e-5), name


def test_nothing_is_left_behind(adapted: PeftModel) -> None:
    adapted.train()
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    measure(adapted, 4)
    assert adapted.training
    assert all(p.grad is None for p in adapted.parameters())
    assert all(torch.equal(before[name], p) for name, p in adapted.named_parameters())
    assert not any(layer._forward_hooks for layer in lora_layers(adapted))


def test_an_adapter_without_effect_has_no_gain(adapted: PeftModel) -> None:
    model = adapted.get_base_model()
    layers = list(lora_layers(model))
    kept = [layer.lora_B["default"].weight.detach().clone() for layer in layers]
    for layer in layers:
        torch.nn.init.zeros_(layer.lora_B["default"].weight)
    found = measure(adapted, 4)
    assert found.forward_gain == found.backward_gain == found.adapter_second == 0
    assert found.output_second > 0
    for layer, values in zip(layers, kept, strict=True):
        layer.lora_B["default"].weight.data.copy_(values)
