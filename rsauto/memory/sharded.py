"""What a base needs that is sharded over devices, compared to one that is whole on each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rsauto.architecture import auto_class
from rsauto.base import BaseSource
from rsauto.errors import InputError
from rsauto.memory.kinds import Prediction
from rsauto.sharding import sharded_layers

GATHERED_LAYERS = 4
"""Layers that may be whole at once: the one that runs, the next one twice, as it arrives and as it
is cut into its weights, and the one before, which a slow transport may still hold (measured with
gloo on busy cores; on idle ones it was gone in time)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardedBase:
    """The layers of a base over ``num_devices``."""

    num_devices: int
    layers_bytes: int
    """Of all of them."""
    largest_layer_bytes: int

    @property
    def freed_bytes(self) -> int:
        """What a device has less of than with a whole base; negative for a very shallow one."""
        kept = -(-self.layers_bytes // self.num_devices)
        return self.layers_bytes - kept - GATHERED_LAYERS * self.largest_layer_bytes

    def apply(self, prediction: Prediction) -> Prediction:
        """The prediction for one of the devices, from that of a step with the whole base."""
        freed = self.freed_bytes
        weights = prediction.breakdown.get("weights", 0) - freed
        return replace(
            prediction,
            peak_bytes=prediction.peak_bytes - freed,
            reserved_bytes=prediction.reserved_bytes - freed,
            breakdown={**prediction.breakdown, "weights": weights},
            estimate_reason=prediction.estimate_reason
            or f"for a base that is sharded over {self.num_devices} devices and gathered layer by "
            "layer",
        )


def sharded_base(source: BaseSource, quant_bits: int | None, num_devices: int) -> ShardedBase:
    """Of a base by its configuration, no weights are read.

    Raises InputError where it cannot be sharded.
    """
    if quant_bits is not None:
        raise InputError(
            f"model.quant_bits: {quant_bits}, and FSDP cannot shard a quantised base. Launch "
            "without --use_fsdp, so that each device holds all of it, or choose a base that is not "
            "quantised."
        )
    with torch.device("meta"):
        model = auto_class(source.task).from_config(
            source.config, dtype=source.dtype, trust_remote_code=False
        )
    _, layers = sharded_layers(model)
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    return ShardedBase(
        num_devices=num_devices, layers_bytes=sum(sizes), largest_layer_bytes=max(sizes)
    )
