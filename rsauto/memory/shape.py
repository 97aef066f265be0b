"""The model of a plan: found by whatever name it was given, read from its configuration alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsauto.config import TaskType
from rsauto.errors import InputError, nearest
from rsauto.memory.kinds import Bits, DtypeName
from rsauto.memory.presets import (
    PRESET_NAMES,
    is_preset,
    model_preset,
    read_model_config,
)

_DTYPES: tuple[DtypeName, ...] = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """All that a plan needs of a model."""

    name: str
    config_json: str
    """The Hugging Face configuration, keys sorted."""
    dtype: DtypeName
    """That the weights were saved in."""
    quant_bits: Bits | None
    """Of a checkpoint that is quantised already."""
    num_positions: int | None
    """Tokens that a sequence may have; None where the configuration names no limit."""


def model_shape(
    model: str | Path | Mapping[str, Any] | Any,
    *,
    task: TaskType,
    num_labels: int = 2,
    revision: str | None = None,
) -> ModelShape:
    """The shape of a preset, folder, config.json, hub model, 'embedded', configuration or model.

    Raises InputError where there is none of the name, or its configuration is broken.
    """
    name, fields = _fields(model, revision)
    if task == "SEQ_CLS" and "id2label" not in fields:
        fields = {**fields, "num_labels": num_labels}
        fields.setdefault("pad_token_id", 0)
        if fields["pad_token_id"] is None:
            fields["pad_token_id"] = 0
    return ModelShape(
        name=name,
        config_json=json.dumps(fields, sort_keys=True),
        dtype=_dtype(fields),
        quant_bits=_saved_bits(fields),
        num_positions=_num_positions(fields),
    )


def _fields(model: Any, revision: str | None) -> tuple[str, dict[str, Any]]:
    """(name, configuration)."""
    if isinstance(model, Mapping):
        return str(model.get("model_type", "model")), dict(model)
    if not isinstance(model, (str, Path)):
        return _of_object(model)
    name = str(model)
    path = Path(name).expanduser()
    if name == "embedded":
        from rsauto.embedded import MODEL_DIR

        return name, read_model_config(MODEL_DIR)
    if path.exists():
        return name, read_model_config(path)
    if is_preset(name) and revision is None:
        return name, model_preset(name)
    looks_local = name.startswith((".", "/", "~")) or name.endswith(".json") or name.count("/") > 1
    if looks_local or "/" not in name:
        raise InputError(
            f"model: {name!r} is no file, no folder and no known shape."
            f"{nearest(name.lower(), PRESET_NAMES)} Give a config.json, the folder of a model, a "
            f"hub id such as Qwen/Qwen2.5-0.5B, embedded, or one of {', '.join(PRESET_NAMES)}."
        )
    from rsauto.hub import Repository, fetch_config

    return name, read_model_config(fetch_config(Repository("model", name, revision)))


def _of_object(model: Any) -> tuple[str, dict[str, Any]]:
    """Of transformers: a configuration, or a model that has one."""
    config = getattr(model, "config", model)
    if not hasattr(config, "to_json_string"):
        raise InputError(
            f"model: {type(model).__name__} is neither a name nor a configuration. Give a preset, "
            "a config.json, a hub id, a dict, or a configuration or model of transformers."
        )
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return str(getattr(config, "name_or_path", "") or fields.get("model_type")), fields


def _dtype(fields: Mapping[str, Any]) -> DtypeName:
    saved = str(fields.get("dtype") or fields.get("torch_dtype") or "float32")
    known = [name for name in _DTYPES if name == saved.removeprefix("torch.")]
    return known[0] if known else "float32"


def _saved_bits(fields: Mapping[str, Any]) -> Bits | None:
    if not fields.get("quantization_config"):
        return None
    from transformers import PretrainedConfig

    from rsauto.quantisation import saved_bits

    return saved_bits(PretrainedConfig.from_dict(dict(fields)))


def _num_positions(fields: Mapping[str, Any]) -> int | None:
    found = fields.get("n_positions", fields.get("max_position_embeddings"))
    return found if isinstance(found, int) and found > 0 else None
