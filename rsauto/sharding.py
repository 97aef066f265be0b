"""FSDP of a frozen base model: each process keeps a part of every layer's weights.

A layer is put together right before it runs and given up after it. Embeddings, the last norm and
the head stay whole, and so do adapters: they are small, and each process trains all of them.

`fully_shard` itself, not accelerate's preparation: that also wraps the outermost module, whose
hooks PEFT does not run, and takes an optimizer, while a base is sharded once for many trials.
"""

from __future__ import annotations

import torch
from torch import distributed, nn

from rsauto.errors import InputError


def sharded_layers(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """(the module that runs the layers, the layers). Raises InputError where there are none.

    The longest list that is not inside another one, as the experts of a layer are.
    """
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            name.startswith(f"{outer}.") for outer, _ in lists
        ):
            lists.append((name, module))
    if not lists:
        raise InputError(
            f"model.name: FSDP shards a model layer by layer, and {type(model).__name__} has no "
            "list of layers. Launch without --use_fsdp."
        )
    name, layers = max(lists, key=lambda pair: len(pair[1]))
    return model.get_submodule(name.rpartition(".")[0]), layers


def shard(model: nn.Module, device: torch.device) -> None:
    """Shards the layers of a frozen model over all processes, onto their devices, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    around, layers = sharded_layers(model)
    inside = {id(parameter) for parameter in layers.parameters()}
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # What runs the layers has their order, in which they are fetched ahead.
    whole = {p for p in around.parameters() if id(p) not in inside and not _is_sharded(p)}
    fully_shard(around, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "to_local")
