"""Kinds of steps and planners for tests: small models, float32 on a CPU unless a test says else."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from rsauto.memory.kinds import StepKind
from rsauto.memory.planner import MemoryPlanner


def kind_of(config: PretrainedConfig, **changes: Any) -> StepKind:
    """A step of the model of ``config`` as `rsauto study` runs it on a CPU."""
    settings: dict[str, Any] = {
        "model_config": config.to_json_string(use_diff=False),
        "dtype": "float32",
        "device_type": "cpu",
    }
    return StepKind(**(settings | changes))


def planner_of(
    config: PretrainedConfig, length: int, eval_length: int | None = None, **changes: Any
) -> MemoryPlanner:
    """A planner of rows of ``length`` tokens, which keeps nothing on disk."""
    return MemoryPlanner(
        kind_of(config, **changes), train_lengths=[length], eval_length=eval_length or length
    )
