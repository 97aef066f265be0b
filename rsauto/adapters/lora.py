"""LoRA and rsLoRA through PEFT: which layers are adapted, and with which factor.

Notation
    W x + gamma_r B A x     A is (rank x d_in), B is (d_out x rank), B = 0 at the start
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from rsauto.adapters.fused import fuse
from rsauto.adapters.head import head_module_names, hold_heads_in_float32, is_classifier
from rsauto.errors import InputError, nearest
from rsauto.records import TrialSpec
from rsauto.scaling import gamma_r

ADAPTER_NAME = "default"

_ATTENTION = re.compile(r"(^|[._])(self_?)?attn|attention", re.IGNORECASE)


def target_module_names(model: nn.Module, choice: str | tuple[str, ...]) -> list[str]:
    """Full names of the linear layers to adapt, in model order.

    ``all-linear`` takes every linear layer but the output head; ``attention`` those inside
    attention blocks; a tuple takes layers whose name equals or ends with one of its entries.

    Raises InputError when a choice selects nothing, naming what there is.
    """
    linear = [name for name, _ in _linear_layers(model)]
    if not linear:
        raise InputError("model: it has no linear layers, so there is nothing to adapt with LoRA.")
    if choice == "all-linear":
        return linear
    if choice == "attention":
        inside = [name for name in linear if _ATTENTION.search(name.rpartition(".")[0])]
        if not inside:
            raise InputError(
                "model.target_modules: no attention layers were recognised by name. "
                f"Give a list instead; the linear layers are: {_short_names(linear)}."
            )
        return inside
    wanted = (choice,) if isinstance(choice, str) else choice
    _require_known(wanted, linear)
    return [name for name in linear if any(_matches(name, suffix) for suffix in wanted)]


def add_adapter(
    model: nn.Module, spec: TrialSpec, *, fused: bool = True, **options: Any
) -> PeftModel:
    """Wraps ``model`` with the spec's adapter; the base weights are frozen and shared.

    The factors are initialised by PEFT (A Kaiming-uniform, B zero) from torch's global generator:
    seed it first. gamma_r is set explicitly, so that every exponent of r can be studied. With a
    rank pattern every module has its own rank and the gamma_r of that rank, as in PEFT.
    ``fused`` layers take less time and memory than PEFT's own, see `rsauto.adapters.fused`.
    ``options`` are further fields of PEFT's LoraConfig.
    """
    pattern = dict(spec.rank_pattern or ())
    config = LoraConfig(
        r=spec.rank,
        rank_pattern=pattern,
        lora_alpha=spec.alpha,
        use_rslora=spec.scaling_rule == "rslora",
        target_modules=list(pattern) or target_module_names(model, spec.target_modules),
        **shared_options(model),
        **{"lora_dropout": 0.0, **options},
    )
    adapted = wrap(model, config)
    hold_heads_in_float32(adapted)
    if fused:
        fuse(adapted, spec.product_order)
    for layer in lora_layers(adapted):
        layer.scaling[ADAPTER_NAME] = gamma_r(
            spec.scaling_rule, spec.alpha, layer.r[ADAPTER_NAME], spec.scaling_exponent
        )
        if spec.init_scale is not None:
            with torch.no_grad():
                layer.lora_A[ADAPTER_NAME].get_parameter("weight").mul_(spec.init_scale)
        if spec.adapter_dtype == "bfloat16":
            # Only now: the numbers drawn are then those of float32, rounded.
            layer.lora_A.to(torch.bfloat16)
            layer.lora_B.to(torch.bfloat16)
    return adapted


def shared_options(model: nn.Module) -> dict[str, Any]:
    """What the configuration of every adapter says about the model it is for."""
    return {
        "fan_in_fan_out": has_conv1d(model),
        "bias": "none",
        "task_type": "SEQ_CLS" if is_classifier(model) else "CAUSAL_LM",
        "modules_to_save": head_module_names(model) or None,
    }


def has_conv1d(model: nn.Module) -> bool:
    """Whether it has layers that keep their weights transposed, as GPT-2 does."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def wrap(model: nn.Module, config: PeftConfig) -> PeftModel:
    """PEFT's model of ``config`` around ``model``, which is left as it was if that fails."""
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5 for a property by its old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", append=False)
        return _wrap(model, config)


def _wrap(model: nn.Module, config: PeftConfig) -> PeftModel:
    had_hooks = bool(getattr(model, "_require_grads_hooks", None))
    if had_hooks:
        # PEFT sets these hooks once more with every adapter, and never removes one.
        model.disable_input_require_grads()  # type: ignore[operator]
    try:
        return get_peft_model(model, config, ADAPTER_NAME)
    except BaseException:  # such as a device without room for the factors
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                model.set_submodule(name, module.get_base_layer())
            elif isinstance(module, ModulesToSaveWrapper):
                model.set_submodule(name, module.original_module)
        if hasattr(model, "peft_config"):
            del model.peft_config
        raise
    finally:
        if had_hooks and not model._require_grads_hooks:
            model.enable_input_require_grads()  # type: ignore[operator]


def remove_adapter(adapted: PeftModel) -> nn.Module:
    """The base model as it was before `add_adapter`, the same object, without its adapter."""
    # PEFT unloads to the trained copy of a head, so the untouched one is put back after it.
    heads = {
        name: module.original_module
        for name, module in adapted.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    base: nn.Module = adapted.unload()
    for name, head in heads.items():
        base.set_submodule(name, head)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


def lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    """Every adapted layer of a PEFT model."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            yield module


def short_target_names(adapted: PeftModel, chosen: Collection[str] | None = None) -> list[str]:
    """Adapted layers by their last names where those say the same, else by their full names.

    Servers match the last name ("q_proj"), so the short form is used whenever it selects exactly
    the chosen layers; all of the adapted ones unless told otherwise.
    """
    base = adapted.get_base_model()
    layers = {n for n, m in base.named_modules() if isinstance(m, LoraLayer)}
    chosen = layers if chosen is None else set(chosen)
    short = {name.rpartition(".")[2] for name in chosen}
    inside = tuple(f"{name}." for name in layers)
    outside = {name for name, _ in base.named_modules() if not name.startswith(inside)}
    untouched = outside - chosen
    clash = any(_matches(name, suffix) for name in untouched for suffix in short)
    return sorted(chosen if clash else short)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter, trainable ones only, in model order."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers but the output head, which PEFT's own "all-linear" leaves out as well."""
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    heads = tuple(head_module_names(model))
    for name, module in model.named_modules():
        in_head = any(name == head or name.startswith(f"{head}.") for head in heads)
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output and not in_head:
            yield name, module


def _matches(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _short_names(names: list[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def _require_known(wanted: tuple[str, ...], linear: list[str]) -> None:
    problems = []
    short = sorted({name.rpartition(".")[2] for name in linear})
    for suffix in wanted:
        if not any(_matches(name, suffix) for name in linear):
            problems.append(
                f"model.target_modules: the model has no linear layer named {suffix!r}."
                f"{nearest(suffix, short)} It has: {', '.join(short)}."
            )
    if problems:
        raise InputError(problems)
