"""A base that is sharded over devices: which layers, what a device needs, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planning import planner_of
from tiny_study import study_values, write_model
from torch import nn
from transformers import LlamaConfig

from rsauto.base import open_base
from rsauto.config import ModelConfig
from rsauto.errors import InputError
from rsauto.memory.planner import MemoryPlanner
from rsauto.memory.sharded import GATHERED_LAYERS, ShardedBase, sharded_base
from rsauto.search.setup import set_up
from rsauto.sharding import sharded_layers
from rsauto.study_file import validate
from rsauto.training.spread import Spread


def test_a_device_keeps_its_part_and_the_layers_that_are_gathered(tmp_path: Path) -> None:
    source = open_base(ModelConfig(name=str(write_model(tmp_path))))
    # q, k, v, o of 32 x 32, gate, up and down of 32 x 64, two norms of 32; float32.
    layer = 4 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32)
    found = sharded_base(source, None, num_devices=3)
    assert (found.layers_bytes, found.largest_layer_bytes) == (2 * layer, layer)
    kept = -(-2 * layer // 3)
    assert found.freed_bytes == 2 * layer - kept - GATHERED_LAYERS * layer
    many = ShardedBase(num_devices=8, layers_bytes=80 * layer, largest_layer_bytes=layer)
    assert many.freed_bytes == (80 - 10 - GATHERED_LAYERS) * layer


def test_what_fits_is_what_is_predicted(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    whole = planner_of(config, 12)
    base = ShardedBase(num_devices=4, layers_bytes=90_000, largest_layer_bytes=10_000)
    sharded = MemoryPlanner(
        whole.kind, train_lengths=[12] * 4, eval_length=12, outside_bytes=0, sharded_base=base
    )
    batch: Any = {"batch_size": 4, "micro_batch_size": 2}
    found, before = sharded.predict(8, **batch), whole.predict(8, **batch)
    assert before.peak_bytes - found.peak_bytes == base.freed_bytes == 90_000 - 22_500 - 40_000
    assert sum(found.breakdown.values()) == found.peak_bytes
    assert found.estimated and "sharded over 4 devices" in found.estimate_reason
    needed = sharded.needed_bytes(found)
    assert sharded.fits(8, memory_budget_bytes=needed, **batch)
    assert not sharded.fits(8, memory_budget_bytes=needed - 1, **batch)
    assert sharded.with_allowance(0.5).predict(8, **batch) == found


def test_the_layers_are_the_outermost_list() -> None:
    experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))
    layers = nn.ModuleList(nn.ModuleDict({"experts": experts}) for _ in range(2))
    backbone = nn.ModuleDict({"layers": layers})
    model = nn.ModuleDict({"model": backbone, "head": nn.Linear(2, 2)})
    assert sharded_layers(model) == (backbone, layers)
    with pytest.raises(InputError, match="has no list of layers"):
        sharded_layers(nn.ModuleDict({"head": nn.Linear(2, 2)}))


def test_a_quantised_base_is_not_sharded(tmp_path: Path) -> None:
    values = study_values(tmp_path)
    values["model"]["quant_bits"] = 8
    with pytest.raises(InputError, match=r"model.quant_bits: 8, and FSDP cannot"):
        set_up(validate(values), None, Spread(size=2, shards_base=True))
