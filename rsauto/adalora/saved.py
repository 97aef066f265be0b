"""The allocation's state in an adapter's file, beside its tensors.

For every module, once ranks are being allocated:

    <module>.lora_mask                          (r,) boolean, the active triplets
    <module>.lora_sensitivity_{E,A,B}           the smoothed scores, until the pattern is fixed
    <module>.lora_uncertainty_{E,A,B}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rsauto.adalora.importance import RANK_DIM, SCORED, Factor, Importance
from rsauto.adalora.layer import SvdLayer, Triplets

_PREFIX = "base_model.model."


def factor_tensors(
    layers: Mapping[str, SvdLayer], adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The factors as they stand in ``state_dict``, the lambdas of inactive triplets zero."""
    found: dict[str, Tensor] = {}
    for module, layer in layers.items():
        for name, parameter in layer.factors(adapter_name).items():
            key = f"{module}.lora_{name}.{adapter_name}"
            tensor = state_dict.get(key, parameter.detach())
            if name == "E" and len(tensor) == layer.r[adapter_name]:
                inactive = ~layer.triplets[adapter_name].mask.to(tensor.device)
                tensor = tensor.masked_fill(inactive[:, None], 0.0)
            found[key] = tensor
    return found


def saved_tensors(layers: Mapping[str, SvdLayer], adapter_name: str) -> dict[str, Tensor]:
    """What to write beside the factors; nothing before the first step."""
    saved: dict[str, Tensor] = {}
    for module, layer in layers.items():
        state = layer.triplets[adapter_name]
        for key, tensor in _state(state):
            saved[f"{module}.{key}.{adapter_name}"] = tensor
    return saved


def _state(state: Triplets) -> Iterator[tuple[str, Tensor]]:
    if state.importance is not None and not state.importance.sensitivity:
        return
    yield "lora_mask", state.mask.clone()
    if state.importance is not None:
        for name, tensor in state.importance.sensitivity.items():
            yield f"lora_sensitivity_{name}", tensor
        for name, tensor in state.importance.uncertainty.items():
            yield f"lora_uncertainty_{name}", tensor


def pop_saved(
    layers: Mapping[str, SvdLayer],
    adapter_name: str,
    tensors: Mapping[str, Tensor],
    *,
    drop_inactive: bool,
) -> dict[str, Tensor]:
    """The factors alone, the layers being resized to them and given the state beside them.

    ``drop_inactive`` leaves out triplets that are not active: of no effect, and not to be trained.
    """
    left = dict(tensors)
    for module, layer in layers.items():
        name = _saved_name(module, left)
        if name is None:
            continue  # a file of another set of modules: PEFT reports what is missing
        found = _pop_state(name, left)
        if drop_inactive and found is not None:
            index = found.mask.nonzero().flatten()
            for factor, dim in RANK_DIM.items():
                key = f"{name}.lora_{factor}"
                left[key] = left[key].index_select(dim, index.to(left[key].device))
            found = _Found(torch.ones(len(index), dtype=torch.bool), None)
        layer.resize(adapter_name, len(left[f"{name}.lora_E"]))
        state = layer.triplets[adapter_name]
        state.importance = Importance()
        if found is not None:
            state.importance = found.importance
            layer.activate(adapter_name, found.mask, int(found.mask.sum()))
    return left


class _Found(NamedTuple):
    """State read for one module."""

    mask: Tensor
    importance: Importance | None


def _saved_name(module: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The module's name in the file, which has PEFT's prefix also where the model has not."""
    names = (module, _PREFIX + module)
    return next((name for name in names if f"{name}.lora_E" in tensors), None)


def _pop_state(name: str, tensors: dict[str, Tensor]) -> _Found | None:
    mask = tensors.pop(f"{name}.lora_mask", None)
    importance = Importance()
    factors: tuple[Factor, ...] = SCORED["full"]
    for factor in factors:
        sensitivity = tensors.pop(f"{name}.lora_sensitivity_{factor}", None)
        uncertainty = tensors.pop(f"{name}.lora_uncertainty_{factor}", None)
        if sensitivity is not None and uncertainty is not None:
            importance.sensitivity[factor] = sensitivity
            importance.uncertainty[factor] = uncertainty
    if mask is None:
        return None
    return _Found(mask, importance if importance.sensitivity else None)
