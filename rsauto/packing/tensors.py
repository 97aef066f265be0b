"""What one trial trains, taken from its PEFT adapter and put back into one.

A trial of a pack begins and ends as an ordinary PEFT adapter: its numbers are drawn by PEFT, in the
order of a trial alone, and it is saved by the code that saves any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from rsauto.adalora.config import RsAdaLoraConfig
from rsauto.adalora.layer import SvdLayer
from rsauto.adapters.lora import ADAPTER_NAME
from rsauto.adapters.optimizers import GroupName

HOST = torch.device("cpu")


class Key(NamedTuple):
    """A trained tensor: factor A, B or E (lambda) of a layer, or a parameter of a head's module."""

    module: str
    name: str


@dataclass(eq=False)
class TrialTensors:
    """Everything of a trial that training changes, without padding, on the host.

    While the trial is seated in a stack its fields are there, and empty here.
    """

    fields: dict[str, dict[Key, Tensor]]
    """By what it is: "values", and what optimizer and allocation keep of every value."""
    gamma: dict[str, float]
    """gamma_r of every adapted layer."""
    config: RsAdaLoraConfig | None = None
    """Of AdaLoRA: how ranks are placed."""
    alive: dict[str, Tensor] = field(default_factory=dict)
    """AdaLoRA: (r,) boolean for every layer, False for triplets that are gone for good."""
    active: dict[str, Tensor] = field(default_factory=dict)
    """AdaLoRA: (r,) boolean for every layer, True where lambda may differ from zero."""

    ranks: dict[str, int] = field(default_factory=dict)
    """AdaLoRA: active triplets of every layer."""
    num_alive: dict[str, int] = field(default_factory=dict)
    """AdaLoRA: triplets of every layer that are not gone for good."""

    @property
    def values(self) -> dict[Key, Tensor]:
        return self.fields["values"]

    @property
    def num_adapter_weights(self) -> int:
        """Numbers in A and B of all layers, without those of triplets that are gone for good."""
        return num_weights({key: t.shape for key, t in self.values.items()}, self.num_alive)


def num_weights(shapes: Mapping[Key, tuple[int, ...]], num_alive: Mapping[str, int]) -> int:
    """Numbers in A and B; of a layer in ``num_alive`` those of so many triplets only."""
    total = 0
    for key, shape in shapes.items():
        if key.name in ("A", "B"):
            rank, width = shape if key.name == "A" else shape[::-1]
            total += num_alive.get(key.module, rank) * width
    return total


def group_of(key: Key) -> GroupName:
    """The group of the optimizer that a tensor belongs to."""
    names: dict[str, GroupName] = {"A": "A", "B": "B", "E": "lambda"}
    return names.get(key.name, "head")


def read(adapted: PeftModel) -> TrialTensors:
    """Copies of everything that is trained of an adapter at its start."""
    values, gamma = {}, {}
    for name, layer in adapted_layers(adapted):
        for factor, tensor in _factors(layer).items():
            values[Key(name, factor)] = tensor.detach().to(HOST, copy=True)
        gamma[name] = float(layer.scaling[ADAPTER_NAME])
    for name, head in _heads(adapted):
        for parameter, tensor in head.named_parameters():
            values[Key(name, parameter)] = tensor.detach().to(HOST, copy=True)
    config = adapted.peft_config[ADAPTER_NAME]
    own = config if isinstance(config, RsAdaLoraConfig) else None
    tensors = TrialTensors({"values": values}, gamma, own)
    for key, tensor in values.items():
        if key.name == "E":
            everything = torch.ones(len(tensor), dtype=torch.bool)
            tensors.alive[key.module] = tensors.active[key.module] = everything
            tensors.ranks[key.module] = tensors.num_alive[key.module] = len(tensor)
    return tensors


@torch.no_grad()
def write(tensors: TrialTensors, adapted: PeftModel) -> None:
    """Puts a trial's values into an adapter of its spec; pruned triplets are left out."""
    for name, layer in adapted_layers(adapted):
        values = {f: tensors.values[Key(name, f)] for f in _factors(layer)}
        if isinstance(layer, SvdLayer):
            _write_triplets(layer, values, tensors.active[name])
        for factor, tensor in _factors(layer).items():
            tensor.copy_(values[factor])
    for name, head in _heads(adapted):
        for parameter, tensor in head.named_parameters():
            tensor.copy_(tensors.values[Key(name, parameter)])


def _write_triplets(layer: SvdLayer, values: dict[str, Tensor], active: Tensor) -> None:
    """Makes room for the active triplets of an adapter, and leaves the others out of ``values``."""
    layer.resize(ADAPTER_NAME, int(active.sum()))
    layer.triplets[ADAPTER_NAME].importance = None  # the pattern is what it is
    values["A"], values["E"] = values["A"][active], values["E"][active]
    values["B"] = values["B"][:, active]


def adapted_layers(adapted: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Names in the base model and layers, in model order."""
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _factors(layer: LoraLayer) -> dict[str, Tensor]:
    """A (r, d_in), B (d_out, r), and AdaLoRA's E (r, 1)."""
    if isinstance(layer, SvdLayer):
        return {str(name): factor for name, factor in layer.factors(ADAPTER_NAME).items()}
    return {
        "A": layer.lora_A[ADAPTER_NAME].get_parameter("weight"),
        "B": layer.lora_B[ADAPTER_NAME].get_parameter("weight"),
    }


def _heads(adapted: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield name, module.modules_to_save[ADAPTER_NAME]
